"""Alignment via optimal transport: ranks, the sorted batch, and any split of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palign import losses
from tests.losses.cases.pairwise_shaped import LOG_2, gradient, log_probs
from tests.oracles import pairwise_shaped_losses as oracle


def everyone(policy):
    return np.ones(len(policy), bool)


def test_transport_of_a_single_pair_is_dpo(close):
    policy, reference = (array[:1] for array in log_probs(10))
    dpo = np.float64(losses.dpo(policy, reference, beta=0.2))
    matched = losses.aot_matched_margins(policy, reference, everyone(policy))
    close(losses.aot(policy, matched, beta=0.2), dpo)
    matched = losses.aot_matched_ratios(policy, reference, everyone(policy))
    close(losses.aot_unpaired(policy, reference, matched, beta=0.2), dpo)


def test_the_matched_statistics_are_those_of_counting_ranks(run, close):
    policy, reference = log_probs(11, size=9)
    policy[3], policy[5] = policy[1], policy[1]  # ties
    chosen, rejected = (policy - reference).T
    listed = everyone(policy)
    expected = oracle.of_same_rank(policy[:, 0] - policy[:, 1], reference[:, 0] - reference[:, 1])
    close(run(losses.aot_matched_margins)(policy, reference, listed), expected)
    expected = [oracle.of_same_rank(chosen, rejected), oracle.of_same_rank(rejected, chosen)]
    close(run(losses.aot_matched_ratios)(policy, reference, listed), np.stack(expected, axis=1))


def test_pairs_that_are_not_listed_count_for_nothing_whatever_they_hold(close):
    policy, reference = log_probs(12, size=7)
    listed = np.array([1, 0, 1, 1, 0, 1, 1], bool)
    spoiled = tuple(np.where(listed[:, None], array, np.nan).astype(np.float32) for array in (policy, reference))
    # NaN is sorted behind the others by itself. These are not: first under the policy, last under the reference.
    spoiled[0][1], spoiled[1][1] = (-1e3, 0.0), (1e3, 0.0)
    for match in (losses.aot_matched_margins, losses.aot_matched_ratios):
        alone = np.float64(match(policy[listed], reference[listed], everyone(policy[listed])))
        actual = np.asarray(match(*spoiled, listed))
        close(actual[listed], alone)
        assert not actual[~listed].any()
        assert not np.asarray(match(policy, reference, np.zeros(7, bool))).any()


def test_the_matched_statistics_have_no_gradient():
    policy, reference = log_probs(13)
    for match in (losses.aot_matched_margins, losses.aot_matched_ratios):
        for slope in gradient(lambda p, r, match=match: match(p, r, everyone(p)), policy, reference, argnums=(0, 1)):
            assert not np.asarray(slope).any()


def sorted_paired(policy, reference, epsilon):
    """The paper's loss of the whole batch, differentiated through the sort."""
    gaps = jnp.sort(policy[:, 0] - policy[:, 1]) - jnp.sort(reference[:, 0] - reference[:, 1])
    return ((1 - epsilon) * jax.nn.softplus(-0.2 * gaps) + epsilon * jax.nn.softplus(0.2 * gaps)).sum()


def sorted_unpaired(policy, reference, epsilon):
    gaps = jnp.sort(policy[:, 0] - reference[:, 0]) - jnp.sort(policy[:, 1] - reference[:, 1])
    return ((1 - epsilon) * jax.nn.softplus(-0.2 * gaps) + epsilon * jax.nn.softplus(0.2 * gaps)).sum()


def paired(policy, reference, matched, epsilon):
    return losses.aot(policy, matched, beta=0.2, label_smoothing=epsilon).sum()


def unpaired(policy, reference, matched, epsilon):
    return losses.aot_unpaired(policy, reference, matched, beta=0.2, label_smoothing=epsilon).sum()


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
@pytest.mark.parametrize(
    ("match", "part", "whole"),
    [
        (losses.aot_matched_margins, paired, sorted_paired),
        (losses.aot_matched_ratios, unpaired, sorted_unpaired),
    ],
    ids=["paired", "unpaired"],
)
def test_halves_with_the_statistics_of_the_whole_have_the_value_and_gradient_of_the_sorted_batch(
    match, part, whole, epsilon, close
):
    policy, reference = log_probs(14, size=10)
    matched = match(policy, reference, everyone(policy))
    expected, expected_slopes = jax.jit(jax.value_and_grad(whole))(policy, reference, epsilon)
    value, slopes = 0.0, []
    differentiated = jax.jit(jax.value_and_grad(part))
    for half in (slice(0, 5), slice(5, 10)):
        v, g = differentiated(policy[half], reference[half], matched[half], epsilon)
        value, slopes = value + v, [*slopes, g]
    close(value, np.float64(expected))
    close(np.concatenate(slopes), np.float64(expected_slopes))
    # Statistics of each half by itself are another loss.
    own = sum(
        part(policy[h], reference[h], match(policy[h], reference[h], everyone(policy[h])), epsilon)
        for h in (slice(0, 5), slice(5, 10))
    )
    assert abs(float(own) - float(expected)) > 1e-3


def test_transport_is_blind_to_who_is_paired_with_whom(close):
    policy, reference = log_probs(15)
    order = np.random.default_rng(0).permutation(len(policy))
    # Another reference margin for every pair, the same set of them: the paired form does not see it.
    shuffled = reference[order]
    margins = [losses.aot_matched_margins(policy, r, everyone(policy)) for r in (reference, shuffled)]
    close(margins[0], np.float64(margins[1]))
    # Other rejected responses for every chosen one: the unpaired form does not see it.
    other = (np.stack([array[:, 0], array[order, 1]], axis=1) for array in (policy, reference))
    totals = []
    for p, r in ((policy, reference), tuple(other)):
        totals.append(losses.aot_unpaired(p, r, losses.aot_matched_ratios(p, r, everyone(p))).sum())
    close(totals[0], np.float64(totals[1]))


def test_transport_starts_at_log_2_and_half_smoothing_makes_it_even(close):
    policy, _ = log_probs(16)
    margins = losses.aot_matched_margins(policy, policy, everyone(policy))
    close(losses.aot(policy, margins), np.full(len(policy), LOG_2))
    zeros = losses.aot_matched_ratios(policy, policy, everyone(policy))
    close(losses.aot_unpaired(policy, policy, zeros), np.full(len(policy), LOG_2))
    even = losses.aot(policy, jnp.zeros(len(policy)), label_smoothing=0.5)
    close(losses.aot(policy[:, ::-1], jnp.zeros(len(policy)), label_smoothing=0.5), np.float64(even))
