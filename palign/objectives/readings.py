"""The arrays that losses are called with, and the three ways to look at a batch: pairs, lists, single responses."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from palign.objectives.base import REFERENCE, Forward, Needs, Reading, View, by_slot, lengths_by_slot, sum_by_slot
from palign.types import Array, Batch

POLICY_NEEDS = Needs(logps=True)
REFERENCE_NEEDS = Needs(reference=True)


def approval(batch: Batch) -> Array:
    """+1 thumbs-up, -1 thumbs-down, 0 neither: `[R, G, K]`.

    A single response is judged by its score's sign, one of several by the midpoint of the best and the worst score.
    """
    top, bottom = best_and_worst(batch)
    midpoint = jnp.where(batch.valid.sum(-1) > 1, (top + bottom) / 2, 0.0)
    return jnp.where(batch.valid, jnp.sign(batch.scores - midpoint[..., None]), 0.0)


def best_and_worst(batch: Batch) -> tuple[Array, Array]:
    """Scores of the best and the worst response of each example, `[R, G]`; -inf and inf where it is empty."""
    top = jnp.max(jnp.where(batch.valid, batch.scores, -jnp.inf), axis=-1)
    return top, jnp.min(jnp.where(batch.valid, batch.scores, jnp.inf), axis=-1)


def mismatched(batch: Batch) -> Array:
    """Responses to another prompt, there for KTO's KL alone: `[R, G, K]` bool."""
    return (batch.response_end >= 0) & ~batch.valid


def _take_pairs(values: Array, batch: Batch) -> Array:
    rows, pairs = batch.pairs.shape[:2]
    index = batch.pairs.reshape(rows, pairs * 2, *(1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, index, axis=1).reshape(rows * pairs, 2, *values.shape[2:])


def _take_lists(values: Array, batch: Batch) -> Array:
    return values[:, 1:].reshape(-1, batch.valid.shape[2], *values.shape[2:])


def _take_responses(values: Array, batch: Batch) -> Array:
    return values[:, 1:].reshape(-1, *values.shape[2:])


def _listed_pairs(batch: Batch) -> Array:
    return batch.pairs[..., 0].reshape(-1) > 0


def _with_preference(batch: Batch) -> Array:
    top, bottom = best_and_worst(batch)
    return (top > bottom).reshape(-1)


def _judged(batch: Batch) -> Array:
    return (approval(batch) != 0).reshape(-1)


PAIRS = View(_take_pairs, _listed_pairs)  # the listed pairs, [B, 2]
LISTS = View(_take_lists, _with_preference)  # examples that hold a preference, [B, K]
RESPONSES = View(_take_responses, _judged)  # thumbs-up and thumbs-down, [B]
GRADED = View(_take_responses, lambda batch: batch.valid.reshape(-1))  # every response, [B]


def _reading(slots: Callable[[Forward, Batch], Array], needs: Needs = Needs()) -> Reading:  # noqa: B008
    return Reading(lambda forward, batch, view: view.take(slots(forward, batch), batch), needs)


def _policy_logps(forward: Forward) -> Array:
    assert forward.tokens is not None  # `Needs` says so
    return forward.tokens.logps


def policy_sums(forward: Forward, batch: Batch) -> Array:
    """Sequence log-probabilities under the policy, by slot."""
    return sum_by_slot(_policy_logps(forward), batch)


def reference_sums(forward: Forward, batch: Batch) -> Array:
    """The same under the reference."""
    return sum_by_slot(forward.reference_logps, batch)


def policy_averages(forward: Forward, batch: Batch) -> Array:
    """Log-probabilities per token under the policy, by slot."""
    return policy_sums(forward, batch) / lengths_by_slot(batch)


def _reference_averages(forward: Forward, batch: Batch) -> Array:
    return reference_sums(forward, batch) / lengths_by_slot(batch)


def _log_ratios(forward: Forward, batch: Batch) -> Array:
    return policy_sums(forward, batch) - jax.lax.stop_gradient(reference_sums(forward, batch))


def _alignment(forward: Forward, batch: Batch) -> Array:
    return sum_by_slot(forward.per_target["alignment"], batch) / lengths_by_slot(batch)


def _over_the_others(compare: Callable[[Array, Array], Array], batch: Batch) -> Array:
    """Mean over the example's other responses of a comparison of scores, by slot; 0 where there are no others."""
    K = batch.scores.shape[-1]
    ours, theirs = batch.scores[..., :, None], batch.scores[..., None, :]
    others = batch.valid[..., None, :] & batch.valid[..., :, None] & ~jnp.eye(K, dtype=bool)[None, None]
    total = jnp.sum(jnp.where(others, compare(ours, theirs), 0.0), axis=-1)
    return by_slot(total / jnp.maximum(others.sum(-1), 1))


POLICY = _reading(policy_sums, POLICY_NEEDS)
REFERENCE_SUMS = _reading(reference_sums, REFERENCE_NEEDS)
AVERAGE = _reading(policy_averages, POLICY_NEEDS)
REFERENCE_AVERAGE = _reading(_reference_averages, REFERENCE_NEEDS)
LOG_RATIO = _reading(_log_ratios, POLICY_NEEDS | REFERENCE_NEEDS)
LENGTHS = _reading(lambda _, batch: lengths_by_slot(batch))
SCORES = _reading(lambda _, batch: by_slot(batch.scores))
VALID = _reading(lambda _, batch: by_slot(batch.valid))
DESIRABLE = _reading(lambda _, batch: by_slot(approval(batch) > 0))
# The fraction of the other responses that one beats, ties counting half: in [0, 1] whatever the scale of the scores.
WIN_RATES = _reading(lambda _, batch: _over_the_others(lambda a, b: (jnp.sign(a - b) + 1) / 2, batch))
ADVANTAGES = _reading(lambda _, batch: _over_the_others(jnp.subtract, batch))  # mean score above the others
ALIGNMENT = _reading(_alignment, Needs(logps=True, per_target=frozenset({"alignment"})))
SEQUENCE_KL = _reading(
    lambda forward, batch: sum_by_slot(forward.per_target["reference_kl"], batch),
    Needs(logps=True, per_target=frozenset({"reference_kl"}), frozen=frozenset({REFERENCE})),
)
VALUES = _reading(lambda forward, _: by_slot(forward.values), Needs(values=True))  # [..., W]
VALUE = _reading(lambda forward, _: _single(by_slot(forward.values)), Needs(values=True))


def _single(values: Array) -> Array:
    if values.shape[-1] != 1:
        raise ValueError(f"config.model.value_head = {values.shape[-1]}: this method reads one number, a reward; use 1")
    return values[..., 0]


def _weights(forward: Forward, batch: Batch, view: View) -> Array:
    weight = jnp.ones(batch.example_id.shape, jnp.float32) if batch.weight is None else batch.weight
    return view.take(by_slot(jnp.broadcast_to(weight[..., None], batch.valid.shape)), batch)


WEIGHTS = Reading(_weights)


def _unit_scales(forward: Forward, batch: Batch, view: View) -> Array:
    values = VALUES.read(forward, batch, view)
    return jnp.ones((values.shape[0], values.shape[-1] // 2), jnp.float32)


UNIT_SCALES = Reading(_unit_scales, VALUES.needs)  # GPM's scale of each plane of the embedding, `[B, W / 2]`


def chosen(reading: Reading) -> Reading:
    """The chosen response's value of each pair: `[B]`."""
    return reading._replace(read=lambda forward, batch, view: reading.read(forward, batch, view)[:, 0])


def gap(reading: Reading) -> Reading:
    """The chosen response's value less the rejected one's: `[B]`."""

    def read(forward, batch, view):
        values = reading.read(forward, batch, view)
        return values[:, 0] - values[:, 1]

    return reading._replace(read=read)


def column(reading: Reading) -> Reading:
    """The same with one more axis of length 1."""
    return reading._replace(read=lambda forward, batch, view: reading.read(forward, batch, view)[..., None])


def places_in_response(batch: Batch) -> Array:
    """Which token of its response each target is, from 0: `[R, M]`."""
    slots, columns = batch.target_slot, jnp.arange(batch.target_slot.shape[1])
    num_slots = 1 + batch.valid.shape[1] * batch.valid.shape[2]
    first = jax.vmap(lambda slot: jax.ops.segment_min(columns, slot, num_segments=num_slots))(slots)
    return columns[None] - jnp.take_along_axis(first, slots, axis=1)


def _split_at_the_shorter(logps: Array, batch: Batch) -> tuple[Array, Array]:
    """Sums over the tokens that both responses of a pair are long enough for, and over the rest: two `[R * P, 2]`.

    What is shared depends on the pair, not on the response: one response of a list stands in several.
    """
    slots = batch.target_slot
    lengths = _take_pairs(sum_by_slot(jnp.ones(slots.shape, jnp.float32), batch), batch)
    shorter = lengths.min(-1).reshape(*batch.pairs.shape[:2], 1, 1)
    own = (slots[:, None, None, :] == batch.pairs[..., None]) & (batch.pairs[..., None] > 0)
    inside = places_in_response(batch)[:, None, None, :] < shorter
    values = logps[:, None, None, :]
    shared, tail = (jnp.sum(jnp.where(own & part, values, 0.0), axis=-1) for part in (inside, ~inside))
    return shared.reshape(-1, 2), tail.reshape(-1, 2)


SUMS = (POLICY, REFERENCE_SUMS)  # what most pairwise losses read
RANKED = (*SUMS, SCORES, VALID)  # what most listwise losses read
JUDGED = (*SUMS, DESIRABLE)  # what most unpaired losses read


def _policy_part(part: int) -> Reading:
    return Reading(lambda forward, batch, _: _split_at_the_shorter(_policy_logps(forward), batch)[part], POLICY_NEEDS)


def _reference_part(part: int) -> Reading:
    return Reading(
        lambda forward, batch, _: _split_at_the_shorter(forward.reference_logps, batch)[part], REFERENCE_NEEDS
    )


POLICY_SHARED, POLICY_TAIL = _policy_part(0), _policy_part(1)
REFERENCE_SHARED, REFERENCE_TAIL = _reference_part(0), _reference_part(1)
