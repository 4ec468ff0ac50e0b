"""The training step: the same update however the batch is laid out, and nothing in it that does not scale."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from palign.data.pack import stack_rows
from palign.data.pieces import in_pieces
from palign.heads.target_values import target_logps
from palign.models.transformer import make_language_model
from palign.objectives.base import Context, Objective
from palign.objectives.compose import make_objective
from palign.sharding.mesh import SHARED, make_mesh, to_global
from palign.train.state import init_state, new_state, state_shardings
from palign.train.step import make_eval_step, make_train_step
from palign.types import Terms
from tests.compiled import collectives, largest_buffer, uncached
from tests.trees import TINY, largest_difference, make_batch, random_trees

# A vocabulary so large that logits of all targets would be the largest array by far; no other size is 3.
MODEL = dataclasses.replace(TINY, vocab_size=500, num_layers=3)
ROWS, TOKENS, BLOCK, CHUNK = 16, 128, 16, 16
TX = optax.sgd(0.1, momentum=0.9)  # its momentum after one step is the gradient
# Micro-batches, data, fsdp, context, tensor.
LAYOUTS = {"1x16": (1, 1, 1, 1, 1), "2x8": (2, 1, 1, 1, 1), "4x4": (4, 1, 1, 1, 1), "8x2": (8, 1, 1, 1, 1)}
MIXED = (1, 2, 2, 1, 2)
PIECES = (1, 2, 1, 2, 2)
FAST_MESHES = {
    "data=2, fsdp=4": (2, 2, 4, 1, 1),
    "data=2, fsdp=2, tensor=2": MIXED,
    "data=2, context=2, tensor=2": PIECES,
}
MESHES = FAST_MESHES | {
    "data=8": (2, 8, 1, 1, 1),
    "fsdp=8": (1, 1, 8, 1, 1),
    "data=4, tensor=2": (2, 4, 1, 1, 2),
    "fsdp=2, tensor=4": (1, 1, 2, 1, 4),
    "fsdp=2, context=4": (2, 1, 2, 4, 1),
    "context=8": (1, 1, 1, 8, 1),
}
EVERY_MESH = [pytest.param(name, marks=() if name in FAST_MESHES else pytest.mark.slow) for name in MESHES]
ROW_MESHES = [each for each in EVERY_MESH if MESHES[each.values[0]][3:] == (1, 1)]  # neither context nor tensor


class Run(NamedTuple):
    """A compiled step and where its arguments go."""

    step: Any
    lm: Any
    mesh: Any
    shardings: Any
    aux_shardings: Any
    micro_batches: int
    arguments: tuple  # of `build`

    def batch(self, rows):
        split = lambda x: x.reshape(self.micro_batches, -1, *x.shape[1:])
        pieces = self.mesh.shape.get("context", 1)
        dealt = [in_pieces(jax.tree.map(lambda x, r=r: np.asarray(x[r]), rows), BLOCK, pieces) for r in range(ROWS)]
        return to_global(self.mesh, jax.tree.map(split, stack_rows(dealt)))

    def state(self, params):
        return jax.device_put(new_state(jax.tree.map(jnp.copy, params), TX), self.shardings)

    def aux(self, **models):
        return jax.device_put(models, {role: self.aux_shardings for role in models})

    def __call__(self, rows, *, state=None, **models):
        policy, reference = params()
        models = models or ({} if rows.reference_logps is not None else {"reference": reference})
        state = self.state(policy) if state is None else state
        step = self.step if self.mesh.size == 1 else program(*self.arguments)
        with jax.set_mesh(self.mesh):
            return step(state, self.aux(**models), self.batch(rows))


@functools.cache
def params():
    """Two different sets of parameters, on the host; predictions are confident."""
    init = jax.jit(make_language_model(MODEL).init)
    loud = lambda path, x: np.asarray(20 * x if "embedding" in str(path) else x)
    return tuple(jax.tree_util.tree_map_with_path(loud, init(jax.random.key(seed))) for seed in (0, 1))


@functools.cache
def rows(num=24, seed=0):
    """Ragged trees with one to five responses; three rows are empty. One response makes no pair but has targets."""
    made = make_batch(
        random_trees(seed, num, responses=(1, 5)), rows=ROWS, used=13, tokens=TOKENS, responses=5, block=BLOCK
    )
    return jax.tree.map(np.asarray, made)


@functools.cache
def build(micro_batches=1, data=1, fsdp=1, context=1, tensor=1, cached=False):
    """The step of `dpo` (a mean over pairs) and half an `sft` (a mean over tokens)."""
    remat = "full" if fsdp > 1 else "none"  # gathers inside what is recomputed
    lm = make_language_model(dataclasses.replace(MODEL, remat=remat))
    sizes = dict(data=data, fsdp=fsdp, context=context, tensor=tensor)
    mesh = make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
    shardings = state_shardings(mesh, lm, TX)
    objective = make_objective(
        lm, ["dpo", "sft"], loss_weights=[1.0, 0.5], hyper={"beta": 0.1}, chunk=CHUNK, cached_reference=cached
    )
    aux_shardings = {} if cached else {"reference": shardings.params}
    step = make_train_step(objective, TX, mesh, shardings, aux_shardings)
    return Run(step, lm, mesh, shardings, shardings.params, micro_batches, (micro_batches, *sizes.values()))


@functools.cache
def result(*arguments):
    state, metrics = jax.device_get(build(*arguments)(rows()))
    return state, {name: mean.sum / mean.count for name, mean in metrics.items()}


def assert_same_update(got, expected):
    (state, metrics), (expected_state, expected_metrics) = got, expected
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-6)
    assert largest_difference(state.opt_state, expected_state.opt_state) < 1e-5  # the gradient
    assert largest_difference(state.params, expected_state.params) < 1e-6
    assert metrics.keys() == expected_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[name], rtol=2e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("layout", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("2x8", "4x4")), "8x2"])
def test_micro_batches_do_not_change_the_update_of_a_mixture(layout):
    per_micro = [
        (pairs[..., 0] > 0).sum() / (slot > 0).sum()
        for pairs, slot in zip(np.split(rows().pairs, 4), np.split(rows().target_slot, 4), strict=True)
    ]
    assert np.ptp(per_micro[:3]) > 0.01  # the two denominators do not grow alike
    assert_same_update(result(*LAYOUTS[layout]), result(*LAYOUTS["1x16"]))


@pytest.mark.parametrize("mesh", EVERY_MESH)
def test_eight_devices_make_the_update_that_one_makes(mesh):
    assert_same_update(result(*MESHES[mesh]), result(*LAYOUTS["1x16"]))


@functools.cache
def five_steps(*arguments):
    """Losses, example ids and the last parameters of five steps, each on other trees, through one program."""
    run, state = build(*arguments), build(*arguments).state(params()[0])
    losses, example_ids = [], []
    for seed in range(5):
        before, (state, metrics) = state, run(rows(24, seed), state=state)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))  # donated
        losses.append(float(metrics["loss"].sum))
        example_ids.append(np.asarray(run.batch(rows(24, seed)).example_id).reshape(ROWS, -1))
    return losses, example_ids, jax.device_get(state.params)


@pytest.mark.parametrize("mesh", EVERY_MESH)
def test_eight_devices_take_the_five_steps_that_one_takes(mesh):
    (losses, example_ids, after), (expected, expected_ids, expected_after) = (
        five_steps(*arguments) for arguments in (MESHES[mesh], LAYOUTS["1x16"])
    )
    np.testing.assert_array_equal(example_ids, expected_ids)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert len(set(losses)) == 5 and largest_difference(after, params()[0]) > 1e-2
    assert largest_difference(after, expected_after) < 1e-5


@functools.cache
def program(*arguments):
    run = build(*arguments)
    policy, reference = params()
    with jax.set_mesh(run.mesh), uncached():
        return run.step.compiled.lower(run.state(policy), run.aux(reference=reference), run.batch(rows())).compile()


def kind_of(shape):
    return tuple(sorted(n for n in shape if n != 1))  # a kernel or its transpose


def parts_of(arguments, name):
    """Kinds of what a device holds of some parameters, of one layer at a time, once fsdp has gathered them."""

    def part(leaf, sharding):
        spec = P(*(axis if axis == "tensor" else None for axis in sharding.spec))
        return kind_of(NamedSharding(sharding.mesh, spec).shard_shape(leaf.shape)[name == "layers" :])

    trees = params()[0][name], build(*arguments).shardings.params[name]
    return {part(*both) for both in zip(*map(jax.tree.leaves, trees), strict=True)}


@pytest.mark.parametrize("mesh", ROW_MESHES)
def test_devices_exchange_parameters_gradients_and_numbers_but_no_activations(mesh):
    arguments = MESHES[mesh]
    layer, embedding = parts_of(arguments, "layers"), parts_of(arguments, "embedding")
    found = collectives(program(*arguments))
    assert {c.kind for c in found} <= {"all-gather", "all-reduce", "reduce-scatter"}
    gathered = {kind_of(c.shape) for c in found if c.kind == "all-gather"}
    assert gathered <= layer | embedding and bool(gathered) == (arguments[2] > 1)  # never a stack of layers
    summed = {kind_of(c.shape) for c in found if c.kind != "all-gather"}
    assert layer < summed <= layer | embedding | {()}


def test_over_a_tensor_axis_devices_add_up_partial_sums_and_gather_no_activations():
    found = collectives(program(*MIXED))
    # Embedding, attention and feed-forward of policy and reference; attention again, recomputed for the backward pass;
    # and back through query, key, value, gate and up. TPU's compiler makes two of these five.
    hidden = [c.kind for c in found if c.shape == (ROWS // 4, TOKENS, MODEL.dim)]
    assert hidden == ["all-reduce"] * (2 * 3 + 1 + 5)
    gathered = {kind_of(c.shape) for c in found if c.kind == "all-gather"}
    assert gathered <= parts_of(MIXED, "layers") | parts_of(MIXED, "embedding")


def test_over_a_context_axis_devices_gather_keys_and_values_and_no_other_activations():
    found = collectives(program(*PIECES))
    _, data, _, context, tensor = PIECES
    local = (ROWS // data, TOKENS // context)
    keys = (ROWS // data, TOKENS, MODEL.num_key_heads // tensor, MODEL.head_width)
    # Keys and values: policy and reference, and for the backward pass of the policy.
    gathered = [kind_of(c.shape) for c in found if c.kind == "all-gather"]
    assert gathered.count(kind_of(keys)) == 2 * 3 and set(gathered) == {kind_of(keys)}
    # Their gradients, added up and scattered.
    scattered = [c.shape for c in found if c.kind == "reduce-scatter"]
    assert scattered == [(*local, *keys[2:])] * 2
    # What a tensor axis adds up is a piece of the rows.
    hidden = [c.kind for c in found if c.shape == (*local, MODEL.dim)]
    assert hidden == ["all-reduce"] * (2 * 3 + 5)
    assert not any(c.shape[:2] == (ROWS // data, TOKENS) and MODEL.dim in c.shape[2:] for c in found)


@pytest.mark.parametrize("layout", ["1x16", *EVERY_MESH])
def test_no_buffer_holds_the_logits_of_all_targets(layout):
    micro_batches, data, fsdp, context, tensor = arguments = (LAYOUTS | MESHES)[layout]
    local_rows = ROWS // micro_batches // (data * fsdp)
    assert largest_buffer(program(*arguments)) < local_rows * TOKENS * MODEL.vocab_size // (context * tensor)


def test_batches_of_any_size_run_through_one_compilation():
    run = build()
    losses = [float(run(rows(num, seed))[1]["loss"].sum) for num, seed in ((24, 0), (3, 1), (30, 2), (0, 3))]
    assert run.step.compiled._cache_size() == 1
    assert len(set(losses)) == 4 and losses[-1] == 0  # without anything to count a term is 0


def test_an_empty_batch_changes_no_parameter():
    state, metrics = build()(rows(0, 3))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), params()[0])
    assert metrics["grad_norm"].sum == 0 and state.nonfinite == 0


def test_the_state_is_donated_and_the_frozen_model_is_not():
    run = build()
    policy, reference = params()
    state, aux = run.state(policy), run.aux(reference=reference)
    new, _ = run.step(state, aux, run.batch(rows()))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(aux["reference"]), reference)
    assert new.step == 1 and largest_difference(jax.device_get(new.params), policy) > 1e-4


def test_the_reference_gets_no_gradient():
    lm = make_language_model(MODEL)
    objective = make_objective(lm, ["dpo"], hyper={"beta": 0.1}, chunk=CHUNK)
    nothing = Context({}, {})
    loss = lambda reference, policy, batch: objective.loss(policy, {"reference": reference}, batch, nothing).terms[
        "dpo"
    ]
    policy, reference = params()
    gradient = jax.jit(jax.grad(loss))(reference, policy, rows())
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("layout", ["1x16", *EVERY_MESH])
def test_a_policy_that_equals_its_reference_has_loss_log_2_and_rewards_0(layout):
    policy, _ = params()
    _, metrics = build(*(LAYOUTS | MESHES)[layout])(rows(), reference=policy)
    values = {name: np.float32(mean.sum) / np.float32(mean.count) for name, mean in metrics.items()}
    num_pairs = metrics["loss/dpo"].count
    assert num_pairs == (rows().pairs[..., 0] > 0).sum() > 10
    np.testing.assert_allclose(values["loss/dpo"], math.log(2), rtol=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert values[name] == 0, name
    np.testing.assert_allclose(values["loss"], values["loss/dpo"] + 0.5 * values["loss/sft"], rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_of_one_such_pair_is_log_2_to_the_last_bit(seed):
    tree = random_trees(seed, 1, responses=(2, 5))
    one = make_batch(tree, rows=ROWS, used=1, tokens=TOKENS, responses=5)
    _, metrics = build()(jax.tree.map(np.asarray, one), reference=params()[0])
    assert metrics["loss/dpo"].count == 1 and metrics["loss/dpo"].sum == np.float32(math.log(2))


@functools.cache
def reference_logps():
    run, (_, reference) = build(), params()
    logps = jax.jit(lambda p, b: target_logps(run.lm.hidden(p, b), run.lm.unembed(p), b, chunk=CHUNK))
    return np.asarray(logps(reference, rows()))


def test_cached_reference_log_probabilities_do_what_a_live_reference_does():
    state, metrics = jax.device_get(build(cached=True)(rows()._replace(reference_logps=reference_logps())))
    assert_same_update((state, {n: m.sum / m.count for n, m in metrics.items()}), result(*LAYOUTS["1x16"]))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(poison):
    run = build(cached=True)
    good = rows()._replace(reference_logps=reference_logps())
    slots = np.flatnonzero(good.target_slot[0] == good.pairs[0, 0, 0])
    bad = good._replace(reference_logps=good.reference_logps.copy())
    bad.reference_logps[0, slots] = poison  # of a preferred response
    state, _ = run(good)
    before = jax.device_get(state)
    for failures in (1, 2):
        state, metrics = run(bad, state=state)
        assert not np.isfinite(metrics["loss"].sum)
        after = jax.device_get(state)
        jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (before.params, before.opt_state))
        assert after.nonfinite == failures and after.step == 1 + failures
    state, _ = run(good, state=state)
    assert state.nonfinite == 0 and largest_difference(jax.device_get(state.params), before.params) > 1e-6


def test_parameters_that_are_not_finite_are_reported_and_kept():
    policy, _ = params()
    broken = policy | {"embedding": policy["embedding"].copy()}
    broken["embedding"][5] = np.nan
    run = build()
    state, metrics = run(rows(), state=run.state(broken))
    assert state.nonfinite == 1 and not np.isfinite(metrics["grad_norm"].sum)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), broken)


def test_a_copied_policy_can_be_trained_beside_the_model_that_it_came_from():
    run, (policy, _) = build(), params()
    frozen = run.aux(reference=policy)
    state = init_state(run.mesh, run.lm, TX, seed=0, params=frozen["reference"])
    run.step(state, frozen, run.batch(rows()))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen["reference"]), policy)


def test_evaluation_adds_up_over_micro_batches_and_agrees_with_training():
    run = build(2)
    lm, mesh = run.lm, run.mesh
    objective = make_objective(lm, ["dpo", "sft"], loss_weights=[1.0, 0.5], hyper={"beta": 0.1}, chunk=CHUNK)
    evaluate = make_eval_step(objective, mesh, run.shardings.params, {"reference": run.aux_shardings})
    policy, reference = params()
    metrics = evaluate(policy, {}, run.aux(reference=reference), run.batch(rows()))
    trained = result(*LAYOUTS["1x16"])[1]
    for name in ("loss/dpo", "loss/sft", "rewards/margins", "rewards/accuracies", "entropy"):
        np.testing.assert_allclose(metrics[name].sum / metrics[name].count, trained[name], rtol=2e-6, err_msg=name)
    assert metrics["entropy"].count == (rows().target_slot > 0).sum()
    assert metrics["loss/dpo"].count == (rows().pairs[..., 0] > 0).sum()


def test_gradients_of_bfloat16_parameters_are_added_up_in_float32():
    """A hundred equal gradients: a sum kept in bfloat16 drifts by whole per cents."""
    objective = Objective(
        weights={"linear": 1.0},
        frozen=frozenset(),
        counts=lambda batch: {"linear": jnp.float32(0)},
        loss=lambda params, aux, batch, context: Terms({"linear": 1e-3 * params["embedding"][0, 0]}, {}, {}),
    )
    mesh = make_mesh(devices=jax.devices()[:1])
    bf16 = {"embedding": jnp.zeros((2, 2), jnp.bfloat16)}
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, SHARED), new_state(bf16, TX))
    step = make_train_step(objective, TX, mesh, shardings, {})
    hundred = to_global(mesh, jax.tree.map(lambda x: np.stack([x[:1]] * 100), rows()))
    _, metrics = step(jax.device_put(new_state(bf16, TX), shardings), {}, hundred)
    np.testing.assert_allclose(metrics["grad_norm"].sum, 100 * float(jnp.bfloat16(1e-3)), rtol=1e-6)
