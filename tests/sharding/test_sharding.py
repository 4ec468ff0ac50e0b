"""Where parameters and the optimizer's copies of them live."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from palign.config.schema import OptimizerConfig
from palign.models.transformer import make_language_model
from palign.sharding import rules
from palign.sharding.mesh import (
    ROWS,
    SHARED,
    in_mesh,
    make_mesh,
    num_row_shards,
    over_rows,
    row_sharding,
    sum_over_rows,
    to_global,
)
from palign.train.optimizer import make_optimizer
from palign.train.state import init_state, state_shardings
from tests.compiled import uncached
from tests.trees import TINY

EVERYTHING = dataclasses.replace(
    TINY, attention_bias=True, qk_norm=True, norms_per_layer=4, tie_embedding=False, value_head=1
)
WIDE = dataclasses.replace(TINY, dim=256, hidden_dim=512)  # wide enough for adafactor to factor


def shapes_of(config):
    return jax.eval_shape(make_language_model(config).init, jax.random.key(0))


@pytest.mark.parametrize("config", [TINY, EVERYTHING], ids=["tiny", "everything"])
def test_every_parameter_matches_exactly_one_rule_that_names_all_its_axes(config):
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes_of(config)):
        assert len(rules.logical_axes(rules.path_name(path))) == leaf.ndim


def test_every_rule_is_used():
    names = [rules.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes_of(EVERYTHING))]
    used = {rules.logical_axes(name) for name in names}
    assert used == {axes for _, axes in rules.PARAMETER_AXES}


@pytest.mark.parametrize(
    "name", ["layers/attention/query/kernal", "head/kernel", "layers/attention/query", "xembedding"]
)
def test_a_parameter_without_a_rule_is_an_error_that_names_it(name):
    with pytest.raises(ValueError, match=f"parameter '{name}' matches 0 rules of palign.sharding.rules.PARAMETER_AXES"):
        rules.logical_axes(name)


def test_a_parameter_of_two_rules_is_an_error(monkeypatch):
    monkeypatch.setattr(rules, "PARAMETER_AXES", (*rules.PARAMETER_AXES, (r"final_norm/.*", ("norm",))))
    with pytest.raises(ValueError, match="'final_norm/scale' matches 2 rules"):
        rules.logical_axes("final_norm/scale")


def test_every_kernel_is_cut_along_the_model_width_and_nothing_else_is():
    mesh = make_mesh(data=2, fsdp=4)
    shardings = rules.parameter_shardings(mesh, shapes_of(EVERYTHING))
    for (path, sharding), leaf in zip(
        jax.tree_util.tree_leaves_with_path(shardings), jax.tree.leaves(shapes_of(EVERYTHING)), strict=True
    ):
        name = rules.path_name(path)
        cut = [leaf.shape[i] for i, axis in enumerate(sharding.spec) if axis == "fsdp"]
        assert cut == ([TINY.dim] if name.endswith(("kernel", "embedding")) else []), name
        assert set(sharding.spec) <= {None, "fsdp"}


def test_an_axis_that_the_mesh_does_not_divide_is_an_error_that_says_where():
    shapes = shapes_of(dataclasses.replace(TINY, dim=12, num_heads=2, num_key_heads=1))
    message = "config.mesh.fsdp = 8 does not divide axis 'embed' of parameter '.*', 12 long; choose a divisor"
    with pytest.raises(ValueError, match=message):
        rules.parameter_shardings(make_mesh(data=1, fsdp=8), shapes)


def test_a_parameter_of_another_rank_than_its_rule_is_an_error():
    with pytest.raises(ValueError, match=r"'embedding' has shape \(4,\), its rule names 2 axes"):
        rules.parameter_shardings(make_mesh(), {"embedding": jax.ShapeDtypeStruct((4,), jnp.float32)})


@pytest.mark.parametrize(
    ("given", "shape"),
    [({}, (8, 1)), (dict(fsdp=4), (2, 4)), (dict(data=2, fsdp=-1), (2, 4)), (dict(data=1, fsdp=8), (1, 8))],
)
def test_a_mesh_infers_the_axis_that_is_left_open(given, shape):
    mesh = make_mesh(**given)
    assert tuple(mesh.shape.values()) == shape and mesh.axis_names == ("data", "fsdp")
    assert mesh.axis_types == (AxisType.Auto,) * 2  # Explicit ones break with_sharding_constraint
    assert num_row_shards(mesh) == 8


def test_a_mesh_takes_the_devices_that_it_is_given():
    assert make_mesh(devices=jax.devices()[2:5]).devices.ravel().tolist() == jax.devices()[2:5]


@pytest.mark.parametrize(
    "given", [dict(data=3), dict(data=-1, fsdp=3), dict(data=2, fsdp=2), dict(data=16), dict(data=0)]
)
def test_a_mesh_that_does_not_make_the_devices_is_an_error(given):
    with pytest.raises(ValueError, match=r"config.mesh: data=.*, fsdp=.* does not make 8 devices"):
        make_mesh(**given)


def test_two_open_axes_are_an_error():
    with pytest.raises(ValueError, match="data and fsdp are -1, and only one can be inferred"):
        make_mesh(data=-1, fsdp=-1)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
@pytest.mark.parametrize("config", [TINY, WIDE], ids=["tiny", "wide"])
def test_the_optimizers_copies_follow_their_parameters_and_the_rest_is_whole(config, name):
    mesh = make_mesh(data=2, fsdp=4)
    lm, tx = make_language_model(config), make_optimizer(OptimizerConfig(name=name, warmup_ratio=0.0), 10)
    state = state_shardings(mesh, lm, tx)
    assert state.params == rules.parameter_shardings(mesh, shapes_of(config))
    assert state.step.spec == state.nonfinite.spec == P()
    shapes = jax.eval_shape(tx.init, shapes_of(config))
    assert jax.tree.structure(shapes) == jax.tree.structure(state.opt_state)
    named = lambda spec: tuple(axis for axis in spec if axis)
    leaves = jax.tree.leaves(shapes_of(config))
    cut = {leaf.shape: named(s.spec) for leaf, s in zip(leaves, jax.tree.leaves(state.params), strict=True)}
    found = list(zip(jax.tree.leaves(shapes), jax.tree.leaves(state.opt_state), strict=True))
    for leaf, sharding in found:
        assert named(sharding.spec) == cut.get(leaf.shape, ())
    copies = {"adamw": 2, "lion": 1, "adafactor": 0 if config is WIDE else 1}[name]
    assert sum(named(s.spec) == ("fsdp",) for _, s in found) >= copies * list(cut.values()).count(("fsdp",))
    factored = [leaf for leaf, _ in found if leaf.size > 1 and leaf.shape not in cut]
    assert bool(factored) == (config is WIDE and name == "adafactor")  # rows and columns of moments: small, so whole


def test_random_weights_are_made_in_their_place_and_are_those_of_one_device():
    lm, tx = make_language_model(TINY), make_optimizer(OptimizerConfig(), 10)
    mesh = make_mesh(data=2, fsdp=4)
    with uncached():
        state = init_state(mesh, lm, tx, seed=0)
    expected = state_shardings(mesh, lm, tx)
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert state.params["layers"]["mlp"]["gate"]["kernel"].addressable_shards[0].data.shape == (2, 4, 24)
    alone = init_state(make_mesh(devices=jax.devices()[:1]), lm, tx, seed=0)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(alone))


def test_global_batches_keep_micro_batches_whole_and_cut_rows():
    mesh = make_mesh(data=2, fsdp=4)
    array = to_global(mesh, np.arange(2 * 8 * 3).reshape(2, 8, 3))
    assert array.sharding.spec == P(None, ("data", "fsdp")) == row_sharding(mesh, axis=1).spec
    assert [s.data.shape for s in array.addressable_shards] == [(2, 1, 3)] * 8
    np.testing.assert_array_equal(array.addressable_shards[3].data[:, 0], np.asarray(array)[:, 3])


def test_over_rows_sees_local_rows_in_a_mesh_and_all_rows_without():
    x, w = jnp.arange(16.0).reshape(16, 1), jnp.full((1,), 2.0)
    seen = []

    def function(x, w):
        seen.append(x.shape)
        return x * w[None], sum_over_rows(jnp.sum(x))

    run = lambda: jax.jit(lambda x, w: over_rows(function, (ROWS, SHARED), (ROWS, SHARED))(x, w))(x, w)
    assert not in_mesh() and rules.in_use(x, "rd") is x
    alone = run()
    with jax.set_mesh(make_mesh(data=2, fsdp=4)), uncached():
        assert in_mesh()
        spread = run()
    assert seen == [(16, 1), (2, 1)]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(spread), jax.device_get(alone))
