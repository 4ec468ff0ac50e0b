"""Pairs: logistic losses, their robust, weighted and reference-free relatives."""

import jax
import jax.numpy as jnp
import numpy as np

from palign import losses
from tests.losses.cases.case import Case, as_f32, pair_averages, pair_extremes, pair_logps
from tests.oracles import pairwise_losses as oracle

LOG_2 = np.log(2.0)

# Beside the rows of pair_extremes: empty and very long responses, scores far apart and equal.
EXTREME_LENGTHS = np.array([[0, 10_000], [10_000, 0], [0, 7], [1, 1], [0, 0], [0, 0]])
EXTREME_SCORES = np.array([[1e4, -1e4], [-1e4, 1e4], [1e4, -1e4], [0.0, 0.0], [1.0, 1.0], [-1e4, -1e4]])


# What the tests of single identities use.


def log_probs(seed, size=24):
    """`pair_logps` in float32, by seed."""
    return tuple(np.float32(array) for array in pair_logps(np.random.default_rng(seed), size))


def averages(seed, size=24):
    """Log-probabilities per token of pairs: `[B, 2]`, f32."""
    return np.float32(pair_averages(np.random.default_rng(seed), size)[0])


def lengths_of(seed, size=24):
    """Numbers of tokens, none 0: `[B, 2]`, int."""
    return np.random.default_rng(seed).integers(1, 60, (size, 2))


def at_margin(h):
    """A pair whose chosen response gained h / 2 nats and whose rejected one lost as many, and its reference."""
    h = jnp.atleast_1d(jnp.asarray(h, jnp.float32))
    return jnp.stack([h / 2, -h / 2], axis=-1), jnp.zeros((h.size, 2))


def gradient_of(loss, policy, *rest, **hyper):
    """The gradient of the summed loss with respect to its first array."""
    return np.asarray(jax.grad(lambda policy: loss(policy, *rest, **hyper).sum())(policy))


# Inputs of the cases.


def _averages(rng, size):
    return pair_averages(rng, size)[:1]


def _policy_extremes():
    return pair_extremes()[:1]


def _with_chosen(rng, size):
    """Summed log-probabilities of pairs and the average of one response: `[B, 2]`, `[B]`."""
    return pair_logps(rng, size)[0], as_f32(-rng.gamma(4.0, 0.4, size))


def _with_chosen_extremes():
    policy = pair_extremes()[0]
    return policy, policy[:, 0]


def _with_lengths(rng, size):
    lengths = rng.integers(1, 60, (size, 2))
    lengths[:2, 0] = 0
    return *pair_logps(rng, size), lengths


def _with_lengths_extremes():
    return *pair_extremes(), EXTREME_LENGTHS


def _with_scores(rng, size):
    """The chosen response mostly, but not always, with the higher score."""
    return *pair_logps(rng, size), as_f32(rng.normal([1.0, 0.0], 1.5, (size, 2)))


def _with_scores_extremes():
    return *pair_extremes(), EXTREME_SCORES


def _shared_and_tail(rng, size):
    """Only one response of a pair has a tail."""
    policy, reference = pair_logps(rng, size)
    policy_tail, reference_tail = pair_logps(rng, size)
    longer = rng.integers(0, 2, (size, 1)) == np.arange(2)
    return policy, np.where(longer, policy_tail, 0.0), reference, np.where(longer, reference_tail, 0.0)


def _shared_and_tail_extremes():
    policy, reference = pair_extremes()
    return policy, policy[::-1], reference, reference


SMOOTHED = {"beta": 0.3, "label_smoothing": 0.2}

CASES: tuple[Case, ...] = (
    Case(losses.dpo, oracle.dpo, "pairwise", pair_logps, pair_extremes, {"beta": 0.3}, stopped=(1,)),
    Case(losses.ipo, oracle.ipo, "pairwise", pair_logps, pair_extremes, {"beta": 0.2}, stopped=(1,)),
    Case(losses.simpo, oracle.simpo, "pairwise", _averages, _policy_extremes, {"beta": 2.5, "gamma": 1.2}),
    Case(losses.cdpo, oracle.cdpo, "pairwise", pair_logps, pair_extremes, SMOOTHED, stopped=(1,)),
    Case(losses.robust_dpo, oracle.robust_dpo, "pairwise", pair_logps, pair_extremes, SMOOTHED, stopped=(1,)),
    Case(losses.hinge, oracle.hinge, "pairwise", pair_logps, pair_extremes, {"beta": 0.2}, stopped=(1,)),
    Case(
        losses.slic_hf,
        oracle.slic_hf,
        "pairwise",
        _with_chosen,
        _with_chosen_extremes,
        {"delta": 2.0, "regularisation": 0.3},
        differentiable=(0, 1),
    ),
    Case(losses.ln_dpo, oracle.ln_dpo, "pairwise", _with_lengths, _with_lengths_extremes, {"beta": 3.0}, stopped=(1,)),
    Case(
        losses.r_dpo,
        oracle.r_dpo,
        "pairwise",
        _with_lengths,
        _with_lengths_extremes,
        {"beta": 0.3, "alpha": 0.02},
        stopped=(1,),
    ),
    Case(
        losses.ld_dpo,
        oracle.ld_dpo,
        "pairwise",
        _shared_and_tail,
        _shared_and_tail_extremes,
        {"beta": 0.3, "alpha": 0.4},
        differentiable=(0, 1),
        stopped=(2, 3),
    ),
    Case(
        losses.scaled_dpo,
        oracle.scaled_dpo,
        "pairwise",
        pair_logps,
        lambda: pair_extremes()[::-1],
        {"beta": 0.3, "gamma": 0.25},
        stopped=(1,),
    ),
    Case(
        losses.margin_dpo,
        oracle.margin_dpo,
        "pairwise",
        _with_scores,
        _with_scores_extremes,
        {"beta": 0.3, "alpha": 0.5},
        stopped=(1, 2),
    ),
    Case(
        losses.mm_dpo,
        oracle.mm_dpo,
        "pairwise",
        _with_scores,
        _with_scores_extremes,
        {"beta": 0.2, "weight": 0.7, "rate": 0.9},
        stopped=(1, 2),
    ),
    Case(
        losses.cpo,
        oracle.cpo,
        "pairwise",
        _with_chosen,
        _with_chosen_extremes,
        {"beta": 0.3, "alpha": 0.6},
        differentiable=(0, 1),
    ),
    Case(losses.orpo, oracle.orpo, "pairwise", _averages, _policy_extremes, {"weight": 0.4}),
    Case(
        losses.alphapo,
        oracle.alphapo,
        "pairwise",
        _averages,
        _policy_extremes,
        {"beta": 2.5, "gamma": 0.5, "alpha": 0.25},
    ),
    Case(
        losses.alphapo,
        oracle.alphapo,
        "pairwise",
        _averages,
        _policy_extremes,
        {"beta": 2.5, "gamma": 0.5, "alpha": -0.5},
        name="alphapo_negative",
    ),
    Case(losses.rpo, oracle.rpo, "pairwise", pair_logps, pair_extremes, {"beta": 0.3, "eta": 0.2}, stopped=(1,)),
    Case(losses.dpop, oracle.dpop, "pairwise", pair_logps, pair_extremes, {"beta": 0.2, "penalty": 5.0}, stopped=(1,)),
    Case(
        losses.cal_dpo,
        oracle.cal_dpo,
        "pairwise",
        pair_logps,
        pair_extremes,
        {"beta": 0.05, "coefficient": 0.3},
        stopped=(1,),
    ),
)
