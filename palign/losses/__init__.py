"""Preference losses as pure functions of arrays: jit, vmap and differentiate them anywhere.

Every loss takes arrays by position and hyper-parameters by name, and returns one value per example (or per position):
reduce and weigh as you need. Sequence log-probabilities are in nats, summed over the response tokens unless a
docstring says otherwise. Pairs are `[B, 2]` with column 0 chosen, lists `[B, K]` with a boolean `valid`. Inputs in
bf16 are computed in f32. Nothing but jax, numpy, chex and jaxtyping is imported.
"""

from palign.losses import dense
from palign.losses.distill import (
    Teacher,
    adaptive_teacher,
    adaptive_weight,
    aligndistil,
    aligndistil_capped,
    aligndistil_constant,
    aligndistil_contrastive,
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
from palign.losses.listwise import lipo_lambda, plackett_luce
from palign.losses.pairwise.dpo import dpo, implicit_rewards
from palign.losses.pairwise.ipo import ipo
from palign.losses.pairwise.simpo import simpo
from palign.losses.supervised import nll

__all__ = [
    "Teacher",
    "adaptive_teacher",
    "adaptive_weight",
    "aligndistil",
    "aligndistil_capped",
    "aligndistil_constant",
    "aligndistil_contrastive",
    "aligndistil_theorem1",
    "capped_weight",
    "constant_weight",
    "contrastive_teacher",
    "dense",
    "dpo",
    "forward_kl",
    "generalised_jsd",
    "implicit_rewards",
    "ipo",
    "lipo_lambda",
    "nll",
    "plackett_luce",
    "reverse_kl",
    "scaled_jsd",
    "simpo",
    "theorem1_teacher",
]
