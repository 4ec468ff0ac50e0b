"""Reconstructions, not the papers' letter: losses whose papers' equations could not be read. Do not report their names.

Each follows a description, keeps the identities that must hold whatever the letter is, and may change its values in any
release. `from palign.losses import experimental` brings all of them.
"""

from palign.losses.experimental.f_sft import (
    f_sft_chi2,
    f_sft_forward_kl,
    f_sft_hellinger,
    f_sft_js,
    f_sft_reverse_kl,
)
from palign.losses.experimental.prompt_gaps import mapl_inter
from palign.losses.experimental.rank_list import rank_list, rank_list_lse

__all__ = [
    "f_sft_chi2",
    "f_sft_forward_kl",
    "f_sft_hellinger",
    "f_sft_js",
    "f_sft_reverse_kl",
    "mapl_inter",
    "rank_list",
    "rank_list_lse",
]
