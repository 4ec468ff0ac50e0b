"""How a weighted list of methods becomes one objective."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from palign.models.protocol import LanguageModel, Params
from palign.objectives.base import (
    REFERENCE,
    Context,
    Forward,
    Method,
    Needs,
    Objective,
    call,
    keywords,
    run_forward,
    union,
)
from palign.objectives.methods import token_metrics
from palign.objectives.registry import needs_of, resolve_methods
from palign.types import Array, Batch, Mean, Terms


class Diagnosis(NamedTuple):
    """More metrics from the same forward pass.

    Attributes:
        measure: `(forward, batch) -> {name: Mean}`, without gradient.
        needs: what it reads.
    """

    measure: Callable[[Forward, Batch], dict[str, Mean]]
    needs: Needs


class _Named(NamedTuple):
    """A method of the list, with its hyper-parameters."""

    name: str
    method: Method
    hyper: dict[str, float]


def make_objective(
    lm: LanguageModel,
    loss_type: Sequence[str],
    *,
    loss_weights: Sequence[float] | None = None,
    hyper: Mapping[str, float] | None = None,
    cached_reference: bool = False,
    chunk: int = 512,
    diagnosis: Diagnosis | None = None,
) -> Objective:
    """Makes one objective of a weighted list of methods over one forward pass (TRL's `loss_type`, `loss_weights`).

    Args:
        lm: the model that policy and frozen parameters go through.
        loss_type: names in `METHODS`, each once.
        loss_weights: one per method, all 1 by default.
        hyper: hyper-parameters by name; every method that takes one gets it.
        cached_reference: the batch brings the reference's log-probabilities, so `aux` needs no reference.
        chunk: targets per trip of the heads.
        diagnosis: more metrics.

    Raises:
        ValueError: unknown names, wrong number of weights, a hyper-parameter without effect.
    """
    weights = _pair_weights(loss_type, loss_weights)
    methods = [_Named(*resolved) for resolved in resolve_methods(loss_type, hyper or {})]
    needs = needs_of(loss_type)
    _check_reference(loss_type, needs, cached_reference)
    live = frozenset({REFERENCE}) if needs.reference and not cached_reference else frozenset()
    needs |= diagnosis.needs if diagnosis else Needs()
    measured = {named.name: (named.method, named.method.statistic) for named in methods if named.method.statistic}

    def loss(params: Params, aux: Mapping[str, Params], batch: Batch, context: Context) -> Terms:
        forward = run_forward(lm, params, aux, batch, needs, chunk=chunk)
        return _terms(methods, forward, batch, context, diagnosis)

    def statistics(params: Params, aux: Mapping[str, Params], batch: Batch) -> dict[str, Any]:
        asked = union(statistic.needs for _, statistic in measured.values())
        forward = run_forward(lm, params, aux, batch, asked, chunk=chunk)
        return {name: statistic.measure(method, forward, batch) for name, (method, statistic) in measured.items()}

    return Objective(
        weights=weights,
        frozen=needs.frozen | live,
        counts=lambda batch: {name: method.count(batch) for name, method, _ in methods},
        loss=loss,
        statistics=statistics if measured else None,
        combine=lambda stacked: {name: statistic.combine(stacked[name]) for name, (_, statistic) in measured.items()},
        init_carry=lambda: {name: method.memory.start() for name, method, _ in methods if method.memory},
        update_carry=lambda carry, seen: _remember(methods, carry, seen),
    )


def _terms(
    methods: Sequence[_Named], forward: Forward, batch: Batch, context: Context, diagnosis: Diagnosis | None
) -> Terms:
    terms: dict[str, Array] = {}
    metrics: dict[str, Mean] = token_metrics(forward.tokens, batch) if forward.tokens else {}
    for named in methods:
        name, method, hyper = named
        own = {key: hyper[key] for key in keywords(method.loss)}
        terms[name], more = method.term(method, forward, batch, own, _given(named, context))
        metrics |= {key: value for key, value in more.items() if key not in metrics}
        if len(methods) > 1:
            metrics[f"loss/{name}"] = Mean(terms[name], method.count(batch))
    if diagnosis:
        metrics |= diagnosis.measure(forward, batch)
    seen = {
        name: method.memory.observe(method, forward, batch, hyper) for name, method, hyper in methods if method.memory
    }
    return Terms(terms, *jax.tree.map(jax.lax.stop_gradient, (metrics, seen)))


def _given(named: _Named, context: Context) -> tuple[Array, ...]:
    """What the loss gets behind its arrays."""
    name, method, hyper = named
    statistic = (context.statistics[name],) if method.statistic else ()
    recalled = (call(method.memory.recall, context.carry[name], hyper=hyper),) if method.memory else ()
    return jax.tree.map(jax.lax.stop_gradient, (*statistic, *recalled))


def _remember(methods: Sequence[_Named], carry: Mapping[str, Any], seen: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: call(method.memory.remember, carry[name], *seen[name], hyper=hyper)
        for name, method, hyper in methods
        if method.memory
    }


def _check_reference(names: Sequence[str], needs: Needs, cached: bool) -> None:
    if cached and (REFERENCE in needs.frozen or not needs.reference):
        raise ValueError(
            f"config.objective.reference = 'cached': {', '.join(names)} cannot use cached log-probabilities; "
            "use 'live' where a method reads the reference's distributions, 'none' where it reads no reference"
        )


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
