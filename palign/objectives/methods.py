"""The kinds of methods: how a pure loss is fed from a batch of trees.

Pairwise losses read the listed pairs, listwise ones whole examples, unpaired ones single responses, token losses the
targets, and distillation losses the logits of several models at each target.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from palign.heads.target_values import TokenValues, values_at_targets
from palign.heads.weighted_sum import weighted_sum
from palign.losses import implicit_rewards
from palign.objectives.base import Memory, Method, Reading, Statistic, by_slot, mean_over, sum_by_slot, union
from palign.objectives.readings import (
    AVERAGE,
    GRADED,
    JUDGED,
    LISTS,
    PAIRS,
    POLICY_NEEDS,
    RANKED,
    REFERENCE_NEEDS,
    RESPONSES,
    SUMS,
    approval,
    best_and_worst,
    mismatched,
    places_in_response,
    policy_averages,
    policy_sums,
    reference_sums,
)
from palign.types import Array, Batch, Mean


def num_pairs(batch: Batch) -> Array:
    """How many pairs are listed."""
    return jnp.sum(PAIRS.counted(batch)).astype(jnp.float32)


def num_lists(batch: Batch) -> Array:
    """How many examples hold a preference: two responses or more, not all of one score."""
    return jnp.sum(LISTS.counted(batch)).astype(jnp.float32)


def num_judged(batch: Batch) -> Array:
    """How many responses are thumbs-up or thumbs-down."""
    return jnp.sum(RESPONSES.counted(batch)).astype(jnp.float32)


def scored_targets(batch: Batch) -> Array:
    """The targets of the example's own responses, mismatched ones left out: `[R, M]` bool."""
    return _at_targets(batch.valid, batch)


def num_targets(batch: Batch) -> Array:
    """How many tokens those are."""
    return jnp.sum(scored_targets(batch)).astype(jnp.float32)


def preferred_targets(batch: Batch) -> Array:
    """The targets of each example's preferred response, the first of equals; a thumbs-down is none: `[R, M]` bool."""
    top, _ = best_and_worst(batch)
    first = jnp.argmax(batch.valid & (batch.scores == top[..., None]), axis=-1)
    best = first[..., None] == jnp.arange(batch.valid.shape[2])[None, None]
    return _at_targets(best & (approval(batch) >= 0), batch)


def _at_targets(responses: Array, batch: Batch) -> Array:
    return jnp.take_along_axis(by_slot(responses), batch.target_slot, axis=1)


def num_preferred_targets(batch: Batch) -> Array:
    """How many tokens the preferred responses have."""
    return jnp.sum(preferred_targets(batch)).astype(jnp.float32)


def num_responses(batch: Batch) -> Array:
    """How many responses there are."""
    return jnp.sum(batch.valid).astype(jnp.float32)


def pairwise(loss: Callable, *reads: Reading, **more: Any) -> Method:
    """A loss on pairs, `[B, 2]` arrays, by default sums of policy and reference; the mean is over the listed pairs."""
    return Method(loss, _term, num_pairs, PAIRS, reads or SUMS, compares=True, **more)


def listwise(loss: Callable, *reads: Reading, **more: Any) -> Method:
    """A loss on whole examples, `[B, K]` arrays, by default sums of policy and reference, scores and `valid`.

    The mean is over examples that hold a preference.
    """
    return Method(loss, _term, num_lists, LISTS, reads or RANKED, compares=True, **more)


def unpaired(loss: Callable, *reads: Reading, **more: Any) -> Method:
    """A loss on single responses, `[B]` arrays, by default sums of policy and reference, and whether it was liked.

    The mean is over thumbs-up and thumbs-down.
    """
    return Method(loss, _term, num_judged, RESPONSES, reads or JUDGED, **more)


def regression(loss: Callable, *reads: Reading) -> Method:
    """A loss on every single response, `[B]` arrays, whatever its score."""
    return Method(loss, _term, num_responses, GRADED, reads)


def likelihood(loss: Callable) -> Method:
    """A loss on the log-probabilities of each example's preferred response, averaged over tokens (TRL's `sft`)."""
    return Method(loss, _likelihood_term, num_preferred_targets)


def distillation(loss: Callable, *frozen: str) -> Method:
    """A loss on the logits of the policy and of frozen models at every target, averaged over tokens."""
    return Method(loss, _distillation_term, num_targets, frozen=frozen)


def token_distillation(loss: Callable, *frozen: str) -> Method:
    """Like `distillation`, for a loss that takes the target tokens as its last array."""
    return Method(loss, _token_distillation_term, num_targets, frozen=frozen)


def sequence_distillation(loss: Callable, *frozen: str) -> Method:
    """Like `distillation`, but the mean over a response's tokens first, then over responses."""
    return Method(loss, _sequence_distillation_term, num_responses, frozen=frozen)


def sequence_distillation_after_the_first(loss: Callable, *frozen: str) -> Method:
    """Like `sequence_distillation`, but without each response's first token, as the official AlignDistil code has it.

    The mean is over the other tokens; a response of one token adds nothing and is counted.
    """
    return Method(loss, _sequence_distillation_after_the_first_term, num_responses, frozen=frozen)


def batch_value(function: Callable, *reads: Reading) -> Statistic:
    """A statistic that is one value for all: `function(*arrays of the whole batch, counted [B]) -> []`."""

    def combine(arrays):
        (value, micro_batches) = function(*_merged(arrays)), arrays[0].shape[0]
        return jnp.broadcast_to(value, (micro_batches, *value.shape))

    return Statistic(_measure_reads(reads), combine, union(reading.needs for reading in reads))


def batch_match(function: Callable, *reads: Reading) -> Statistic:
    """A statistic with a value for every example: `function(*arrays of the whole batch, counted [B]) -> [B, ...]`."""

    def combine(arrays):
        value, (micro_batches, size) = function(*_merged(arrays)), arrays[0].shape[:2]
        return value.reshape(micro_batches, size, *value.shape[1:])

    return Statistic(_measure_reads(reads), combine, union(reading.needs for reading in reads))


def mismatched_value(function: Callable) -> Statistic:
    """A value of `(policy_logps, ref_logps, listed)`, `[B]` each, of the mismatched responses of the whole batch."""

    def measure(method, forward, batch):
        sums = [RESPONSES.take(sums(forward, batch), batch) for sums in (policy_sums, reference_sums)]
        return (*sums, mismatched(batch).reshape(-1))

    whole = batch_value(function)
    return Statistic(measure, whole.combine, POLICY_NEEDS | REFERENCE_NEEDS)


def _measure_reads(reads):
    def measure(method, forward, batch):
        return (*(reading.read(forward, batch, method.view) for reading in reads), method.view.counted(batch))

    return measure


def _merged(arrays):
    """`[A, B, ...]` -> `[A * B, ...]`."""
    return [x.reshape(-1, *x.shape[2:]) for x in arrays]


def reward_means(start: Callable, recall: Callable, remember: Callable) -> Memory:
    """Memory that is told the sums `[2]` of the rewards of desirable and undesirable responses, and their counts."""

    def observe(method, forward, batch, hyper):
        rewards, liked, disliked = _judged_rewards(method, forward, batch, hyper)
        means = mean_over(rewards, liked), mean_over(rewards, disliked)
        return jnp.stack([m.sum for m in means]), jnp.stack([m.count for m in means])

    return Memory(start, recall, observe, remember)


def margin_means(start: Callable, recall: Callable, remember: Callable) -> Memory:
    """Memory that is told the mean margin of the step's pairs, if there were any."""

    def observe(method, forward, batch, hyper):
        rewards = PAIRS.take(_rewards(method, forward, batch, hyper), batch)
        return tuple(mean_over(rewards[:, 0] - rewards[:, 1], PAIRS.counted(batch)))

    def remember_mean(tree, total, count):
        after = remember(tree, total / jnp.maximum(count, 1.0))
        return jax.tree.map(lambda new, old: jnp.where(count > 0, new, old), after, tree)

    return Memory(start, recall, observe, remember_mean)


def _rewards(method, forward, batch, hyper):
    """What the method makes of each response, by slot, without gradient: TRL's rewards."""
    needs, beta = method.all_needs, hyper.get("beta", 1.0)
    if needs.values:
        return jax.lax.stop_gradient(by_slot(forward.values)[..., 0])
    policy = policy_averages(forward, batch) if AVERAGE in method.reads else policy_sums(forward, batch)
    if not needs.reference:
        return implicit_rewards(policy, jnp.zeros_like(policy), beta=beta)
    return implicit_rewards(policy_sums(forward, batch), reference_sums(forward, batch), beta=beta)


def _judged_rewards(method, forward, batch, hyper):
    """Rewards, thumbs-up, thumbs-down: the pairs' chosen and rejected where the method compares pairs."""
    rewards = _rewards(method, forward, batch, hyper)
    if method.view is PAIRS:
        listed = jnp.repeat(PAIRS.counted(batch)[:, None], 2, axis=1)
        first = jnp.broadcast_to(jnp.arange(2)[None] == 0, listed.shape)
        return PAIRS.take(rewards, batch), listed & first, listed & ~first
    verdict = approval(batch).reshape(-1)
    return RESPONSES.take(rewards, batch), verdict > 0, verdict < 0


def _term(method, forward, batch, hyper, given):
    arrays = [reading.read(forward, batch, method.view) for reading in method.reads]
    values = method.loss(*arrays, *given, **hyper)
    total = jnp.sum(jnp.where(method.view.counted(batch), values, 0.0))
    metrics = _unpaired_metrics if method.view is RESPONSES else _preference_metrics
    return total, metrics(method, forward, batch, hyper)


def _preference_metrics(method, forward, batch, hyper):
    """TRL's names; a reward is `beta` times the log-ratio, and an accuracy counts strictly larger ones."""
    rewards, listed = PAIRS.take(_rewards(method, forward, batch, hyper), batch), PAIRS.counted(batch)
    margins = rewards[:, 0] - rewards[:, 1]
    return _logp_metrics(forward, batch) | {
        "rewards/chosen": mean_over(rewards[:, 0], listed),
        "rewards/rejected": mean_over(rewards[:, 1], listed),
        "rewards/margins": mean_over(margins, listed),
        "rewards/accuracies": mean_over((margins > 0).astype(jnp.float32), listed),
    }


def _logp_metrics(forward, batch):
    if forward.tokens is None:
        return {}
    logps, listed = PAIRS.take(policy_sums(forward, batch), batch), PAIRS.counted(batch)
    return {"logps/chosen": mean_over(logps[:, 0], listed), "logps/rejected": mean_over(logps[:, 1], listed)}


def _unpaired_metrics(method, forward, batch, hyper):
    """TRL's names in its KTO trainer."""
    rewards, liked, disliked = _judged_rewards(method, forward, batch, hyper)
    metrics = {"rewards/chosen": mean_over(rewards, liked), "rewards/rejected": mean_over(rewards, disliked)}
    if forward.tokens is None:
        return metrics
    logps = RESPONSES.take(policy_sums(forward, batch), batch)
    return metrics | {"logps/chosen": mean_over(logps, liked), "logps/rejected": mean_over(logps, disliked)}


def token_metrics(tokens: TokenValues, batch: Batch) -> dict[str, Mean]:
    """TRL's names, averaged over targets."""
    listed = scored_targets(batch)
    return {"entropy": mean_over(tokens.entropy, listed), "mean_token_accuracy": mean_over(tokens.correct, listed)}


def _likelihood_term(method, forward, batch, hyper, given):
    learned = preferred_targets(batch)
    if forward.tokens is not None:  # another method has asked for them already
        return jnp.sum(jnp.where(learned, method.loss(forward.tokens.logps, **hyper), 0.0)), {}

    def at_targets(token, logits):
        tokens = values_at_targets(token, logits)
        return method.loss(tokens.logps, **hyper), tokens

    weights = learned.astype(jnp.float32)
    total, (_, tokens) = weighted_sum(at_targets, weights, (forward.tower,), batch, chunk=forward.chunk)
    return total, token_metrics(tokens, batch)


def _distillation_term(method, forward, batch, hyper, given):
    return _distil(method, forward, batch, _of_logits(method, hyper), scored_targets(batch).astype(jnp.float32))


def _token_distillation_term(method, forward, batch, hyper, given):
    def loss(token, *logits):
        return method.loss(*logits, token, **hyper)

    return _distil(method, forward, batch, loss, scored_targets(batch).astype(jnp.float32))


def _sequence_distillation_term(method, forward, batch, hyper, given):
    return _distil(method, forward, batch, _of_logits(method, hyper), _of_response(scored_targets(batch), batch))


def _sequence_distillation_after_the_first_term(method, forward, batch, hyper, given):
    later = scored_targets(batch) & (places_in_response(batch) > 0)
    return _distil(method, forward, batch, _of_logits(method, hyper), _of_response(later, batch))


def _of_response(targets, batch):
    """Weights that make a mean over each response's own among those targets."""
    counts = jnp.maximum(sum_by_slot(targets.astype(jnp.float32), batch), 1.0)
    return jnp.where(targets, jnp.take_along_axis(1.0 / counts, batch.target_slot, axis=1), 0.0)


def _of_logits(method, hyper):
    return lambda token, *logits: method.loss(*logits, **hyper)


def _distil(method, forward, batch, loss, weights):
    towers = (forward.tower, *(forward.frozen[role] for role in method.frozen))

    def at_targets(token, *logits):
        return loss(token, *logits), values_at_targets(token, logits[0])

    total, (values, tokens) = weighted_sum(at_targets, weights, towers, batch, chunk=forward.chunk)
    return total, token_metrics(tokens, batch) | {"divergence": mean_over(values, scored_targets(batch))}
