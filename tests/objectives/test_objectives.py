"""Denominators, mixtures and what an objective refuses."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign import losses
from palign.config.schema import ObjectiveConfig
from palign.data.tokenize import TokenTree
from palign.heads.target_values import target_values
from palign.heads.targets import Tower
from palign.objectives import methods
from palign.objectives.base import hyper_defaults, lengths_by_slot, sum_by_slot
from palign.objectives.compose import make_objective, total_loss
from palign.objectives.registry import METHODS, resolve_methods
from tests.trees import evaluate_objective, make_batch, random_trees, tiny_model


def tree(id, *scored_lengths):
    """A tree of a two-token prompt and responses of `(score, length)`."""
    responses = tuple(np.full(length, 5, np.int32) for _, length in scored_lengths)
    return TokenTree(np.array([3, 4], np.int32), responses, tuple(score for score, _ in scored_lengths), id)


# A pair, a tie, a single response, and a list whose best two are equal.
TREES = [
    tree(0, (1.0, 3), (0.0, 2)),
    tree(1, (1.0, 1), (1.0, 4)),
    tree(2, (0.0, 5)),
    tree(3, (0.5, 2), (2.0, 3), (2.0, 7), (-1.0, 1)),
]


def few(**options):
    return make_batch(TREES, rows=3, used=2, tokens=64, responses=4, trees_cap=3, **options)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (methods.num_pairs, 2),  # a tie makes none, a single response neither
        (methods.num_lists, 2),
        (methods.num_targets, 5 + 5 + 5 + 13),
        (methods.num_preferred_targets, 3 + 1 + 5 + 3),  # the first of equals
        (methods.num_responses, 2 + 2 + 1 + 4),
    ],
)
@pytest.mark.parametrize("layout", ["packed", "unshared"])
def test_denominators_are_counted_by_hand(count, expected, layout):
    assert count(few(layout=layout)) == expected


def test_all_pairs_of_different_scores_are_counted_under_that_policy():
    assert methods.num_pairs(few(pair_policy="all")) == 1 + 0 + 0 + 5


def test_sums_and_lengths_go_to_the_response_that_owns_the_target():
    batch = few()
    lengths = np.asarray(lengths_by_slot(batch))
    assert lengths[0, 1:5].tolist() == [3, 2, 1, 1]  # a response that is not there divides by 1
    assert lengths[1, 5:9].tolist() == [2, 3, 7, 1]
    values = jnp.where(batch.target_slot > 0, batch.target_slot, jnp.nan)  # what padding holds is not read
    sums = np.asarray(sum_by_slot(values, batch))
    assert sums[1, 5:9].tolist() == [5 * 2, 6 * 3, 7 * 7, 8 * 1] and sums[:, 0].tolist() == [0, 0, 0]


def test_every_hyper_parameter_of_every_method_may_be_set_in_a_config():
    for name, method in METHODS.items():
        given = {key: 0.5 for key in hyper_defaults(method)}
        assert ObjectiveConfig(hyper=given).hyper == given
        assert resolve_methods([name], given)[0][2] == given


def test_methods_that_share_a_hyper_parameter_all_get_it():
    resolved = resolve_methods(["dpo", "ipo", "sft"], {"beta": 0.7})
    assert [given for *_, given in resolved] == [{"beta": 0.7}, {"beta": 0.7}, {}]


def test_a_mixture_is_the_weighted_sum_of_its_means_over_one_forward_pass():
    lm, params, other = tiny_model()
    batch = make_batch(random_trees(0, 6), rows=2, used=2)

    def run(names, weights):
        objective = make_objective(lm, names, loss_weights=weights, hyper={}, chunk=16)
        aux = {role: other for role in objective.frozen}

        return jax.jit(functools.partial(evaluate_objective, objective))(params, aux, batch)

    mixed, metrics = run(["dpo", "sft"], [2.0, 0.25])
    dpo, sft = (metrics[f"loss/{name}"].sum / metrics[f"loss/{name}"].count for name in ("dpo", "sft"))
    np.testing.assert_allclose(mixed, 2.0 * dpo + 0.25 * sft, rtol=1e-6)
    np.testing.assert_allclose(run(["sft"], None)[0], sft, rtol=1e-6)  # by the other head, which it uses alone


def test_a_term_without_anything_to_count_is_zero():
    lm, *_ = tiny_model()
    objective = make_objective(lm, ["dpo", "sft"], hyper={"beta": 0.1})
    terms, counts = (
        {"dpo": x, "sft": y} for x, y in ((jnp.float32(0), jnp.float32(6)), (jnp.float32(0), jnp.float32(3)))
    )
    assert total_loss(objective, terms, counts) == 2.0


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ([], {}, r"config.objective: loss_type has 0 methods"),
        (["dpo", "dpo"], {}, r"name each method once"),
        (["dpo", "sft"], dict(loss_weights=[1.0]), r"loss_type has 2 methods \(dpo, sft\), loss_weights 1"),
        (["sft"], dict(cached_reference=True), r"reference = 'cached': sft cannot use .* 'none' where it reads no"),
        (
            ["aligndistil_theorem1"],
            dict(cached_reference=True, hyper={"beta": 0.1}),
            r"'live' where a method reads the reference's distr",
        ),
        (["simpo"], dict(cached_reference=True), r"simpo cannot use cached log-probabilities"),
    ],
)
def test_what_cannot_be_an_objective_is_an_error(names, options, message):
    with pytest.raises(ValueError, match=message):
        make_objective(tiny_model()[0], names, **options)


def test_an_objective_asks_for_the_frozen_models_that_its_methods_read():
    lm, *_ = tiny_model()
    needed = lambda names, **options: make_objective(lm, names, **options).frozen
    assert needed(["sft"]) == needed(["simpo"]) == frozenset()
    assert needed(["dpo", "sft"]) == {"reference"} and needed(["dpo"], cached_reference=True) == frozenset()
    assert needed(["reverse_kl"]) == {"teacher"}
    assert needed(["aligndistil"]) == {"teacher", "reverse"}
    assert needed(["aligndistil_theorem1", "dpo"], hyper={"beta": 0.1}) == {"teacher", "reference"}


def test_every_method_has_hyper_parameters_that_a_keyword_names():
    for method in METHODS.values():
        kinds = {p.kind for p in inspect.signature(method.loss).parameters.values()}
        assert kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


def test_the_official_aligndistil_leaves_out_each_response_s_first_token_and_the_right_one_does_not():
    lm, params, other = tiny_model()
    aux = {"teacher": other, "reverse": jax.tree.map(lambda x: 0.9 * x, other)}
    batch = make_batch(random_trees(3, 4))
    slots = np.asarray(batch.target_slot)
    first = np.zeros(slots.shape, bool)
    for row in range(slots.shape[0]):
        for slot in np.unique(slots[row][slots[row] > 0]):
            first[row, np.flatnonzero(slots[row] == slot)[0]] = True
    # A sum over tokens by hand, from the heads' values at every target.
    towers = [Tower(lm.hidden(p, batch), lm.unembed(p)) for p in (params, aux["teacher"], aux["reverse"])]

    def at_targets(token, *logits):
        return losses.aligndistil(*logits, beta0=0.1, scale=4.0)

    values = np.float64(target_values(at_targets, tuple(towers), batch, chunk=16))
    for name, scale, keep in (("aligndistil", 4.0, slots > 0), ("aligndistil_official", 2.0, (slots > 0) & ~first)):
        objective = make_objective(lm, [name], hyper={"scale": scale}, chunk=16)
        total, _ = evaluate_objective(objective, params, aux, batch)
        means = []
        for row in range(slots.shape[0]):
            for slot in np.unique(slots[row][slots[row] > 0]):
                of_response = keep[row] & (slots[row] == slot)
                means.append(values[row, of_response].mean() if of_response.any() else 0.0)
        np.testing.assert_allclose(total, np.mean(means), rtol=1e-5)
