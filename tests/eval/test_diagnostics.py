"""Diagnostics by name: sums and counts over exactly the listed pairs, whatever padding holds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign.config.schema import ObjectiveConfig
from palign.eval.diagnostics import DIAGNOSTICS, diagnose, needs
from palign.objectives.compose import make_objective
from palign.sharding.mesh import make_mesh
from palign.train.build import diagnosis_of
from tests.oracles import diagnostics as oracle
from tests.trees import evaluate_objective, make_batch, random_trees, tiny_model

BETA, K, WIDTH = 0.5, 3, 4
# One tie of all scores: no pair, and no preference to rank.
TREES = [t._replace(scores=(1.0,) * len(t.responses)) if t.id == 2 else t for t in random_trees(3, 9, responses=(1, K))]


@pytest.fixture(scope="module")
def given():
    """A batch whose last row is empty, and arrays by slot with NaN where there is no response."""
    batch = make_batch(TREES, rows=4, used=3, responses=K, pair_policy="all")
    rng, shape = np.random.default_rng(0), (4, 1 + batch.valid.shape[1] * K)
    absent = np.concatenate([np.ones((4, 1), bool), ~np.asarray(batch.valid).reshape(4, -1)], axis=1)
    policy, reference = (np.where(absent, np.nan, -rng.gamma(4.0, 2.0, shape)) for _ in range(2))
    policy[0, 1:] = np.where(absent[0, 1:], np.nan, np.asarray(batch.scores)[0].reshape(-1) - 9)  # ranked right
    sums = np.where(absent[..., None], np.nan, rng.normal(size=(*shape, WIDTH)))
    lengths = np.where(absent, 0, rng.integers(1, 9, shape))
    kl = np.where(absent, np.nan, rng.gamma(2.0, 1.0, shape))
    return batch, *(np.float32(x) for x in (policy, lengths, reference, sums, kl))


def run(names, given, **more):
    batch, policy, lengths, *others = given
    optional = ("reference_logps", "hidden_sums", "sequence_kl")
    function = jax.jit(
        lambda batch, policy, lengths, *others: diagnose(
            names, policy, lengths, batch, **dict(zip(optional, others, strict=True)), beta=BETA, **more
        )
    )
    return function(batch, policy, lengths, *others)


def at_pairs(by_slot, batch):
    pairs = np.asarray(batch.pairs)
    return np.array([[by_slot[r, slot] for slot in pairs[r, p]] for r, p in np.argwhere(pairs[..., 0] > 0)])


def test_every_diagnostic_is_the_sum_over_the_listed_pairs_of_its_oracle(given):
    batch = given[0]
    policy, lengths, reference, sums = (at_pairs(np.float64(x), batch) for x in given[1:5])
    now, before = oracle.ranking_accuracy(policy), oracle.ranking_accuracy(reference)
    expected = {
        "ches": oracle.ches(sums),
        "ches_normalised": oracle.length_normalised_ches(sums, lengths),
        "ranking_accuracy": now,
        "ranking_accuracy_normalised": oracle.ranking_accuracy(policy / lengths),
        "implicit_reward_accuracy": oracle.implicit_reward_accuracy(policy, reference, BETA),
        "idealised_ranking_accuracy": oracle.idealised_ranking_accuracy(reference, BETA, 1.0),
        "difficulty": reference[:, 1] - reference[:, 0],
        "displacement": policy[:, 0] - reference[:, 0],
        "displacement_rejected": policy[:, 1] - reference[:, 1],
        "displaced": policy[:, 0] < reference[:, 0],
        "turned_right": now & ~before,
        "turned_wrong": before & ~now,
    }
    lists = (given[1][:, 1:].reshape(-1, K), *(np.asarray(x).reshape(-1, K) for x in (batch.scores, batch.valid)))
    kept = [max(s[v], default=0) > min(s[v], default=0) for s, v in zip(*lists[1:], strict=True)]
    expected["full_ranking_accuracy"] = oracle.full_ranking_accuracy(*(x[kept] for x in lists))
    expected["kl"] = given[5][:, 1:].reshape(-1)[np.asarray(batch.valid).reshape(-1)]
    found = run(tuple(DIAGNOSTICS), given)
    assert set(found) == set(DIAGNOSTICS) == {f"diagnostics/{name}" for name in expected}
    for name, values in expected.items():
        mean = found[f"diagnostics/{name}"]
        assert mean.count == len(values) > 3, name
        assert mean.sum == pytest.approx(np.sum(values), rel=1e-5, abs=1e-4), name
        assert np.std(values) > 0, f"{name}: the case cannot tell one pair from another"


def test_what_is_not_read_need_not_be_given(given):
    batch, policy, lengths, *_ = given
    plain = ("diagnostics/ranking_accuracy", "diagnostics/full_ranking_accuracy")
    assert not any(needs(plain))
    assert diagnose(plain, policy, lengths, batch) == run(plain, given)
    assert needs(("diagnostics/ches",)) == (False, True, False)
    assert needs(("diagnostics/displaced",)) == (True, False, False)
    assert diagnose((), policy, lengths, batch) == {}


def test_a_batch_without_pairs_counts_nothing(given):
    batch, *arrays = given
    none = batch._replace(pairs=jnp.zeros_like(batch.pairs), valid=jnp.zeros_like(batch.valid))
    for name, mean in run(tuple(DIAGNOSTICS), (none, *arrays)).items():
        assert (mean.sum, mean.count) == (0.0, 0.0), name


def test_no_gradient_flows_through_diagnostics_on_one_device_or_several(given):
    batch, policy, lengths, reference, sums = (jnp.nan_to_num(x) if i else x for i, x in enumerate(given[:5]))

    def total(policy, sums):
        means = diagnose(
            ("diagnostics/ches", "diagnostics/displacement"),
            policy,
            lengths,
            batch,
            reference_logps=reference,
            hidden_sums=sums,
        )
        return sum(mean.sum for mean in means.values())

    alone, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(policy, sums)
    assert alone != 0 and not any(gradient.any() for gradient in gradients)
    with jax.set_mesh(make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])):
        together, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(policy, sums)
    assert together == pytest.approx(float(alone), rel=1e-5) and not any(gradient.any() for gradient in gradients)


def test_wrong_arguments_are_answered_with_their_name(given):
    batch, policy, lengths, _, sums, _ = given
    with pytest.raises(ValueError, match=r"'diagnostics/chess' is not a diagnostic \(did you mean 'diagnostics/ches'"):
        needs(("diagnostics/chess",))
    with pytest.raises(ValueError, match="'xyz' is not a diagnostic; there are diagnostics/ches, "):
        diagnose(("xyz",), policy, lengths, batch)
    with pytest.raises(ValueError, match="diagnose: hidden_sums is None, and diagnostics/ches read it"):
        diagnose(("diagnostics/ches",), policy, lengths, batch)
    with pytest.raises(ValueError, match="diagnose: reference_logps is None, and diagnostics/displaced read it"):
        diagnose(("diagnostics/displaced",), policy, lengths, batch)
    plain = ("diagnostics/ranking_accuracy",)
    with pytest.raises(
        ValueError, match=r"diagnose: policy_logps has shape \[4, 24\]; expected \[4, 25\], one for each"
    ):
        diagnose(plain, policy[:, 1:], lengths, batch)
    with pytest.raises(ValueError, match=r"diagnose: lengths has shape \[25\]"):
        diagnose(plain, policy, lengths[0], batch)
    with pytest.raises(ValueError, match=r"diagnose: hidden_sums has shape \[4, 25\]; expected \[4, 25, D\]"):
        diagnose(("diagnostics/ches",), policy, lengths, batch, hidden_sums=sums[..., 0])


def test_the_kl_that_is_logged_is_that_of_full_softmaxes_at_every_token():
    lm, params, reference = tiny_model()
    settings = ObjectiveConfig(loss_type=("dpo",), diagnostics=("diagnostics/kl",))
    objective = make_objective(lm, ["dpo"], chunk=16, diagnosis=diagnosis_of(settings))
    assert objective.frozen == {"reference"}
    batch = make_batch(random_trees(5, 3))
    _, metrics = evaluate_objective(objective, params, {"reference": reference}, batch)

    logps = []
    for weights in (params, reference):
        kernel, _, size = lm.unembed(weights)
        logits = np.float64(lm.hidden(weights, batch)) @ np.float64(kernel)
        logps.append(np.float64(jax.nn.log_softmax(logits[..., :size], axis=-1)))
    at_column = (np.exp(logps[0]) * (logps[0] - logps[1])).sum(-1)
    listed = np.asarray(batch.target_slot) > 0
    total = np.take_along_axis(at_column, np.asarray(batch.target_source), axis=1)[listed].sum()
    found = metrics["diagnostics/kl"]
    assert found.count == np.asarray(batch.valid).sum()
    np.testing.assert_allclose(found.sum, total, rtol=1e-5)
    with pytest.raises(ValueError, match="reference = 'cached': diagnostics/kl reads the reference's whole"):
        diagnosis_of(dataclasses.replace(settings, reference="cached"))
