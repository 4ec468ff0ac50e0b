"""Scoring given responses: their log-probabilities, and how far a policy has moved from a reference along them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from palign.data.loader import Dataset
from palign.data.pack import row_shape
from palign.data.plan import plan_evaluation, row_needs
from palign.data.tokenize import TokenTree
from palign.eval.per_target import per_target
from palign.heads.target_values import target_logps, target_values
from palign.heads.targets import Tower
from palign.losses import reverse_kl
from palign.models.protocol import LanguageModel


def as_dataset(trees: Sequence[TokenTree], *, row_length: int, rows_per_step: int, block: int = 64) -> Dataset:
    """Trees that nobody has planned yet, as a data set that is gone through once."""
    responses = max(len(tree.responses) for tree in trees)
    shape = row_shape(row_length, responses=responses, block=block)
    needs = row_needs(trees, layout="packed", pair_policy="best_worst")
    plan = plan_evaluation(needs, shape, rows_per_step=rows_per_step)
    return Dataset(trees, shape, plan, "best_worst", "packed", 0)


def token_logps(lm: LanguageModel, params: Any, dataset: Dataset, mesh: Mesh) -> list[tuple[np.ndarray, ...]]:
    """Log-probability of every token of every response, nats: for each example K arrays `[tokens]`."""
    return per_target(dataset, _logps(lm), params, mesh)


def sequence_logps(lm: LanguageModel, params: Any, dataset: Dataset, mesh: Mesh) -> list[np.ndarray]:
    """Log-probability of every response, nats: one array `[K]` for each example."""
    return [_sums(tree) for tree in token_logps(lm, params, dataset, mesh)]


def sequence_kl(lm: LanguageModel, params: Any, reference: Any, dataset: Dataset, mesh: Mesh) -> list[np.ndarray]:
    """`sum_t KL(policy || reference)` at every token of every response, nats: one array `[K]` for each example.

    On responses drawn from the policy its mean is the sequence-level KL(policy || reference), with less variance than
    the log-ratio of the draws.
    """
    return [_sums(tree) for tree in per_target(dataset, _divergence(lm), (params, reference), mesh)]


@functools.cache
def _logps(lm: LanguageModel) -> Callable:
    def logps(params, batch):
        return target_logps(lm.hidden(params, batch), lm.unembed(params), batch)

    return logps


@functools.cache
def _divergence(lm: LanguageModel) -> Callable:
    def divergence(both, batch):
        towers = tuple(Tower(lm.hidden(params, batch), lm.unembed(params)) for params in both)
        return target_values(lambda _, policy, other: reverse_kl(policy, other), towers, batch)

    return divergence


def _sums(tree: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.asarray([values.sum(dtype=np.float64) for values in tree])


def ranked_right(logps: Sequence[np.ndarray], scores: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the best- and worst-scored response of every example that has a preference."""
    kept = [(lp, np.asarray(s)) for lp, s in zip(logps, scores, strict=True) if max(s) > min(s)]
    return (
        np.asarray([lp[s.argmax()] for lp, s in kept]),
        np.asarray([lp[s.argmin()] for lp, s in kept]),
    )
