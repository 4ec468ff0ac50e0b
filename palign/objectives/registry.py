"""The methods by name.

Adding a method is one pure function in `palign.losses` with its oracle, one line here, and one line in
`configs/methods.py`.
"""

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence

from palign import losses
from palign.objectives.base import Method, Needs, hyper_defaults, union
from palign.objectives.methods import (
    batch_match,
    distillation,
    likelihood,
    listwise,
    margin_means,
    mismatched_value,
    pairwise,
    regression,
    reward_means,
    sequence_distillation,
    sequence_distillation_after_the_first,
    token_distillation,
    unpaired,
)
from palign.objectives.readings import (
    ADVANTAGES,
    ALIGNMENT,
    AVERAGE,
    DESIRABLE,
    LENGTHS,
    LOG_RATIO,
    POLICY,
    POLICY_SHARED,
    POLICY_TAIL,
    REFERENCE_AVERAGE,
    REFERENCE_SHARED,
    REFERENCE_TAIL,
    SCORES,
    SEQUENCE_KL,
    SUMS,
    UNIT_SCALES,
    VALID,
    VALUE,
    VALUES,
    WEIGHTS,
    WIN_RATES,
    chosen,
    column,
    gap,
)

TEACHER, REVERSE, REFERENCE = "teacher", "reverse", "reference"  # roles of frozen models

BCO_SHIFT = reward_means(losses.bco_shift_start, losses.bco_shift, losses.bco_shift_update)
SPA_THRESHOLD = margin_means(losses.spa_history, losses.spa_threshold, losses.spa_remember)

METHODS: dict[str, Method] = {
    # Tokens of the preferred response.
    "sft": likelihood(losses.nll),
    "dft": likelihood(losses.dft),
    # Pairs against a reference.
    "dpo": pairwise(losses.dpo),
    "cdpo": pairwise(losses.cdpo),
    "robust_dpo": pairwise(losses.robust_dpo),
    "ipo": pairwise(losses.ipo, AVERAGE, REFERENCE_AVERAGE),  # as TRL and the authors run it
    "ipo_sum": pairwise(losses.ipo),  # as the paper writes it
    "hinge": pairwise(losses.hinge),
    "ln_dpo": pairwise(losses.ln_dpo, *SUMS, LENGTHS),
    "r_dpo": pairwise(losses.r_dpo, *SUMS, LENGTHS),
    "ld_dpo": pairwise(losses.ld_dpo, POLICY_SHARED, POLICY_TAIL, REFERENCE_SHARED, REFERENCE_TAIL),
    "scaled_dpo": pairwise(losses.scaled_dpo),
    "margin_dpo": pairwise(losses.margin_dpo, *SUMS, SCORES),
    "mm_dpo": pairwise(losses.mm_dpo, *SUMS, SCORES),
    "margin_mse": pairwise(losses.margin_mse, LOG_RATIO, SCORES),
    "rpo": pairwise(losses.rpo),
    "dpop": pairwise(losses.dpop),
    "cal_dpo": pairwise(losses.cal_dpo),
    "f_dpo_forward_kl": pairwise(losses.f_dpo_forward_kl),
    "f_dpo_js": pairwise(losses.f_dpo_js),
    "f_dpo_alpha": pairwise(losses.f_dpo_alpha),
    "tdpo1": pairwise(losses.tdpo1, *SUMS, SEQUENCE_KL),
    "tdpo2": pairwise(losses.tdpo2, *SUMS, SEQUENCE_KL),
    "exo_pair": pairwise(losses.exo_pair),
    "nca_pair": pairwise(losses.nca_pair),
    "apo_zero": pairwise(losses.apo_zero),
    "apo_down": pairwise(losses.apo_down),
    "sppo_hard": pairwise(losses.sppo_hard),
    "discopop": pairwise(losses.discopop),
    "wpo": pairwise(losses.wpo, *SUMS, ALIGNMENT),
    "aot": pairwise(losses.aot, POLICY, statistic=batch_match(losses.aot_matched_margins, *SUMS)),
    "aot_unpaired": pairwise(losses.aot_unpaired, statistic=batch_match(losses.aot_matched_ratios, *SUMS)),
    "spa": pairwise(losses.spa, *SUMS, POLICY, memory=SPA_THRESHOLD),
    "bco_pair": pairwise(losses.bco_pair, memory=BCO_SHIFT),
    # Pairs without a reference.
    "simpo": pairwise(losses.simpo, AVERAGE),
    "alphapo": pairwise(losses.alphapo, AVERAGE),
    "orpo": pairwise(losses.orpo, AVERAGE),
    "cpo": pairwise(losses.cpo, POLICY, chosen(AVERAGE)),
    "slic_hf": pairwise(losses.slic_hf, POLICY, chosen(POLICY)),
    # Thumbs-up and thumbs-down.
    "kto": unpaired(losses.kto, statistic=mismatched_value(losses.kto_kl), mismatched=True),
    "apo_zero_unpaired": unpaired(losses.apo_zero_unpaired),
    "bco": unpaired(losses.bco, *SUMS, DESIRABLE, WEIGHTS, memory=BCO_SHIFT),
    # Ranked lists.
    "plackett_luce": listwise(losses.plackett_luce),
    "lipo_lambda": listwise(losses.lipo_lambda),
    "lipo_pair_logistic": listwise(losses.lipo_pair_logistic),
    "lipo_pair_hinge": listwise(losses.lipo_pair_hinge),
    "lipo_pointwise_mse": listwise(losses.lipo_pointwise_mse, *SUMS, WIN_RATES, VALID),
    "lipo_pointwise_sigmoid": listwise(losses.lipo_pointwise_sigmoid, *SUMS, WIN_RATES, VALID),
    "lipo_softmax": listwise(losses.lipo_softmax, *SUMS, WIN_RATES, VALID),
    "listnet": listwise(losses.listnet),
    "info_nca": listwise(losses.info_nca),
    "nca": listwise(losses.nca),
    "exo": listwise(losses.exo),
    "sppo": listwise(losses.sppo, *SUMS, WIN_RATES, VALID),
    "gpo": listwise(losses.gpo, *SUMS, ADVANTAGES, VALID),
    "pairwise_mse": listwise(losses.pairwise_mse, LOG_RATIO, SCORES, VALID),
    # Reward models: a value head (config.model.value_head).
    "bradley_terry": pairwise(losses.bradley_terry, VALUE),
    "bradley_terry_margin": pairwise(losses.bradley_terry_margin, VALUE, gap(SCORES)),
    "bradley_terry_scaled": pairwise(losses.bradley_terry_scaled, VALUE, gap(SCORES)),
    "bradley_terry_centred": pairwise(losses.bradley_terry_centred, VALUE),
    "masked_regression": regression(losses.masked_regression, column(VALUE), column(SCORES), column(VALID)),
    "gpm": pairwise(losses.gpm, VALUES, UNIT_SCALES),
    # Distributions of frozen models.
    "forward_kl": distillation(losses.forward_kl, TEACHER),
    "reverse_kl": distillation(losses.reverse_kl, TEACHER),
    "generalised_jsd": distillation(losses.generalised_jsd, TEACHER),
    "scaled_jsd": distillation(losses.scaled_jsd, TEACHER),
    "pld": token_distillation(losses.pld, TEACHER),
    "binary_kl_norm": distillation(losses.binary_kl_norm, TEACHER),
    "aligndistil": sequence_distillation(losses.aligndistil, TEACHER, REVERSE),
    "aligndistil_constant": sequence_distillation(losses.aligndistil_constant, TEACHER, REVERSE),
    "aligndistil_capped": sequence_distillation(losses.aligndistil_capped, TEACHER, REVERSE),
    "aligndistil_official": sequence_distillation_after_the_first(losses.aligndistil_official, TEACHER, REVERSE),
    "aligndistil_contrastive": sequence_distillation(losses.aligndistil_contrastive, TEACHER, REVERSE),
    "aligndistil_theorem1": sequence_distillation(losses.aligndistil_theorem1, TEACHER, REFERENCE),
}

# TRL 1.16's names, where they are not ours.
ALIASES: dict[str, str] = {
    "sigmoid": "dpo",
    "sigmoid_norm": "ln_dpo",
    "robust": "robust_dpo",
}

# Names of other libraries and older releases that are no method, and what to write: a change of meaning wants a look.
OLD_METHODS: dict[str, str] = {
    "aot_pair": "it is aot_unpaired, which sorts chosen against rejected log-ratios; aot keeps its meaning",
    "kto_pair": "choose kto, which takes each response by itself, or apo_zero, on pairs and without the KL term",
    "alpha_divergence": "it is f_dpo_alpha, where alpha = 1 - f_alpha_divergence_coef",
    "js_divergence": "it is f_dpo_js",
    "dpo_norm": "it is ln_dpo",
    "nll": "it is sft",
    "slic": "choose slic_hf, without a reference, or hinge, with one",
    "gkd": "choose generalised_jsd, scaled_jsd, forward_kl or reverse_kl",
    "rpo_alpha": "set loss_type to (dpo, sft) and loss_weights to (1, rpo_alpha)",
    "tpo-l": "TPO is not here: there is no third, gold response; simpo is the rest",
    "xpo": "responses are not sampled while training: choose dpo on sampled pairs",
    "nash_md": "responses are not sampled while training: choose sppo on sampled lists",
}


def find_method(name: str) -> Method:
    """The method of that name, palign's or TRL's.

    Raises:
        ValueError: there is none; says which is nearest, or what an old name is now.
    """
    if name in OLD_METHODS:
        raise ValueError(f"config.objective.loss_type: {name!r} is not a method; {OLD_METHODS[name]}")
    own = ALIASES.get(name, name)
    if own not in METHODS:
        raise ValueError(f"config.objective.loss_type: {name!r} is not a method{_nearest(name, [*METHODS, *ALIASES])}")
    return METHODS[own]


def resolve_methods(names: Sequence[str], hyper: Mapping[str, float]) -> list[tuple[str, Method, dict[str, float]]]:
    """Looks the methods up and hands each the hyper-parameters that it takes.

    Raises:
        ValueError: an unknown name, a hyper-parameter that no method takes, or one that is missing.
    """
    resolved = []
    for name in names:
        method = find_method(name)
        given = {key: hyper.get(key, default) for key, default in hyper_defaults(method).items()}
        for key, value in given.items():
            if value is inspect.Parameter.empty:
                raise ValueError(f"config.objective.{key}: {name} has no default for it; set a number")
        resolved.append((name, method, given))
    known = {key for _, _, given in resolved for key in given}
    for key in hyper:
        if key not in known:
            raise ValueError(
                f"config.objective.{key} has no effect on {', '.join(names)}{_nearest(key, known)}; remove it"
            )
    return resolved


def _nearest(name: str, choices: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(choices), n=1)
    return f" (did you mean {near[0]!r}?)" if near else f" (there are: {', '.join(sorted(choices)) or 'none'})"


def needs_of(names: Sequence[str]) -> Needs:
    """What the forward pass must hold for all the named methods."""
    return union(find_method(name).all_needs for name in names)
