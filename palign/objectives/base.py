"""What an objective is, and the forward pass that its methods share.

A *method* is a pure loss from `palign.losses` with what it needs around it: which frozen models, which numbers of the
batch, which denominator. An *objective* is a weighted list of methods over one forward pass of the policy.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from palign.heads.target_values import TokenValues, target_logps, token_values
from palign.heads.targets import Tower
from palign.models.protocol import LanguageModel, Params
from palign.types import Array, Batch, Mean, Terms

REFERENCE = "reference"  # the role of the model that implicit rewards are measured against


class Forward(NamedTuple):
    """One micro-batch through the policy and, where methods ask, through frozen models."""

    tower: Tower  # the policy at the head
    frozen: Mapping[str, Tower]  # role -> frozen model at the head
    tokens: TokenValues | None  # [R, M] of the policy
    reference_logps: Array | None  # [R, M]
    chunk: int  # targets per trip of the heads


class Method(NamedTuple):
    """A pure loss and what it reads.

    Attributes:
        loss: from `palign.losses`; its keyword-only arguments are the method's hyper-parameters.
        term: `(method, forward, batch, hyper-parameters) -> (sum [], metrics)`.
        count: `(batch) -> []`, the term's denominator, from the batch alone.
        logps: whether it reads log-probabilities of the targets.
        reference: whether it reads the reference's log-probabilities.
        frozen: roles whose distributions it reads, in the order of the loss's arguments.
        compares: whether it learns from preferences alone, so that data without any teaches it nothing.
    """

    loss: Callable
    term: Callable[["Method", Forward, Batch, dict], tuple[Array, dict[str, Mean]]]
    count: Callable[[Batch], Array]
    logps: bool = True
    reference: bool = False
    frozen: tuple[str, ...] = ()
    compares: bool = False


class Objective(NamedTuple):
    """What the step differentiates.

    Attributes:
        weights: term name -> its weight in the total loss.
        frozen: roles of the parameters that `aux` must hold.
        counts: `(batch) -> {term: []}`, to be summed over the whole global batch before anything is differentiated.
        loss: `(params, aux, batch) -> Terms`; the step differentiates sum_i weight_i * term_i / count_i.
    """

    weights: dict[str, float]
    frozen: frozenset[str]
    counts: Callable[[Batch], dict[str, Array]]
    loss: Callable[[Params, Mapping[str, Params], Batch], Terms]


def run_forward(
    lm: LanguageModel,
    params: Params,
    aux: Mapping[str, Params],
    batch: Batch,
    *,
    logps: bool,
    reference: bool,
    frozen: frozenset[str],
    chunk: int,
) -> Forward:
    """One pass of the policy, and of each frozen model that somebody reads.

    The reference's log-probabilities come from the batch when they are cached there, else from `aux["reference"]`.
    """
    tower = Tower(lm.hidden(params, batch), lm.unembed(params))
    towers = {role: _frozen_tower(lm, aux[role], batch) for role in sorted(frozen)}
    tokens = token_values(*tower, batch, chunk=chunk) if logps else None
    reference_logps = batch.reference_logps if reference else None
    if reference and reference_logps is None:
        reference_tower = towers.get(REFERENCE) or _frozen_tower(lm, aux[REFERENCE], batch)
        reference_logps = jax.lax.stop_gradient(target_logps(*reference_tower, batch, chunk=chunk))
    return Forward(tower, towers, tokens, reference_logps, chunk)


def _frozen_tower(lm: LanguageModel, params: Params, batch: Batch) -> Tower:
    params = jax.lax.stop_gradient(params)
    return Tower(jax.lax.stop_gradient(lm.hidden(params, batch)), lm.unembed(params))


def sum_by_slot(values: Array, batch: Batch) -> Array:
    """Sums per-target values over each response: `[R, M]` -> `[R, 1 + G * K]`, slot 0 gathering padding (zeros)."""
    slots = 1 + batch.valid.shape[1] * batch.valid.shape[2]
    values = jnp.where(batch.target_slot > 0, values, 0.0)
    return jax.vmap(lambda v, s: jax.ops.segment_sum(v, s, num_segments=slots))(values, batch.target_slot)


def lengths_by_slot(batch: Batch) -> Array:
    """How many targets each response has: `[R, 1 + G * K]` float32, at least 1 so that it divides."""
    return jnp.maximum(sum_by_slot(jnp.ones(batch.target_slot.shape, jnp.float32), batch), 1.0)


def mean_over(values: Array, mask: Array) -> Mean:
    """The mean of the values under a mask, not divided yet."""
    return Mean(jnp.sum(jnp.where(mask, values, 0.0)), jnp.sum(mask).astype(jnp.float32))


def hyper_defaults(method: Method) -> dict[str, Any]:
    """The loss's keyword-only arguments and their defaults."""
    parameters = inspect.signature(method.loss).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
