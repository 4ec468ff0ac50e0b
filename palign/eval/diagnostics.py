"""Diagnostics by name, as undivided means over a batch, to be logged beside a method's own metrics."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from palign.eval.difficulty import difficulty
from palign.eval.displacement import ches, displacement, length_normalised_ches
from palign.eval.ranking import (
    flip_buckets,
    full_ranking_accuracy,
    idealised_ranking_accuracy,
    implicit_reward_accuracy,
    ranking_accuracy,
)
from palign.sharding.mesh import ROWS, over_rows
from palign.types import Array, Batch, Mean


class Pairs(NamedTuple):
    """The listed pairs of a batch, B = R * P of them, padding included; 0 = preferred, 1 = other on axis 1."""

    policy: Array  # [B, 2] summed log-probabilities, nats
    lengths: Array  # [B, 2] tokens, at least 1
    reference: Array  # [B, 2], or None where no diagnostic that was asked for reads it
    hidden_sums: Array  # [B, 2, D], or None
    beta: Array  # []


class Lists(NamedTuple):
    """The examples of a batch, B = R * G of them, padding included."""

    policy: Array  # [B, K] summed log-probabilities, nats
    scores: Array  # [B, K]
    valid: Array  # [B, K] bool


class Responses(NamedTuple):
    """The single responses of a batch, B = R * G * K of them, padding included."""

    kl: Array  # [B] nats, summed over the tokens, or None where no diagnostic that was asked for reads it


class Diagnostic(NamedTuple):
    """A number for each pair, list or response, and what it is made of.

    Attributes:
        values: `(about) -> [B]`.
        about: `Pairs`, of which the listed ones count, `Lists`, of which those with a preference, or `Responses`.
        reference: whether it reads the reference's log-probabilities.
        hidden: whether it reads sums of hidden states.
        kl: whether it reads the divergence from the reference, over the whole vocabulary.
    """

    values: Callable[..., Array]
    about: type = Pairs
    reference: bool = False
    hidden: bool = False
    kl: bool = False


class Needs(NamedTuple):
    """What some diagnostics read together, so that nothing else is computed."""

    reference: bool
    hidden: bool
    kl: bool


def _change(pairs: Pairs) -> Array:
    return displacement(pairs.policy, pairs.reference)


def _flips(pairs: Pairs) -> Array:
    return flip_buckets(ranking_accuracy(pairs.policy), ranking_accuracy(pairs.reference))


# Changes are against the reference: under DPO, the model that training began from.
DIAGNOSTICS: dict[str, Diagnostic] = {
    "diagnostics/ches": Diagnostic(lambda p: ches(p.hidden_sums), hidden=True),
    "diagnostics/ches_normalised": Diagnostic(lambda p: length_normalised_ches(p.hidden_sums, p.lengths), hidden=True),
    "diagnostics/ranking_accuracy": Diagnostic(lambda p: ranking_accuracy(p.policy)),
    "diagnostics/ranking_accuracy_normalised": Diagnostic(lambda p: ranking_accuracy(p.policy / p.lengths)),
    "diagnostics/full_ranking_accuracy": Diagnostic(lambda l: full_ranking_accuracy(*l), Lists),
    "diagnostics/implicit_reward_accuracy": Diagnostic(
        lambda p: implicit_reward_accuracy(p.policy, p.reference), reference=True
    ),
    "diagnostics/idealised_ranking_accuracy": Diagnostic(
        lambda p: idealised_ranking_accuracy(p.reference, beta=p.beta), reference=True
    ),
    "diagnostics/difficulty": Diagnostic(lambda p: difficulty(p.reference), reference=True),
    "diagnostics/displacement": Diagnostic(lambda p: _change(p).chosen, reference=True),
    "diagnostics/displacement_rejected": Diagnostic(lambda p: _change(p).rejected, reference=True),
    "diagnostics/displaced": Diagnostic(lambda p: _change(p).displaced, reference=True),
    "diagnostics/turned_right": Diagnostic(lambda p: _flips(p).turned_right, reference=True),
    "diagnostics/turned_wrong": Diagnostic(lambda p: _flips(p).turned_wrong, reference=True),
    "diagnostics/kl": Diagnostic(lambda r: r.kl, Responses, kl=True),
}


def needs(names: Sequence[str]) -> Needs:
    """What the named diagnostics read.

    Args:
        names: keys of `DIAGNOSTICS`.

    Raises:
        ValueError: for an unknown name, with the nearest one.
    """
    found = [_named(name) for name in names]
    return Needs(*(any(getattr(d, name) for d in found) for name in Needs._fields))


def diagnose(
    names: Sequence[str],
    policy_logps: Array,
    lengths: Array,
    batch: Batch,
    *,
    reference_logps: Array | None = None,
    hidden_sums: Array | None = None,
    sequence_kl: Array | None = None,
    beta: float | Array = 0.1,
) -> dict[str, Mean]:
    """Evaluates diagnostics on a batch, under jit if need be; no gradient flows through them.

    Args:
        names: keys of `DIAGNOSTICS`.
        policy_logps: `[R, slots]` (slots = 1 + G * K), log-probabilities of the responses under the policy, in nats,
            summed over their tokens.
        lengths: `[R, slots]`, tokens of the responses; 0 counts as 1.
        batch: its pairs, scores and `valid` are read.
        reference_logps: `[R, slots]` under the reference, where `needs(names).reference`.
        hidden_sums: `[R, slots, D]` of `hidden_sums_by_slot`, where `needs(names).hidden`.
        sequence_kl: `[R, slots]`, KL(policy || reference) in nats, summed over the responses' tokens, where
            `needs(names).kl`.
        beta: of the loss, for the idealised accuracy.

    Returns:
        name -> its sum and count over the listed pairs of the batch, the examples that hold a preference, or the
        examples' own responses.

    Raises:
        ValueError: an unknown name, something that is read and was not given, or a wrong shape.
    """
    given = {"reference_logps": reference_logps, "hidden_sums": hidden_sums, "sequence_kl": sequence_kl}
    wanted = dict(zip(given, needs(names), strict=True))
    by_slot = {"policy_logps": policy_logps, "lengths": lengths}
    by_slot |= {name: array for name, array in given.items() if wanted[name]}
    _check_by_slot(names, by_slot, batch)
    examples = _examples(jax.lax.stop_gradient(by_slot), batch, jax.lax.stop_gradient(jnp.asarray(beta, jnp.float32)))
    means = {}
    for name in names:
        made_of, counted = examples[DIAGNOSTICS[name].about]
        means[name] = _mean(DIAGNOSTICS[name].values(made_of), counted)
    return means


def _examples(by_slot: dict[str, Array], batch: Batch, beta: Array) -> dict[type, tuple[Any, Array]]:
    """The pairs, lists and responses of a batch, and which of each count."""
    at = {name: at_pairs(values, batch) for name, values in by_slot.items() if name != "sequence_kl"}
    pairs = Pairs(
        at["policy_logps"],
        jnp.maximum(at["lengths"], 1).astype(jnp.float32),
        at.get("reference_logps"),
        at.get("hidden_sums"),
        beta,
    )
    kl = by_slot["sequence_kl"][:, 1:].reshape(-1) if "sequence_kl" in by_slot else None
    return {
        Pairs: (pairs, batch.pairs[..., 0].reshape(-1) > 0),
        Lists: _lists(by_slot["policy_logps"], batch),
        Responses: (Responses(kl), batch.valid.reshape(-1)),
    }


def at_pairs(by_slot: Array, batch: Batch) -> Array:
    """Values of the listed pairs.

    Args:
        by_slot: `[R, slots, ...]`.
        batch: its `pairs` `[R, P, 2]` say which slots are compared; 0 = padding, which reads slot 0.

    Returns:
        `[R * P, 2, ...]`, preferred response first.
    """
    # Each device its own rows: partitioned automatically, this gather would move whole activations.
    found = over_rows(jax.vmap(lambda values, pairs: values[pairs]), (ROWS, ROWS), ROWS)(by_slot, batch.pairs)
    return found.reshape(-1, *found.shape[2:])


def _lists(policy_logps: Array, batch: Batch) -> tuple[Lists, Array]:
    """The examples, and which of them hold two responses of different scores."""
    K = batch.valid.shape[2]
    scores, valid = batch.scores.reshape(-1, K), batch.valid.reshape(-1, K)
    top = jnp.max(jnp.where(valid, scores, -jnp.inf), axis=-1)
    bottom = jnp.min(jnp.where(valid, scores, jnp.inf), axis=-1)
    return Lists(policy_logps[:, 1:].reshape(-1, K), scores, valid), top > bottom


def _mean(values: Array, counted: Array) -> Mean:
    total = jnp.sum(jnp.where(counted, values.astype(jnp.float32), 0.0))
    return Mean(total, jnp.sum(counted).astype(jnp.float32))


def _named(name: str) -> Diagnostic:
    if name not in DIAGNOSTICS:
        near = difflib.get_close_matches(name, DIAGNOSTICS, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else f"; there are {', '.join(DIAGNOSTICS)}"
        raise ValueError(f"{name!r} is not a diagnostic{hint}")
    return DIAGNOSTICS[name]


def _check_by_slot(names: Sequence[str], by_slot: dict[str, Array], batch: Batch) -> None:
    R, G, K = batch.valid.shape
    for name, array in by_slot.items():
        if array is None:
            raise ValueError(f"diagnose: {name} is None, and {', '.join(names)} read it; give it, or ask for others")
        shape, rank = jnp.shape(array), 3 if name == "hidden_sums" else 2
        if len(shape) != rank or shape[:2] != (R, 1 + G * K):
            raise ValueError(
                f"diagnose: {name} has shape {list(shape)}; expected [{R}, {1 + G * K}{', D' if rank == 3 else ''}], "
                "one for each slot of the batch"
            )
