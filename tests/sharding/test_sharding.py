"""Where parameters and the optimizer's copies of them live."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from palign.config.schema import LoraConfig, OptimizerConfig
from palign.models.lora import add_lora
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


def factors_of(config):
    return jax.eval_shape(add_lora(make_language_model(config), LoraConfig(rank=2)).init, jax.random.key(0))


@pytest.mark.parametrize(
    "shapes", [shapes_of(TINY), shapes_of(EVERYTHING), factors_of(TINY)], ids=["tiny", "everything", "lora"]
)
def test_every_parameter_matches_exactly_one_rule_that_names_all_its_axes(shapes):
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        assert len(rules.logical_axes(rules.path_name(path))) == leaf.ndim


def test_every_rule_is_used():
    everything = jax.tree_util.tree_leaves_with_path((shapes_of(EVERYTHING), factors_of(EVERYTHING)))
    names = [rules.path_name(path[1:]) for path, _ in everything]
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


def test_a_tensor_axis_cuts_heads_feed_forward_width_and_vocabulary():
    expected = {
        "embedding": P("tensor", "fsdp"),
        "unembedding": P("fsdp", "tensor"),
        "value_head/kernel": P("fsdp", None),
        "layers/attention/output/kernel": P(None, "tensor", None, "fsdp"),
        "layers/mlp/gate/kernel": P(None, "fsdp", "tensor"),
        "layers/mlp/up/kernel": P(None, "fsdp", "tensor"),
        "layers/mlp/down/kernel": P(None, "tensor", "fsdp"),
    }
    for name in ("query", "key", "value"):
        expected[f"layers/attention/{name}/kernel"] = P(None, "fsdp", "tensor", None)
        expected[f"layers/attention/{name}/bias"] = P(None, "tensor", None)
    shardings = rules.parameter_shardings(make_mesh(data=2, fsdp=2, tensor=2), shapes_of(EVERYTHING))
    for path, sharding in jax.tree_util.tree_leaves_with_path(shardings):
        name = rules.path_name(path)
        if name.endswith("scale"):
            assert not any(sharding.spec), name
        else:
            assert sharding.spec == expected.pop(name), name
    assert not expected


def test_key_heads_stay_whole_where_the_tensor_axis_does_not_divide_them():
    shardings = rules.parameter_shardings(make_mesh(data=2, tensor=4), shapes_of(EVERYTHING))
    attention = shardings["layers"]["attention"]
    assert attention["query"]["kernel"].spec == P(None, "fsdp", "tensor", None)
    assert attention["key"]["kernel"].spec == attention["value"]["kernel"].spec == P(None, "fsdp", None, None)
    assert attention["key"]["bias"].spec == P(None, None, None)


def test_a_mesh_cuts_along_the_axes_that_it_has():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    assert rules.parameter_shardings(mesh, shapes_of(TINY))["embedding"].spec == P(None, "fsdp")


def test_a_parameter_that_an_axis_would_cut_twice_is_an_error(monkeypatch):
    monkeypatch.setitem(rules.MESH_AXES, "embed", "tensor")
    message = "parameter 'embedding': mesh axis 'tensor' would cut both 'vocab' and 'embed'; give one of them another"
    with pytest.raises(ValueError, match=message):
        rules.parameter_shardings(make_mesh(data=4, tensor=2), shapes_of(TINY))


@pytest.mark.parametrize(
    ("options", "mesh", "message"),
    [
        (dict(dim=12, num_heads=2, num_key_heads=1), dict(fsdp=8), "fsdp = 8 .* 'embed' of .*, 12 long; choose a"),
        ({}, dict(tensor=8), "tensor = 8 .* 'heads' of parameter 'layers/attention/output/kernel', 4 long; choose"),
        (dict(hidden_dim=26), dict(tensor=4), "tensor = 4 .* 'mlp' of parameter 'layers/mlp/down/kernel', 26 long"),
        (dict(vocab_multiple=2), dict(tensor=4), "'vocab' of parameter 'embedding', 50 long; .* config.model.vocab_"),
    ],
)  # fmt: skip
def test_an_axis_that_the_mesh_does_not_divide_is_an_error_that_says_where(options, mesh, message):
    shapes = shapes_of(dataclasses.replace(TINY, **options))
    with pytest.raises(ValueError, match=f"^config.mesh..*{message}"):
        rules.parameter_shardings(make_mesh(**mesh), shapes)


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
    with pytest.raises(ValueError, match=r"config.mesh: data and fsdp are -1, and only one can be inferred"):
        make_mesh(data=-1, fsdp=-1)


@dataclasses.dataclass(frozen=True)
class Device:
    """What the order of devices is decided by."""

    id: int
    slice_index: int
    platform: str
    device_kind: str = "of a test"
    process_index: int = 0


def two_slices(platform):
    return [Device(i, slice_index=i % 2, platform=platform) for i in range(8)]


@pytest.mark.parametrize(
    ("given", "slices"),
    [
        (dict(fsdp=4, dcn_data=2), [[0, 0, 0, 0], [1, 1, 1, 1]]),
        (dict(data=2, fsdp=4, dcn_fsdp=2), [[0, 0, 1, 1], [0, 0, 1, 1]]),
        (dict(data=1, fsdp=-1, dcn_fsdp=2), [[0, 0, 0, 0, 1, 1, 1, 1]]),
    ],
)
def test_an_axis_goes_round_a_slice_before_it_goes_to_the_next(given, slices):
    grid = make_mesh(**given, devices=two_slices("cpu")).devices
    assert [[device.slice_index for device in row] for row in grid] == slices


@pytest.mark.parametrize(
    ("given", "devices", "message"),
    [
        (dict(dcn_data=2), None, "dcn_data=2, dcn_fsdp=1 is for 2 slices, and the devices form 1; expected 1"),
        (dict(), two_slices("tpu"), "dcn_data=1, dcn_fsdp=1 is for 1 slices, and the devices form 2; expected 2"),
        (dict(data=1, fsdp=8, dcn_data=2), two_slices("tpu"), "dcn_data = 2: expected a divisor of data = 1"),
    ],
)
def test_slices_that_the_axes_do_not_span_are_an_error(given, devices, message):
    with pytest.raises(ValueError, match=f"config.mesh.*{message}"):
        make_mesh(**given, devices=devices)


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
