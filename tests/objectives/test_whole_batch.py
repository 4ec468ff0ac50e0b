"""Statistics of the whole batch and what methods remember: the same update however the batch is cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from palign import losses
from palign.data.tokenize import add_mismatched
from palign.objectives.base import sum_by_slot
from palign.objectives.compose import make_objective
from palign.objectives.readings import PAIRS, approval, mismatched
from palign.sharding.mesh import make_mesh, to_global
from palign.train.state import init_state, state_shardings
from palign.train.step import make_train_step
from tests.compiled import uncached
from tests.trees import largest_difference, make_batch, random_trees, tiny_model

TX = optax.sgd(0.1, momentum=0.9)  # its momentum after one step is the gradient
ROWS = 8


@functools.cache
def trees():
    made = random_trees(3, 20, responses=(1, 3))
    # A single response of every third tree is a thumbs-down.
    made = [t._replace(scores=(1.0 - 2.0 * (i % 3 == 0),)) if len(t.scores) == 1 else t for i, t in enumerate(made)]
    return add_mismatched(made, max_length=24)[0]


@functools.cache
def rows():
    return jax.tree.map(np.asarray, make_batch(trees(), rows=ROWS, used=7, responses=4))


def update(name, micro_batches, devices=1, steps=2):
    lm, policy, reference = tiny_model()
    mesh = make_mesh(data=devices, devices=jax.devices()[:devices])
    objective = make_objective(lm, [name], chunk=16)
    shardings = state_shardings(mesh, lm, TX, objective.init_carry)
    step = make_train_step(objective, TX, mesh, shardings, {"reference": shardings.params})
    state = init_state(mesh, lm, TX, seed=0, params=policy, init_carry=objective.init_carry)
    aux = {"reference": jax.device_put(reference, shardings.params)}
    batch = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), rows())
    for _ in range(steps):
        state, metrics = step(state, aux, to_global(mesh, batch))
    return jax.device_get((state, metrics["loss"].sum))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("aot_unpaired", "bco")]


@pytest.mark.parametrize("name", ["kto", "aot", "spa", *SLOW])
def test_micro_batches_do_not_change_the_update(name):
    whole, loss = update(name, 1)
    cut, other = update(name, 4)
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    assert largest_difference(cut.opt_state, whole.opt_state) < 1e-5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), cut.carry, whole.carry)


@pytest.mark.parametrize("name", ["kto", *SLOW])
def test_eight_devices_do_not_change_the_update(name):
    with uncached():
        spread, loss = update(name, 1, devices=8)
    whole, expected = update(name, 1)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert largest_difference(spread.opt_state, whole.opt_state) < 1e-5


def logps_by_slot():
    from palign.heads.target_values import target_logps

    lm, policy, reference = tiny_model()
    batch = jax.tree.map(jnp.asarray, rows())
    return [
        np.asarray(sum_by_slot(target_logps(lm.hidden(p, batch), lm.unembed(p), batch), batch), np.float64)
        for p in (policy, reference)
    ]


def test_kto_s_loss_is_that_of_the_whole_batch_computed_by_hand():
    policy, reference = logps_by_slot()
    ratio = (policy - reference)[:, 1:].reshape(rows().valid.shape)
    kl = max(0.0, ratio[np.asarray(mismatched(rows()))].mean())
    verdict = np.asarray(approval(rows()))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    per = np.where(verdict > 0, 1 - sigmoid(0.1 * (ratio - kl)), 1 - sigmoid(0.1 * (kl - ratio)))
    _, loss = update("kto", 4, steps=1)
    np.testing.assert_allclose(loss, per[verdict != 0].mean(), rtol=1e-5)


def test_aot_sorts_over_the_whole_batch():
    policy, reference = (np.asarray(PAIRS.take(jnp.asarray(x), rows())) for x in logps_by_slot())
    listed = np.asarray(PAIRS.counted(rows()))
    ours, theirs = (np.sort((x[:, 0] - x[:, 1])[listed]) for x in (policy, reference))
    _, loss = update("aot", 4, steps=1)
    np.testing.assert_allclose(loss, np.logaddexp(0, -0.1 * (ours - theirs)).mean(), rtol=1e-5)


def test_bco_s_shift_follows_the_rewards_of_earlier_steps():
    policy, reference = logps_by_slot()
    rewards = 0.1 * (policy - reference)[:, 1:].reshape(rows().valid.shape)
    verdict = np.asarray(approval(rows()))
    state, _ = update("bco", 4, steps=1)
    expected = (rewards[verdict > 0].mean() + rewards[verdict < 0].mean()) / 2
    np.testing.assert_allclose(losses.bco_shift(state.carry["bco"]), expected, rtol=1e-4)


def test_thumbs_are_told_by_sign_or_by_the_midpoint():
    batch = rows()
    verdict = np.asarray(approval(batch))
    single = batch.valid.sum(-1) == 1
    assert (verdict[single][batch.valid[single]] == np.sign(batch.scores[single][batch.valid[single]])).all()
    pair = batch.valid.sum(-1) == 2
    assert (np.sort(verdict[pair][batch.valid[pair]].reshape(-1, 2), axis=1) == [-1, 1]).all()
    assert not verdict[np.asarray(mismatched(batch))].any()


def test_the_mismatched_response_is_the_next_example_s_and_is_not_learned():
    given = trees()
    for i, tree in enumerate(given):
        own = given[(i + 1) % len(given)]
        added = tree.responses[-1]
        source = own.responses[i % len(own.scores)]
        assert np.array_equal(added, source[: added.size]) and tree.prompt.size + added.size <= 24
    assert mismatched(rows()).sum() == len(given)
    with pytest.raises(ValueError, match="at least two records"):
        add_mismatched(given[:1], max_length=24)
