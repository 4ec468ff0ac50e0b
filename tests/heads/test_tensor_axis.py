"""The vocabulary cut over a tensor axis: the numbers of one device, and only partial results on the wire."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from palign import losses
from palign.heads.target_values import logp_at_targets, target_values, token_values, values_at_targets
from palign.heads.targets import TargetTower, Tower, at_targets
from palign.heads.weighted_sum import weighted_sum
from palign.sharding.mesh import ROWS, TENSOR_AXIS, TOKENS, make_mesh, over_tensor, row_sharding
from palign.types import Unembedding
from tests.compiled import Collective, collectives, shapes_in, uncached
from tests.trees import VOCAB, largest_difference, make_batch, random_trees

R, T, D, PADDED, CUT, CHUNK = 4, 32, 8, 72, 4, 9
PART = PADDED // CUT  # columns of a device; neither R, T, D, CUT nor CHUNK, so that a shape tells what it is
SOFTCAPS = (5.0, None, 3.0)


@functools.cache
def arguments():
    """Weights, a batch, hidden states and kernels of three towers."""
    rng = np.random.default_rng(0)
    hidden = tuple(jnp.asarray(rng.normal(size=(R, T, D)), jnp.float32) for _ in range(3))
    kernels = tuple(jnp.asarray(rng.normal(size=(D, PADDED)), jnp.float32) for _ in range(3))
    weights = jnp.asarray(rng.uniform(0.5, 1.5, (R, T)), jnp.float32)
    return weights, make_batch(random_trees(0, 4, longest=3), rows=R, used=R - 1, tokens=T), hidden, kernels


def towers_of(hidden, kernels):
    return tuple(Tower(x, Unembedding(w, cap, VOCAB)) for x, w, cap in zip(hidden, kernels, SOFTCAPS, strict=False))


def summed(loss, num, reduce_frozen=lambda tower, batch: tower):
    """The weighted sum of a loss with the token metrics beside it, and its gradients."""

    def run(weights, batch, hidden, kernels):
        def total(x, w):
            first, *frozen = towers_of((x, *hidden[1:num]), (w, *kernels[1:num]))
            towers = (first, *(reduce_frozen(tower, batch) for tower in frozen))
            function = lambda token, *z: (loss(*z), values_at_targets(token, z[0]))
            return weighted_sum(function, weights, towers, batch, chunk=CHUNK)

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden[0], kernels[0])

    return run


def recomputed(weights, batch, hidden, kernels):
    """Token values, which DPO and its kin read, and TDPO's divergence, with the pull-back of any cotangent."""

    def values(x, w):
        tokens = token_values(x, Unembedding(w, None, VOCAB), batch, chunk=CHUNK)
        towers = towers_of((x, hidden[1]), (w, kernels[1]))
        return tokens, target_values(lambda token, *z: losses.forward_kl(*z), towers, batch, chunk=CHUNK)

    out, pull_back = jax.vjp(values, hidden[0], kernels[0])
    return out, pull_back(jax.tree.map(lambda _: weights, out))


CASES = {
    "aligndistil": summed(losses.aligndistil, 3),
    "aligndistil, cached teachers": summed(losses.aligndistil, 3, at_targets),
    "reverse_kl": summed(losses.reverse_kl, 2),
    "generalised_jsd": summed(losses.generalised_jsd, 2),
    "recomputed": recomputed,
}


@functools.cache
def on_the_mesh(name, data):
    """Results of a case on `data` times four devices, and the compiled program."""
    mesh = make_mesh(data=data, tensor=CUT, devices=jax.devices()[: data * CUT])
    weights, batch, hidden, kernels = arguments()
    placed = (
        *jax.device_put((weights, batch, hidden), row_sharding(mesh)),
        jax.device_put(kernels, NamedSharding(mesh, P(None, TENSOR_AXIS))),
    )
    with jax.set_mesh(mesh), uncached():
        compiled = jax.jit(CASES[name]).lower(*placed).compile()
        return compiled(*placed), compiled


@pytest.mark.parametrize(("name", "data"), [*((name, 2) for name in CASES), ("recomputed", 1)])
def test_a_cut_vocabulary_gives_the_numbers_of_a_whole_one(name, data):
    got, _ = on_the_mesh(name, data)
    values, gradients = jax.device_get(got)
    expected_values, expected_gradients = jax.jit(CASES[name])(*arguments())
    for value, expected in zip(jax.tree.leaves(values), jax.tree.leaves(expected_values), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6)
    assert largest_difference(gradients, expected_gradients) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_s_gradient_stays_where_the_kernel_is(name):
    (_, (dhidden, dkernel)), _ = on_the_mesh(name, 2)
    assert dkernel.sharding.spec == P(None, TENSOR_AXIS) and dkernel.addressable_shards[0].data.shape == (D, PART)
    assert {s.data.shape for s in dhidden.addressable_shards} == {(R // 2, T, D)}


@pytest.mark.parametrize("name", CASES)
def test_no_collective_has_a_dimension_of_the_vocabulary_or_a_part_of_it(name):
    compiled = on_the_mesh(name, 2)[1]
    assert not any(PADDED in shape for shape in shapes_in(compiled.as_text()))  # no device holds a whole row of logits
    found = collectives(compiled)
    wide = [c for c in found if {PADDED, VOCAB, PART} & set(c.shape)]
    # Over rows, not over the vocabulary: the sum of the kernel's gradient, each device its own columns.
    num_sums = 2 if name == "recomputed" else 1
    assert wide == [Collective("all-reduce", (D, PART))] * num_sums
    # Sums and maxima of the chunk, and what the devices think is the most likely token; the hidden states' gradient.
    small = {(CHUNK,), (CHUNK, 1), (CHUNK, CUT), (CHUNK, D), ()}
    assert {c.shape for c in found if c not in wide} <= small
    assert ("all-reduce", (CHUNK, D)) in found


def cached_policy(weights, batch, hidden, kernels):
    """The differentiated model, too, is there at the targets only."""

    def values(x, w):
        tower = TargetTower(x, Unembedding(w, None, VOCAB))
        return target_values(logp_at_targets, (tower,), batch, chunk=CHUNK)

    out, pull_back = jax.vjp(values, hidden[0], kernels[0])
    return out, pull_back(weights)


@pytest.mark.parametrize("name", ["aligndistil, cached teachers", "cached policy"])
def test_each_target_is_visited_by_the_one_device_that_holds_its_hidden_state(name):
    case = (CASES | {"cached policy": cached_policy})[name]
    mesh = make_mesh(data=2, context=2, tensor=2)
    weights, batch, hidden, kernels = arguments()
    placed = (
        *jax.device_put((weights, batch), row_sharding(mesh)),
        jax.device_put(hidden, NamedSharding(mesh, ROWS if name == "cached policy" else TOKENS)),
        jax.device_put(kernels, NamedSharding(mesh, P(None, TENSOR_AXIS))),
    )
    with jax.set_mesh(mesh), uncached():
        values, gradients = jax.device_get(jax.jit(case)(*placed))
    expected_values, expected_gradients = jax.jit(case)(*arguments())
    for value, expected in zip(jax.tree.leaves(values), jax.tree.leaves(expected_values), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6)
    assert largest_difference(gradients, expected_gradients) < 1e-5


def test_a_vocabulary_that_the_axis_does_not_divide_is_an_error():
    weights, batch, hidden, kernels = arguments()
    narrow = tuple(w[:, :VOCAB] for w in kernels)
    with (
        jax.set_mesh(make_mesh(data=2, tensor=CUT)),
        pytest.raises(ValueError, match=r"heads: mesh axis 'tensor' = 4 does not divide .* 50 columns; .* 52"),
    ):
        jax.eval_shape(CASES["reverse_kl"], weights, batch, hidden, narrow)


def test_a_mesh_has_a_tensor_axis_only_where_it_is_asked_for():
    assert make_mesh(data=2, fsdp=-1, tensor=2).shape == {"data": 2, "fsdp": 2, "tensor": 2}
    assert make_mesh(tensor=1).axis_names == ("data", "fsdp")
    with pytest.raises(ValueError, match=r"config.mesh: data=2, fsdp=1, context=1, tensor=3 does not make 8 devices"):
        make_mesh(data=2, tensor=3)
    # Neighbours share a row's vocabulary: they have the fastest links.
    assert make_mesh(data=2, tensor=4).devices[0, 0].tolist() == jax.devices()[:4]


def test_arrays_are_left_alone_where_there_is_no_tensor_axis():
    x = jnp.ones((2, 4))
    assert over_tensor(x) is x
    with jax.set_mesh(make_mesh(data=8)):
        assert over_tensor(x) is x
