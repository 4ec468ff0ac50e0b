"""Distillation: divergences of next-token distributions, AlignDistil, rankings, raw scores. B is of positions."""

import functools
from collections.abc import Callable, Mapping

import numpy as np

from palign import losses
from tests.losses.cases.case import Arrays, Case, as_f32, list_extremes, list_inputs
from tests.oracles import distill_losses, ranking_distill_losses

VOCAB = 7


def _logits(rng: np.random.Generator, size: int, count: int) -> Arrays:
    """Logits of `count` related models: `[B, V]` each."""
    base = rng.normal(0.0, 2.0, (size, VOCAB))
    return tuple(as_f32(base + rng.normal(0.0, 0.7, base.shape)) for _ in range(count))


def _extreme_logits(count: int) -> Arrays:
    """Gaps of 1e4 in favour of different tokens, none at all, and a token that all models exclude: `[B, V]` each."""
    rows = np.array([[1e4, -1e4, 0.0, -np.inf], [0.0, 0.0, 0.0, -np.inf], [-1e4, 1e4, 1e4, -np.inf]])
    turned = rows[:, [1, 0, 2, 3]]
    return tuple((rows, turned, rows[::-1])[:count])


def _over_logits(loss: Callable, expected: Callable, count: int, hyper: Mapping[str, float]) -> Case:
    return Case(
        loss,
        functools.partial(distill_losses.per_position, expected),
        "distill",
        functools.partial(_logits, count=count),
        functools.partial(_extreme_logits, count),
        hyper,
        stopped=tuple(range(1, count)),
    )


def _with_labels(rng, size):
    return *_logits(rng, size, 2), rng.integers(0, VOCAB, size)


def _extreme_with_labels():
    return *_extreme_logits(2), np.array([1, 0, 2])


def _score_pairs(rng, size):
    return tuple(as_f32(rng.normal(0.0, 2.0, (size, 2))) for _ in range(2))


def _extreme_score_pairs():
    return np.array([[1e4, -1e4], [0.0, 0.0], [-1e4, -1e4]]), np.array([[-1e4, 1e4], [0.0, 0.0], [1e4, 1e4]])


def _score_lists(rng, size):
    policy, _, labels, valid = list_inputs(rng, size)
    return as_f32(policy / 16), labels, valid


def _extreme_score_lists():
    policy, _, labels, valid = list_extremes()
    return policy, labels, valid


def _ranking(loss, arrays, extremes, *, name="", **hyper) -> Case:
    expected = getattr(ranking_distill_losses, loss.__name__)
    return Case(loss, expected, "distill", arrays, extremes, hyper, stopped=(1,), name=name)


CASES: tuple[Case, ...] = (
    _over_logits(losses.forward_kl, distill_losses.forward_kl, 2, {}),
    _over_logits(losses.reverse_kl, distill_losses.kl, 2, {}),
    _over_logits(losses.generalised_jsd, distill_losses.jsd, 2, {"beta": 0.3}),
    _over_logits(losses.scaled_jsd, distill_losses.scaled_jsd, 2, {"beta": 0.3}),
    _over_logits(losses.aligndistil_theorem1, distill_losses.theorem1, 3, {"beta": 0.04, "beta0": 0.1}),
    _over_logits(losses.aligndistil_contrastive, distill_losses.contrastive, 3, {"beta": 0.05, "beta0": 0.1}),
    _over_logits(losses.aligndistil, distill_losses.aligndistil, 3, {"beta0": 0.2, "scale": 10.0, "epsilon": 2e-3}),
    _over_logits(
        losses.aligndistil_official,
        distill_losses.aligndistil_official,
        3,
        {"beta0": 0.2, "scale": 5.0, "epsilon": 2e-3},
    ),
    _over_logits(losses.aligndistil_constant, distill_losses.aligndistil_constant, 3, {"beta0": 0.2, "scale": 5.0}),
    _over_logits(losses.aligndistil_capped, distill_losses.aligndistil_capped, 3, {"beta0": 0.2, "cap": 0.05}),
    _ranking(losses.pld, _with_labels, _extreme_with_labels, temperature=1.5),
    _ranking(losses.pld, _with_labels, _extreme_with_labels, name="pld_top_3", temperature=0.5, top=3),
    _ranking(losses.margin_mse, _score_pairs, _extreme_score_pairs),
    _ranking(losses.pairwise_mse, _score_lists, _extreme_score_lists),
    _ranking(
        losses.binary_kl_norm,
        functools.partial(_logits, count=2),
        functools.partial(_extreme_logits, 2),
        temperature=1.5,
    ),
)
