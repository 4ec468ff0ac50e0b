"""The methods by name, and how a weighted list of them becomes one objective.

Adding a method is one pure function in `palign.losses` with its oracle, one line here, and one config.
"""

import difflib
import inspect
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from palign import losses
from palign.models.protocol import LanguageModel
from palign.objectives.base import REFERENCE, Method, Objective, hyper_defaults, run_forward
from palign.objectives.methods import (
    distillation,
    likelihood,
    listwise,
    pairwise,
    pairwise_average,
    pairwise_reference_free,
    sequence_distillation,
    token_metrics,
)
from palign.types import Array, Batch, Mean, Terms

TEACHER, REVERSE = "teacher", "reverse"  # roles of frozen models besides the reference

METHODS: dict[str, Method] = {
    "sft": likelihood(losses.nll),
    "dpo": pairwise(losses.dpo),
    "sigmoid": pairwise(losses.dpo),  # TRL's name of dpo
    "ipo": pairwise_average(losses.ipo),  # as TRL and the authors run it
    "ipo_sum": pairwise(losses.ipo),  # as the paper writes it
    "simpo": pairwise_reference_free(losses.simpo),
    "plackett_luce": listwise(losses.plackett_luce),
    "lipo_lambda": listwise(losses.lipo_lambda),
    "forward_kl": distillation(losses.forward_kl, TEACHER),
    "reverse_kl": distillation(losses.reverse_kl, TEACHER),
    "generalised_jsd": distillation(losses.generalised_jsd, TEACHER),
    "scaled_jsd": distillation(losses.scaled_jsd, TEACHER),
    "aligndistil": sequence_distillation(losses.aligndistil, TEACHER, REVERSE),
    "aligndistil_constant": sequence_distillation(losses.aligndistil_constant, TEACHER, REVERSE),
    "aligndistil_capped": sequence_distillation(losses.aligndistil_capped, TEACHER, REVERSE),
    "aligndistil_contrastive": sequence_distillation(losses.aligndistil_contrastive, TEACHER, REVERSE),
    "aligndistil_theorem1": sequence_distillation(losses.aligndistil_theorem1, TEACHER, REFERENCE),
}


def resolve_methods(names: Sequence[str], hyper: Mapping[str, float]) -> list[tuple[str, Method, dict[str, float]]]:
    """Looks the methods up and hands each the hyper-parameters that its loss takes.

    Raises:
        ValueError: an unknown name, a hyper-parameter that no method takes, or one that is missing.
    """
    resolved = []
    for name in names:
        if name not in METHODS:
            raise ValueError(f"config.objective.loss_type: {name!r} is not a method{_nearest(name, METHODS)}")
        accepted = hyper_defaults(METHODS[name])
        given = {key: hyper.get(key, default) for key, default in accepted.items()}
        for key, value in given.items():
            if value is inspect.Parameter.empty:
                raise ValueError(f"config.objective.{key}: {name} has no default for it; set a number")
        resolved.append((name, METHODS[name], given))
    known = {key for _, _, given in resolved for key in given}
    for key in hyper:
        if key not in known:
            raise ValueError(
                f"config.objective.{key} has no effect on {', '.join(names)}{_nearest(key, known)}; remove it"
            )
    return resolved


def _nearest(name, choices):
    near = difflib.get_close_matches(name, list(choices), n=1)
    return f" (did you mean {near[0]!r}?)" if near else f" (there are: {', '.join(sorted(choices)) or 'none'})"


def roles_read(names: Sequence[str]) -> tuple[frozenset[str], bool]:
    """The roles whose distributions the methods read, and whether they read the reference's log-probabilities."""
    methods = [METHODS[name] for name in names]
    return frozenset(role for m in methods for role in m.frozen), any(m.reference for m in methods)


def make_objective(
    lm: LanguageModel,
    loss_type: Sequence[str],
    *,
    loss_weights: Sequence[float] | None = None,
    hyper: Mapping[str, float] | None = None,
    cached_reference: bool = False,
    chunk: int = 512,
) -> Objective:
    """Makes one objective of a weighted list of methods over one forward pass (TRL's `loss_type`, `loss_weights`).

    Args:
        lm: the model that policy and frozen parameters go through.
        loss_type: names in `METHODS`, each once.
        loss_weights: one per method, all 1 by default.
        hyper: hyper-parameters by name; every method that takes one gets it.
        cached_reference: the batch brings the reference's log-probabilities, so `aux` needs no reference.
        chunk: targets per trip of the heads.

    Raises:
        ValueError: unknown names, wrong number of weights, a hyper-parameter without effect.
    """
    weights = _pair_weights(loss_type, loss_weights)
    methods = resolve_methods(loss_type, hyper or {})
    frozen, reference = roles_read(loss_type)
    logps = any(method.logps for _, method, _ in methods)
    if cached_reference and (REFERENCE in frozen or not reference):
        raise ValueError(
            f"config.objective.reference = 'cached': {', '.join(loss_type)} cannot use cached log-probabilities; "
            "use 'live' where a method reads the reference's distributions, 'none' where it reads no reference"
        )

    def counts(batch: Batch) -> dict[str, Array]:
        return {name: method.count(batch) for name, method, _ in methods}

    def loss(params, aux, batch: Batch) -> Terms:
        forward = run_forward(lm, params, aux, batch, logps=logps, reference=reference, frozen=frozen, chunk=chunk)
        terms: dict[str, Array] = {}
        metrics: dict[str, Mean] = token_metrics(forward.tokens, batch) if forward.tokens else {}
        for name, method, given in methods:
            terms[name], more = method.term(method, forward, batch, given)
            metrics |= {key: value for key, value in more.items() if key not in metrics}
            if len(methods) > 1:
                metrics[f"loss/{name}"] = Mean(terms[name], method.count(batch))
        return Terms(terms, jax.tree.map(jax.lax.stop_gradient, metrics))

    live = frozenset() if cached_reference or not reference else frozenset({REFERENCE})
    return Objective(weights, frozen | live, counts, loss)


def _pair_weights(names: Sequence[str], weights: Sequence[float] | None) -> dict[str, float]:
    weights = [1.0] * len(names) if weights is None else list(weights)
    if len(weights) != len(names) or len(set(names)) != len(names) or not names:
        raise ValueError(
            f"config.objective: loss_type has {len(names)} methods ({', '.join(names)}), loss_weights {len(weights)}; "
            "name each method once and give it one weight"
        )
    return dict(zip(names, weights, strict=True))


def total_loss(objective: Objective, terms: Mapping[str, Array], counts: Mapping[str, Array]) -> Array:
    """`sum_i weight_i * term_i / count_i`; a term without anything to count is 0."""
    parts = [w * terms[name] / jnp.maximum(counts[name], 1.0) for name, w in objective.weights.items()]
    return jnp.sum(jnp.stack(parts))
