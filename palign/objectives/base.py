"""What an objective is, and the forward pass that its methods share.

A *method* is a pure loss from `palign.losses` with what it needs around it: which numbers of the batch are its arrays,
which frozen models, which denominator, which numbers of the whole batch, and what it remembers between steps. An
*objective* is a weighted list of methods over one forward pass of the policy.
"""

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from palign.heads.target_values import TokenValues, logp_at_targets, target_values
from palign.heads.targets import AnyTower, TargetTower, Tower
from palign.models.protocol import LanguageModel, Params
from palign.objectives.per_target import values_per_target
from palign.sharding.rules import in_use
from palign.types import Array, Batch, Mean, Terms

REFERENCE = "reference"  # the role of the model that implicit rewards are measured against


class Needs(NamedTuple):
    """What has to be computed for the methods of an objective.

    Attributes:
        logps: log-probabilities of the targets under the policy.
        reference: the same under the reference.
        values: the value head's outputs at the end of every response.
        per_target: names in `per_target.PER_TARGET`.
        frozen: roles whose distributions are read.
    """

    logps: bool = False
    reference: bool = False
    values: bool = False
    per_target: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()

    def __or__(self, other: "Needs") -> "Needs":
        """The needs of both."""
        return Needs(
            self.logps or other.logps,
            self.reference or other.reference,
            self.values or other.values,
            self.per_target | other.per_target,
            self.frozen | other.frozen,
        )


def union(needs: Iterable[Needs]) -> Needs:
    """The needs of all."""
    return functools.reduce(operator.or_, needs, Needs())


class Forward(NamedTuple):
    """One micro-batch through the policy and, where methods ask, through frozen models."""

    tower: Tower  # the policy at the head
    frozen: Mapping[str, AnyTower]  # role -> frozen model at the head
    tokens: TokenValues | None  # [R, M] of the policy
    per_target: Mapping[str, Array]  # name -> [R, M]
    reference_logps: Array | None  # [R, M]
    values: Array | None  # [R, G, K, W] of the value head
    chunk: int  # targets per trip of the heads


class View(NamedTuple):
    """What a loss calls an example: a pair, a list, a response.

    Attributes:
        take: `(values by slot [R, 1 + G * K, ...], batch) -> [B, ...]`, or `[B, 2, ...]`, `[B, K, ...]`.
        counted: `(batch) -> [B]` bool, which of them the mean is over.
    """

    take: Callable[[Array, Batch], Array]
    counted: Callable[[Batch], Array]


class Reading(NamedTuple):
    """One array that a loss is called with.

    Attributes:
        read: `(forward, batch, view) -> array`.
        needs: what the forward pass must hold for it.
    """

    read: Callable[[Forward, Batch, View], Array]
    needs: Needs = Needs()


class Statistic(NamedTuple):
    """A number of the whole batch, from a pass over all micro-batches before the first is differentiated.

    Attributes:
        measure: `(method, forward, batch) -> tree`, of one micro-batch.
        combine: `(tree with leaves [A, ...]) -> array [A, ...]`, one slice for each micro-batch; the loss gets it as
            the argument behind its arrays.
        needs: what the forward pass must hold for `measure`.
    """

    measure: Callable[["Method", Forward, Batch], Any]
    combine: Callable[[Any], Array]
    needs: Needs = Needs()


class Memory(NamedTuple):
    """What a method keeps between steps, a value in the train state. Keyword-only arguments are hyper-parameters.

    Attributes:
        start: `() -> tree`.
        recall: `(tree) -> array`, the loss's last argument.
        observe: `(method, forward, batch, hyper-parameters) -> tree`, summed over the whole batch.
        remember: `(tree, sums) -> tree`, after the step.
    """

    start: Callable[[], Any]
    recall: Callable[..., Array]
    observe: Callable[["Method", Forward, Batch, dict], Any]
    remember: Callable[..., Any]


class Method(NamedTuple):
    """A pure loss and what it reads.

    Attributes:
        loss: from `palign.losses`; its keyword-only arguments are the method's hyper-parameters.
        term: `(method, forward, batch, hyper-parameters, given) -> (sum [], metrics)`; `given` holds the statistic and
            what memory recalls, where the method has them.
        count: `(batch) -> []`, the term's denominator, from the batch alone.
        view: what it calls an example.
        reads: the loss's arrays, in their order.
        needs: what else the forward pass must hold.
        frozen: roles whose logits the loss is called with, in their order (distillation).
        statistic: a number of the whole batch, or None.
        memory: what it keeps between steps, or None.
        compares: whether it learns from preferences alone, so that data without any teaches it nothing.
        mismatched: whether each example needs a response to another prompt (KTO's KL).
    """

    loss: Callable
    term: Callable[["Method", Forward, Batch, dict, tuple[Array, ...]], tuple[Array, dict[str, Mean]]]
    count: Callable[[Batch], Array]
    view: View | None = None
    reads: tuple[Reading, ...] = ()
    needs: Needs = Needs()
    frozen: tuple[str, ...] = ()
    statistic: Statistic | None = None
    memory: Memory | None = None
    compares: bool = False
    mismatched: bool = False

    @property
    def distils(self) -> bool:
        """Whether it learns from frozen models alone, whatever the responses are."""
        return bool(self.frozen) and self.view is None

    @property
    def all_needs(self) -> Needs:
        """Everything that the forward pass must hold for it."""
        measured = self.statistic.needs if self.statistic else Needs()
        return union((self.needs, Needs(frozen=frozenset(self.frozen)), measured, *(r.needs for r in self.reads)))


class Context(NamedTuple):
    """What methods read besides their own micro-batch, by method.

    Attributes:
        statistics: numbers of the whole batch.
        carry: what methods remember of earlier steps.
    """

    statistics: Mapping[str, Array]
    carry: Mapping[str, Any]


class Objective(NamedTuple):
    """What the step differentiates.

    Attributes:
        weights: term name -> its weight in the total loss.
        frozen: roles of the parameters that `aux` must hold.
        counts: `(batch) -> {term: []}`, to be summed over the whole global batch before anything is differentiated.
        loss: `(params, aux, batch, context) -> Terms`; the step differentiates sum_i weight_i * term_i / count_i.
        statistics: `(params, aux, batch) -> tree` of one micro-batch without gradient, or None where no method asks.
        combine: `(tree with leaves [A, ...]) -> {method: [A, ...]}`, the statistics of a context.
        init_carry: `() -> {method: tree}`; empty where no method remembers anything.
        update_carry: `(carry, observations summed over the batch) -> carry`.
    """

    weights: dict[str, float]
    frozen: frozenset[str]
    counts: Callable[[Batch], dict[str, Array]]
    loss: Callable[[Params, Mapping[str, Params], Batch, Context], Terms]
    statistics: Callable[[Params, Mapping[str, Params], Batch], Any] | None = None
    combine: Callable[[Any], dict[str, Array]] = dict
    init_carry: Callable[[], dict[str, Any]] = dict
    update_carry: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]] = lambda carry, seen: dict(carry)


def run_forward(
    lm: LanguageModel, params: Params, aux: Mapping[str, Params], batch: Batch, needs: Needs, *, chunk: int
) -> Forward:
    """One pass of the policy, and of each frozen model that somebody reads.

    The reference's log-probabilities come from the batch when they are cached there, else from `aux["reference"]`.
    """
    tower = Tower(lm.hidden(params, batch), lm.unembed(params))
    towers = {role: _frozen_tower(lm, params, aux, role, batch) for role in sorted(needs.frozen)}
    tokens: TokenValues | None = None
    per_target: dict[str, Array] = {}
    if needs.logps or needs.per_target:
        tokens, per_target = values_per_target(tower, towers, batch, needs.per_target, chunk=chunk)
    reference_logps = batch.reference_logps if needs.reference else None
    if needs.reference and reference_logps is None:
        reference_tower = towers.get(REFERENCE) or _frozen_tower(lm, params, aux, REFERENCE, batch)
        logps = target_values(logp_at_targets, (reference_tower,), batch, chunk=chunk)
        reference_logps = jax.lax.stop_gradient(logps)
    values = values_at_ends(lm, params, tower.hidden, batch) if needs.values else None
    return Forward(tower, towers, tokens, per_target, reference_logps, values, chunk)


def _frozen_tower(lm: LanguageModel, params: Params, aux: Mapping[str, Any], role: str, batch: Batch) -> AnyTower:
    """A frozen model at the head; where its hidden states are cached, `aux` holds the kernel of its logits alone."""
    frozen = jax.lax.stop_gradient(aux[role])
    if batch.hidden is not None and role in batch.hidden:
        return TargetTower(batch.hidden[role], lm.unembed(params)._replace(kernel=in_use(frozen, "dv")))
    return Tower(jax.lax.stop_gradient(lm.hidden(frozen, batch)), lm.unembed(frozen))


def values_at_ends(lm: LanguageModel, params: Params, hidden: Array, batch: Batch) -> Array:
    """The value head at the last token of every response: `[R, G, K, W]`, zeros where there is none."""
    assert lm.values is not None  # `build` refuses the method otherwise
    R, G, K = batch.response_end.shape
    ends = jnp.maximum(batch.response_end, 0).reshape(R, G * K, 1)
    values = lm.values(params, jnp.take_along_axis(hidden, ends, axis=1)).reshape(R, G, K, -1)
    return jnp.where(batch.valid[..., None], values, 0.0)


def sum_by_slot(values: Array, batch: Batch) -> Array:
    """Sums per-target values over each response: `[R, M]` -> `[R, 1 + G * K]`, slot 0 gathering padding (zeros)."""
    slots = 1 + batch.valid.shape[1] * batch.valid.shape[2]
    values = jnp.where(batch.target_slot > 0, values, 0.0)
    return jax.vmap(lambda v, s: jax.ops.segment_sum(v, s, num_segments=slots))(values, batch.target_slot)


def lengths_by_slot(batch: Batch) -> Array:
    """How many targets each response has: `[R, 1 + G * K]` float32, at least 1 so that it divides."""
    return jnp.maximum(sum_by_slot(jnp.ones(batch.target_slot.shape, jnp.float32), batch), 1.0)


def by_slot(values: Array) -> Array:
    """From `[R, G, K, ...]` to `[R, 1 + G * K, ...]`, slot 0 zero."""
    flat = values.reshape(values.shape[0], -1, *values.shape[3:])
    return jnp.pad(flat, ((0, 0), (1, 0), *((0, 0),) * (flat.ndim - 2)))


def mean_over(values: Array, mask: Array) -> Mean:
    """The mean of the values under a mask, not divided yet."""
    return Mean(jnp.sum(jnp.where(mask, values, 0.0)), jnp.sum(mask).astype(jnp.float32))


def keywords(function: Callable) -> dict[str, Any]:
    """A function's keyword-only arguments and their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def hyper_defaults(method: Method) -> dict[str, Any]:
    """A method's hyper-parameters and their defaults: the loss's first, then those of its memory."""
    functions = (method.memory.recall, method.memory.remember, method.loss) if method.memory else (method.loss,)
    return {name: default for function in functions for name, default in keywords(function).items()}


def call(function: Callable, *arguments: Any, hyper: Mapping[str, Any]) -> Any:
    """Calls a function with those hyper-parameters that it takes."""
    return function(*arguments, **{name: hyper[name] for name in keywords(function)})
