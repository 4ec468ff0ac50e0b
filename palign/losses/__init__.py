"""Preference losses as pure functions of arrays: jit, vmap and differentiate them anywhere.

Every loss takes arrays by position and hyper-parameters by name, and returns one value per example (or per position):
reduce and weigh as you need. Sequence log-probabilities are in nats, summed over the response tokens unless a
docstring says otherwise. Pairs are `[B, 2]` with column 0 chosen, lists `[B, K]` with a boolean `valid`. Inputs in
bf16 are computed in f32. Nothing but jax, numpy, chex and jaxtyping is imported.
"""

from palign.losses import dense, experimental
from palign.losses.distill import (
    Teacher,
    adaptive_teacher,
    adaptive_weight,
    aligndistil,
    aligndistil_capped,
    aligndistil_constant,
    aligndistil_contrastive,
    aligndistil_official,
    aligndistil_theorem1,
    capped_weight,
    constant_weight,
    contrastive_teacher,
    forward_kl,
    generalised_jsd,
    reverse_kl,
    scaled_jsd,
    theorem1_teacher,
)
from palign.losses.listwise.contrastive import exo, info_nca, listnet, nca
from palign.losses.listwise.lipo import (
    lipo_lambda,
    lipo_pair_hinge,
    lipo_pair_logistic,
    lipo_pointwise_mse,
    lipo_pointwise_sigmoid,
    lipo_softmax,
)
from palign.losses.listwise.plackett_luce import plackett_luce
from palign.losses.listwise.self_play import gpo, sppo
from palign.losses.matching import PromptClassifier, desirable_probability, fit_prompt_classifier, udm_weights
from palign.losses.pairwise.calibrated import apo_down, apo_zero, exo_pair, nca_pair, sppo_hard
from palign.losses.pairwise.discovered import discopop
from palign.losses.pairwise.dpo import dpo, implicit_rewards
from palign.losses.pairwise.f_dpo import f_dpo_alpha, f_dpo_forward_kl, f_dpo_js
from palign.losses.pairwise.hinge import hinge, slic_hf
from palign.losses.pairwise.ipo import ipo
from palign.losses.pairwise.lengths import ld_dpo, ln_dpo, r_dpo
from palign.losses.pairwise.margins import margin_dpo, mm_dpo, mm_dpo_beta, scaled_dpo
from palign.losses.pairwise.mixture import bvpo, bvpo_weight
from palign.losses.pairwise.noise_aware import SpaHistory, spa, spa_history, spa_remember, spa_threshold
from palign.losses.pairwise.prompts import mapl_intra
from palign.losses.pairwise.reference_free import alphapo, cpo, log_odds, orpo
from palign.losses.pairwise.regularised import cal_dpo, dpop, rpo
from palign.losses.pairwise.robust import cdpo, robust_dpo
from palign.losses.pairwise.simpo import simpo
from palign.losses.pairwise.tdpo import tdpo1, tdpo2
from palign.losses.pairwise.transport import aot, aot_matched_margins, aot_matched_ratios, aot_unpaired
from palign.losses.pairwise.weighted import wpo, wpo_weights
from palign.losses.ranking_distill import binary_kl_norm, margin_mse, pairwise_mse, pld
from palign.losses.reward import (
    bradley_terry,
    bradley_terry_centred,
    bradley_terry_margin,
    bradley_terry_scaled,
    gpm,
    gpm_scores,
    masked_regression,
)
from palign.losses.supervised import dft, nll
from palign.losses.unpaired import (
    BcoShift,
    apo_zero_unpaired,
    bco,
    bco_pair,
    bco_shift,
    bco_shift_start,
    bco_shift_update,
    kto,
    kto_kl,
)

__all__ = [
    "BcoShift",
    "PromptClassifier",
    "SpaHistory",
    "Teacher",
    "adaptive_teacher",
    "adaptive_weight",
    "aligndistil",
    "aligndistil_capped",
    "aligndistil_constant",
    "aligndistil_contrastive",
    "aligndistil_official",
    "aligndistil_theorem1",
    "alphapo",
    "aot",
    "aot_matched_margins",
    "aot_matched_ratios",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "apo_zero_unpaired",
    "bco",
    "bco_pair",
    "bco_shift",
    "bco_shift_start",
    "bco_shift_update",
    "binary_kl_norm",
    "bradley_terry",
    "bradley_terry_centred",
    "bradley_terry_margin",
    "bradley_terry_scaled",
    "bvpo",
    "bvpo_weight",
    "cal_dpo",
    "capped_weight",
    "cdpo",
    "constant_weight",
    "contrastive_teacher",
    "cpo",
    "dense",
    "desirable_probability",
    "dft",
    "discopop",
    "dpo",
    "dpop",
    "exo",
    "exo_pair",
    "experimental",
    "f_dpo_alpha",
    "f_dpo_forward_kl",
    "f_dpo_js",
    "fit_prompt_classifier",
    "forward_kl",
    "generalised_jsd",
    "gpm",
    "gpm_scores",
    "gpo",
    "hinge",
    "implicit_rewards",
    "info_nca",
    "ipo",
    "kto",
    "kto_kl",
    "ld_dpo",
    "lipo_lambda",
    "lipo_pair_hinge",
    "lipo_pair_logistic",
    "lipo_pointwise_mse",
    "lipo_pointwise_sigmoid",
    "lipo_softmax",
    "listnet",
    "ln_dpo",
    "log_odds",
    "mapl_intra",
    "margin_dpo",
    "margin_mse",
    "masked_regression",
    "mm_dpo",
    "mm_dpo_beta",
    "nca",
    "nca_pair",
    "nll",
    "orpo",
    "pairwise_mse",
    "plackett_luce",
    "pld",
    "r_dpo",
    "reverse_kl",
    "robust_dpo",
    "rpo",
    "scaled_dpo",
    "scaled_jsd",
    "simpo",
    "slic_hf",
    "spa",
    "spa_history",
    "spa_remember",
    "spa_threshold",
    "sppo",
    "sppo_hard",
    "tdpo1",
    "tdpo2",
    "theorem1_teacher",
    "udm_weights",
    "wpo",
    "wpo_weights",
]
