"""The reconstructions: RankList, MAPL's comparison between samples, supervised losses from f-divergences."""

import numpy as np

from palign.losses import experimental
from tests.losses.cases.case import Case, as_f32, list_extremes, list_inputs
from tests.oracles import experimental_losses as oracle


def lists(rng, size):
    """Scores, labels with ties, `valid`: three `[B, K]`."""
    policy, _, labels, valid = list_inputs(rng, size)
    return as_f32(policy / 8), labels, valid


def _extreme_lists():
    scores, _, labels, valid = list_extremes()
    return np.where(valid, scores, np.nan), np.where(valid, labels, np.nan), valid


def _prompt_pairs(rng, size):
    policy = -rng.gamma(4.0, 8.0, (size, 2, 2))
    return as_f32(policy), as_f32(policy + rng.normal(0.0, 6.0, policy.shape))


def _extreme_prompt_pairs():
    policy = np.array([[[1e4, -1e4], [-1e4, 1e4]], [[-1e4, 1e4], [1e4, -1e4]], [[0.0, 0.0], [0.0, 0.0]]])
    return policy, np.zeros_like(policy)


def demonstrations(rng, size):
    """Policy and reference `[B]`, on a grid that both precisions subtract exactly: log-ratios on all branches."""
    policy = -np.round(64 * rng.gamma(4.0, 2.0, size)) / 64
    return policy, policy - np.round(64 * rng.normal(0.0, 4.0, size)) / 64


def _extreme_demonstrations():
    policy = np.array([1e4, -1e4, 0.0, -7.0])
    return policy, np.array([0.0, 0.0, 0.0, -7.0])


def _f_sft(loss) -> Case:
    expected = getattr(oracle, loss.__name__)
    arrays, extremes = demonstrations, _extreme_demonstrations
    return Case(loss, expected, "experimental", arrays, extremes, {"beta": 0.3}, stopped=(1,))


def _ranked(loss, *, name="", **hyper) -> Case:
    expected = getattr(oracle, loss.__name__)
    return Case(loss, expected, "experimental", lists, _extreme_lists, hyper, stopped=(1,), name=name)


F_SFT = (
    experimental.f_sft_chi2,
    experimental.f_sft_hellinger,
    experimental.f_sft_reverse_kl,
    experimental.f_sft_forward_kl,
    experimental.f_sft_js,
)
CASES: tuple[Case, ...] = (
    _ranked(experimental.rank_list),
    _ranked(experimental.rank_list, name="rank_list_3_skips", skips=3, margin=0.5),
    _ranked(experimental.rank_list_lse),
    Case(
        experimental.mapl_inter,
        oracle.mapl_inter,
        "experimental",
        _prompt_pairs,
        _extreme_prompt_pairs,
        {"beta": 0.3},
        stopped=(1,),
    ),
    *(_f_sft(loss) for loss in F_SFT),
)
