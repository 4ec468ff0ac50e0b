"""Single responses, desirable or not: KTO, its anchored relative, and binary classifiers."""

import numpy as np

from palign import losses
from tests.losses.cases.case import Case, as_f32, pair_extremes, pair_logps
from tests.oracles import unpaired_losses as oracle


def responses(rng, size):
    """Policy, reference, desirable: three `[B]`."""
    policy, reference = (array[:, 0] for array in pair_logps(rng, size))
    return policy, reference, rng.random(size) < 0.5


def _extreme_responses():
    """Log-ratios of +-1e4 and of nothing, each of a desirable and of an undesirable response."""
    policy = np.repeat([1e4, -1e4, 0.0], 2)
    return policy, np.zeros_like(policy), np.tile([True, False], 3)


def _with_kl(rng, size):
    return *responses(rng, size), np.asarray(1.75)


def _extreme_with_kl():
    return *_extreme_responses(), np.asarray(1e4)


def _with_weights(rng, size):
    return *responses(rng, size), as_f32(rng.uniform(0.5, 10.0, size)), np.asarray(-0.625)


def _extreme_with_weights():
    return *_extreme_responses(), np.tile([10.0, 0.0, 0.5], 2), np.asarray(-1e3)


def _pairs_with_shift(rng, size):
    return *pair_logps(rng, size), np.asarray(0.375)


def _extreme_pairs_with_shift():
    return *pair_extremes(), np.asarray(1e3)


CASES: tuple[Case, ...] = (
    Case(
        losses.kto,
        oracle.kto,
        "unpaired",
        _with_kl,
        _extreme_with_kl,
        {"beta": 0.3, "desirable_weight": 1.25, "undesirable_weight": 0.75},
        stopped=(1, 3),
        whole=(3,),
    ),
    Case(
        losses.apo_zero_unpaired,
        oracle.apo_zero_unpaired,
        "unpaired",
        responses,
        _extreme_responses,
        {"beta": 0.3},
        stopped=(1,),
    ),
    Case(
        losses.bco,
        oracle.bco,
        "unpaired",
        _with_weights,
        _extreme_with_weights,
        {"beta": 0.3},
        stopped=(1, 3, 4),
        whole=(4,),
    ),
    Case(
        losses.bco_pair,
        oracle.bco_pair,
        "unpaired",
        _pairs_with_shift,
        _extreme_pairs_with_shift,
        {"beta": 0.3},
        stopped=(1, 2),
        whole=(2,),
    ),
)
