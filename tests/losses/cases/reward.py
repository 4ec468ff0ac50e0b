"""Reward models: Bradley-Terry and its margins, graded attributes, general preferences."""

import numpy as np

from palign import losses
from tests.losses.cases.case import Case, as_f32
from tests.oracles import reward_losses as oracle


def _rewards(rng, size):
    return (as_f32(rng.normal(0.0, 2.0, (size, 2))),)


def _extreme_rewards():
    return (np.array([[1e4, -1e4], [-1e4, 1e4], [1e4, 1e4], [0.0, 0.0]]),)


def _with_margins(rng, size):
    return *_rewards(rng, size), as_f32(rng.uniform(0.0, 3.0, size))


def _extreme_with_margins():
    return *_extreme_rewards(), np.array([3.0, 1e4, 0.0, 1e4])


def _grades(rng, size, *, attributes=4):
    valid = rng.random((size, attributes)) < 0.7
    if size > 1:
        valid[0] = False
    predictions, targets = (as_f32(rng.normal(2.0, 1.5, (size, attributes))) for _ in range(2))
    return predictions, np.where(valid, targets, np.nan), valid


def _extreme_grades():
    predictions = np.array([[1e4, -1e4], [1e4, np.nan], [np.nan, np.nan]])
    return predictions, np.array([[-1e4, -1e4], [0.0, np.nan], [np.nan, np.inf]]), ~np.isnan(predictions)


def vectors(rng, size, *, responses=2, pairs=3):
    """Embeddings `[B, responses, 2 pairs]` and positive scales `[B, pairs]`."""
    return as_f32(rng.normal(0.0, 1.0, (size, responses, 2 * pairs))), as_f32(rng.uniform(0.2, 2.0, (size, pairs)))


def _extreme_vectors():
    embeddings = np.array([[[1e4, 1.0], [-1e4, 1.0]], [[-1e4, 1e4], [1e4, 1e4]], [[0.0, 0.0], [0.0, 0.0]]])
    return embeddings, np.ones((3, 1))


CASES: tuple[Case, ...] = (
    Case(losses.bradley_terry, oracle.bradley_terry, "reward", _rewards, _extreme_rewards),
    Case(
        losses.bradley_terry_margin,
        oracle.bradley_terry_margin,
        "reward",
        _with_margins,
        _extreme_with_margins,
        stopped=(1,),
    ),
    Case(
        losses.bradley_terry_scaled,
        oracle.bradley_terry_scaled,
        "reward",
        _with_margins,
        _extreme_with_margins,
        stopped=(1,),
    ),
    Case(
        losses.bradley_terry_centred,
        oracle.bradley_terry_centred,
        "reward",
        _rewards,
        _extreme_rewards,
        {"coefficient": 0.05},
    ),
    Case(losses.masked_regression, oracle.masked_regression, "reward", _grades, _extreme_grades, stopped=(1,)),
    Case(losses.gpm_scores, oracle.gpm_scores, "reward", vectors, _extreme_vectors, differentiable=(0, 1)),
    Case(losses.gpm, oracle.gpm, "reward", vectors, _extreme_vectors, {"temperature": 0.5}, differentiable=(0, 1)),
)
