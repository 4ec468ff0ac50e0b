"""What is kept in which type: moments in bfloat16 where asked, weights in float32 whatever the computation is in."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign.config.schema import OptimizerConfig
from palign.models.transformer import make_language_model
from palign.objectives.compose import make_objective
from palign.sharding.mesh import make_mesh, to_global
from palign.train.optimizer import make_optimizer
from palign.train.state import init_state, state_shardings
from palign.train.step import make_train_step
from tests.trees import TINY, make_batch, random_trees


def optimizer(**options):
    return make_optimizer(OptimizerConfig(warmup_steps=0, warmup_ratio=None, schedule="constant", **options), 10)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_the_first_moment_is_kept_in_bfloat16_where_asked_and_nothing_else_is(name):
    params = {"kernel": jnp.linspace(-1.0, 1.0, 64)}
    gradient = {"kernel": jnp.cos(7 * params["kernel"])}
    moved = {}
    for dtype in ("float32", "bfloat16"):
        tx = optimizer(name=name, state_dtype=dtype)
        _, state = tx.update(gradient, tx.init(params), params)
        updates, state = tx.update(gradient, state, params)
        kept = {jnp.dtype(x.dtype).name for x in jax.tree.leaves(state) if x.size > 1}
        assert kept == {dtype, "float32"} - ({"float32"} if name == "lion" and dtype == "bfloat16" else set())
        moved[dtype] = updates["kernel"]
    assert moved["bfloat16"].dtype == jnp.float32
    size = float(jnp.abs(moved["float32"]).max())
    np.testing.assert_allclose(moved["bfloat16"], moved["float32"], rtol=0, atol=2**-7 * size)


def test_steps_far_below_the_rounding_of_bfloat16_add_up_though_the_computation_is_in_bfloat16():
    rate, steps = 1e-6, 5
    lm = make_language_model(dataclasses.replace(TINY, dtype="bfloat16"))
    mesh, tx = make_mesh(devices=jax.devices()[:1]), optimizer(learning_rate=rate)
    objective = make_objective(lm, ["sft"], chunk=16)
    step = make_train_step(objective, tx, mesh, state_shardings(mesh, lm, tx), {})
    batch = jax.tree.map(np.asarray, make_batch(random_trees(0, 6)))
    batch = to_global(mesh, jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch))
    state = init_state(mesh, lm, tx, seed=0)
    start = jax.device_get(state.params)
    for _ in range(steps):
        state, _ = step(state, {}, batch)
    before, after = start["layers"]["mlp"]["up"]["kernel"], np.asarray(state.params["layers"]["mlp"]["up"]["kernel"])
    np.testing.assert_allclose(np.median(np.abs(after - before)), rate * steps, rtol=0.05)  # Adam moves by its rate
    large = np.abs(before) > 0.01
    assert (before[large].astype(jnp.bfloat16) == after[large].astype(jnp.bfloat16)).mean() > 0.9
