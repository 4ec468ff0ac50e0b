"""Pairs: other divergences, calibrated targets, weights, transport, noise, and mixtures of losses."""

import jax
import numpy as np

from palign import losses
from tests.losses.cases.case import Case, as_f32, pair_extremes, pair_logps
from tests.oracles import pairwise_shaped_losses as oracle

BIG = 1e4
LOG_2 = np.log(2.0)


# What the tests of single identities use.


def log_probs(seed, size=8):
    """Policy and reference log-probabilities on a grid that float32 subtracts exactly: two `[B, 2]`."""
    rng = np.random.default_rng(seed)
    policy = np.round(-16 * rng.gamma(4.0, 8.0, (size, 2))) / 16
    reference = policy + np.round(16 * rng.normal(0.0, 3.0, (size, 2))) / 16
    return policy.astype(np.float32), reference.astype(np.float32)


def ratios(*pairs):
    """A policy with the given (chosen, rejected) log-ratios against a reference of zeros."""
    policy = np.array(pairs, np.float32)
    return policy, np.zeros_like(policy)


def gradient(loss, *arrays, argnums=0):
    """The gradient of the summed loss with respect to the arrays at `argnums`."""
    return jax.jit(jax.grad(lambda *args: loss(*args).sum(), argnums=argnums))(*arrays)


# Inputs of the cases.


def _near_pairs(rng, size):
    """Log-ratios of a few nats, on a grid that both precisions subtract exactly: exp would show the rounding."""
    policy = np.round(-64 * rng.gamma(4.0, 8.0, (size, 2))) / 64
    return policy, policy + np.round(64 * rng.normal(0.0, 3.0, (size, 2))) / 64


def _with_divergences(rng, size):
    return *pair_logps(rng, size), as_f32(rng.gamma(2.0, 3.0, (size, 2)))


def _extreme_divergences():
    policy, reference = pair_extremes()
    return policy, reference, np.abs(policy[::-1])


def _with_alignment(rng, size):
    return *pair_logps(rng, size), as_f32(rng.normal(-0.2, 0.4, (size, 2)))


def _extreme_alignment():
    policy, reference = pair_extremes()
    return policy, reference, policy[::-1].copy()


def _with_margins(rng, size):
    policy, reference = pair_logps(rng, size)
    return policy, as_f32(rng.permutation(reference[:, 0] - reference[:, 1]))


def _extreme_margins():
    policy, _ = pair_extremes()
    return policy, np.array([BIG, -BIG, BIG, 0.0, -BIG, 0.0])


def _with_ratios(rng, size):
    policy, reference = pair_logps(rng, size)
    return policy, reference, as_f32(rng.permutation(policy - reference)[:, ::-1])


def _with_detection(rng, size):
    policy, reference = pair_logps(rng, size)
    return policy, reference, as_f32(policy + rng.normal(0.0, 4.0, (size, 2))), np.asarray(0.25)


def _extreme_detection():
    policy, reference = pair_extremes()
    return policy, reference, policy[::-1].copy(), np.asarray(-np.inf)


def _two_losses(rng, size):
    return as_f32(rng.gamma(2.0, 1.0, size)), as_f32(rng.gamma(2.0, 1.0, size))


def _extreme_losses():
    return np.array([BIG, -BIG, 0.0]), np.array([-BIG, -BIG, BIG])


def _pairs(loss, expected, arrays=pair_logps, **hyper):
    return Case(loss, expected, "pairwise", arrays, pair_extremes, hyper, stopped=(1,))


CASES: tuple[Case, ...] = (
    _pairs(losses.f_dpo_forward_kl, oracle.f_dpo_forward_kl, _near_pairs, beta=0.3),
    _pairs(losses.f_dpo_js, oracle.f_dpo_js, _near_pairs, beta=0.3),
    _pairs(losses.f_dpo_alpha, oracle.f_dpo_alpha, _near_pairs, beta=0.3, alpha=0.7),
    Case(
        losses.tdpo1,
        oracle.tdpo1,
        "pairwise",
        _with_divergences,
        _extreme_divergences,
        {"beta": 0.3},
        differentiable=(0, 2),
        stopped=(1,),
    ),
    Case(
        losses.tdpo2,
        oracle.tdpo2,
        "pairwise",
        _with_divergences,
        _extreme_divergences,
        {"beta": 0.3, "alpha": 0.7},
        differentiable=(0, 2),
        stopped=(1,),
        checks_gradient=False,  # the baseline is stopped
    ),
    _pairs(losses.exo_pair, oracle.exo_pair, beta=0.3, label_smoothing=0.05),
    _pairs(losses.nca_pair, oracle.nca_pair, beta=0.3),
    _pairs(losses.apo_zero, oracle.apo_zero, beta=0.3),
    _pairs(losses.apo_down, oracle.apo_down, beta=0.3),
    _pairs(losses.sppo_hard, oracle.sppo_hard, beta=0.05),
    Case(losses.wpo, oracle.wpo, "pairwise", _with_alignment, _extreme_alignment, {"beta": 0.3}, stopped=(1, 2)),
    Case(
        losses.aot,
        oracle.aot,
        "pairwise",
        _with_margins,
        _extreme_margins,
        {"beta": 0.3, "label_smoothing": 0.1},
        stopped=(1,),
    ),
    Case(
        losses.aot_unpaired,
        oracle.aot_unpaired,
        "pairwise",
        _with_ratios,
        _extreme_alignment,
        {"beta": 0.3, "label_smoothing": 0.1},
        stopped=(1, 2),
        checks_gradient=False,  # half of the value is stopped
    ),
    _pairs(losses.discopop, oracle.discopop, _near_pairs, beta=0.1, temperature=0.2),
    _pairs(losses.discopop, oracle.discopop, _near_pairs, beta=0.1, temperature=3.0)._replace(name="discopop_wide"),
    Case(
        losses.spa,
        oracle.spa,
        "pairwise",
        _with_detection,
        _extreme_detection,
        {"beta": 0.3, "alpha": 0.2},
        stopped=(1, 2, 3),
        whole=(3,),
    ),
    _pairs(losses.mapl_intra, oracle.mapl_intra, beta=0.3),
    Case(
        losses.bvpo,
        oracle.bvpo,
        "pairwise",
        _two_losses,
        _extreme_losses,
        {"alpha": 0.3},
        differentiable=(0, 1),
    ),
)
