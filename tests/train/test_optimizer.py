"""Schedules at points computed by hand, the weight-decay mask, clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign.config.schema import OptimizerConfig
from palign.models.transformer import make_language_model
from palign.train.optimizer import OPTIMIZERS, SCHEDULES, decayed, global_norm, learning_rate_schedule, make_optimizer
from tests.trees import TINY

COSINE_AT_A_QUARTER = 0.5 * (1 + np.cos(np.pi / 4))


def config_of(**options):
    return OptimizerConfig(**{"learning_rate": 1.0, "warmup_steps": 0, "warmup_ratio": None} | options)


def rates(config, num_steps, *steps):
    schedule = learning_rate_schedule(config, num_steps)
    return [float(schedule(step)) for step in steps]


@pytest.mark.parametrize(
    ("schedule", "at_0_25_50_100"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0]),
        ("cosine", [1, COSINE_AT_A_QUARTER, 0.5, 0]),
        ("cosine_to_floor", [1, 0.2 + 0.8 * COSINE_AT_A_QUARTER, 0.6, 0.2]),
    ],
)
def test_schedules_pass_through_points_computed_by_hand(schedule, at_0_25_50_100):
    config = config_of(schedule=schedule, floor=0.2)
    np.testing.assert_allclose(rates(config, 100, 0, 25, 50, 100), at_0_25_50_100, atol=1e-6)


def test_every_schedule_and_optimizer_that_a_config_may_name_exists():
    for table, key in ((SCHEDULES, "schedule"), (OPTIMIZERS, "name")):
        for name in table:
            config_of(**{key: name})
        with pytest.raises(ValueError) as error:
            config_of(**{key: "no such name"})
        assert set(str(error.value).rsplit("one of ", 1)[1].split(", ")) == set(table)


def test_warm_up_starts_at_zero_and_the_decay_takes_the_steps_that_are_left():
    config = config_of(schedule="linear", warmup_steps=10, learning_rate=2.0)
    np.testing.assert_allclose(rates(config, 110, 0, 1, 5, 10, 60, 110), [0, 0.2, 1, 2, 1, 0], atol=1e-6)


def test_a_warm_up_ratio_is_of_all_steps_and_rounded():
    by_ratio = config_of(schedule="cosine", warmup_steps=None, warmup_ratio=0.1)
    by_steps = config_of(schedule="cosine", warmup_steps=10)
    assert rates(by_ratio, 104, *range(0, 104, 7)) == rates(by_steps, 104, *range(0, 104, 7))
    without = config_of(warmup_steps=None, warmup_ratio=0.1)
    assert rates(without, 4, 0) == [1.0]  # 0.4 steps are none


@pytest.mark.parametrize("given", [dict(warmup_steps=5, warmup_ratio=0.1), dict(warmup_steps=None, warmup_ratio=None)])
def test_exactly_one_way_of_warming_up_must_be_set(given):
    with pytest.raises(ValueError, match=r"config.optimizer: warmup_steps = .*set exactly one and the other to None"):
        config_of(**given)


def test_a_warm_up_that_leaves_no_step_at_the_full_rate_is_an_error():
    with pytest.raises(ValueError, match="20 warm-up steps of a run of 20 leave none at the full rate"):
        learning_rate_schedule(config_of(warmup_steps=20), 20)


def test_weight_decay_spares_norm_scales_and_biases():
    lm = make_language_model(TINY.__class__(**{**TINY.__dict__, "attention_bias": True, "qk_norm": True}))
    mask = jax.tree_util.tree_leaves_with_path(decayed(jax.eval_shape(lm.init, jax.random.key(0))))
    spared = {jax.tree_util.keystr(path, simple=True, separator="/") for path, pulled in mask if not pulled}
    assert {name.rsplit("/", 1)[1] for name in spared} == {"scale", "bias"}
    assert len(spared) == 3 + 2 + 3 and len(mask) - len(spared) == 4 + 3 + 1  # norms, q/k norms, biases; kernels


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_shrinks_kernels_and_leaves_scales_where_there_is_no_gradient(name):
    params = {"kernel": jnp.full((4, 4), 2.0), "scale": jnp.full((4,), 2.0)}
    tx = make_optimizer(config_of(name=name, schedule="constant", learning_rate=0.1, weight_decay=0.5), 10)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert (np.asarray(updates["scale"]) == 0).all()
    assert (np.asarray(updates["kernel"]) < 0).all()


def test_adamw_takes_the_step_that_its_formula_says():
    config = config_of(schedule="constant", learning_rate=0.1, b1=0.9, b2=0.99, weight_decay=0.5, max_grad_norm=1e9)
    tx = make_optimizer(config, 10)
    params, gradients = {"kernel": jnp.array([2.0])}, [0.3, -0.1]
    state, mean, square, value = tx.init(params), 0.0, 0.0, 2.0
    update = jax.jit(tx.update)
    for t, g in enumerate(gradients, start=1):
        mean, square = 0.9 * mean + 0.1 * g, 0.99 * square + 0.01 * g * g
        ratio = (mean / (1 - 0.9**t)) / (np.sqrt(square / (1 - 0.99**t)) + 1e-8)
        value -= 0.1 * (ratio + 0.5 * value)
        updates, state = update({"kernel": jnp.array([g])}, state, params)
        params = {"kernel": params["kernel"] + updates["kernel"]}
    np.testing.assert_allclose(params["kernel"], [value], rtol=1e-6)


def test_gradients_are_clipped_by_their_norm_over_all_leaves():
    """A step as long as the clipped gradient: Adam would hide the length, so its first moment is read."""
    tx = make_optimizer(config_of(max_grad_norm=1.0, b1=0.0), 10)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    for given, clipped in (((3.0, 4.0), (0.6, 0.8)), ((0.3, 0.4), (0.3, 0.4))):
        gradient = {name: jnp.array([g]) for name, g in zip(params, given, strict=True)}
        state = tx.update(gradient, tx.init(params), params)[1]
        first_moment = [float(x[0]) for x in jax.tree.leaves(state) if x.shape == (1,)][:2]
        np.testing.assert_allclose(first_moment, clipped, rtol=1e-6)


def test_the_first_step_of_a_warm_up_moves_nothing():
    tx = make_optimizer(config_of(warmup_steps=2), 10)
    params = {"kernel": jnp.ones(3)}
    updates, _ = tx.update({"kernel": jnp.ones(3)}, tx.init(params), params)
    assert (np.asarray(updates["kernel"]) == 0).all()


def test_the_global_norm_is_of_all_leaves_and_in_float32():
    tree = {"a": jnp.full((300,), 1.0, jnp.bfloat16), "b": [jnp.full((100,), 1.0)]}
    norm = global_norm(tree)
    assert norm.dtype == jnp.float32 and float(norm) == 20.0
