"""The kinds of methods: how a pure loss is fed from a batch of trees.

Pairwise losses read the listed pairs, listwise ones whole examples, token losses the targets, and distillation losses
the logits of several models at each target.
"""

from collections.abc import Callable

import jax.numpy as jnp

from palign.heads.target_values import TokenValues, values_at_targets
from palign.heads.weighted_sum import weighted_sum
from palign.losses import implicit_rewards
from palign.objectives.base import Forward, Method, lengths_by_slot, mean_over, sum_by_slot
from palign.types import Array, Batch, Mean


def num_pairs(batch: Batch) -> Array:
    """How many pairs are listed."""
    return jnp.sum(batch.pairs[..., 0] > 0).astype(jnp.float32)


def num_lists(batch: Batch) -> Array:
    """How many examples hold a preference: two responses or more, not all of one score."""
    top = jnp.max(jnp.where(batch.valid, batch.scores, -jnp.inf), axis=-1)
    bottom = jnp.min(jnp.where(batch.valid, batch.scores, jnp.inf), axis=-1)
    return jnp.sum(top > bottom).astype(jnp.float32)


def num_targets(batch: Batch) -> Array:
    """How many tokens are learned."""
    return jnp.sum(batch.target_slot > 0).astype(jnp.float32)


def preferred_targets(batch: Batch) -> Array:
    """The targets of each example's preferred response, the first of equals: `[R, M]` bool."""
    R, _, K = batch.valid.shape
    best = jnp.argmax(jnp.where(batch.valid, batch.scores, -jnp.inf), axis=-1)
    preferred = (best[..., None] == jnp.arange(K)[None, None]).reshape(R, -1)
    preferred = jnp.pad(preferred, ((0, 0), (1, 0)))  # slot 0 is padding
    return jnp.take_along_axis(preferred, batch.target_slot, axis=1)


def num_preferred_targets(batch: Batch) -> Array:
    """How many tokens the preferred responses have."""
    return jnp.sum(preferred_targets(batch)).astype(jnp.float32)


def num_responses(batch: Batch) -> Array:
    """How many responses there are."""
    return jnp.sum(batch.valid).astype(jnp.float32)


def pairwise(loss: Callable) -> Method:
    """A loss on summed log-probabilities of pairs, against a reference."""
    return Method(loss, _pairwise_term, num_pairs, reference=True, compares=True)


def pairwise_average(loss: Callable) -> Method:
    """A loss on per-token average log-probabilities of pairs, against a reference."""
    return Method(loss, _pairwise_average_term, num_pairs, reference=True, compares=True)


def pairwise_reference_free(loss: Callable) -> Method:
    """A loss on per-token average log-probabilities of pairs, without a reference."""
    return Method(loss, _pairwise_free_term, num_pairs, compares=True)


def listwise(loss: Callable) -> Method:
    """A loss on whole examples, against a reference; the mean is over examples that hold a preference."""
    return Method(loss, _listwise_term, num_lists, reference=True, compares=True)


def likelihood(loss: Callable) -> Method:
    """A loss on the log-probabilities of each example's preferred response, averaged over tokens (TRL's `sft`)."""
    return Method(loss, _likelihood_term, num_preferred_targets, logps=False)


def distillation(loss: Callable, *frozen: str) -> Method:
    """A loss on the logits of the policy and of frozen models at every target, averaged over tokens."""
    return Method(loss, _distillation_term, num_targets, logps=False, frozen=frozen)


def sequence_distillation(loss: Callable, *frozen: str) -> Method:
    """Like `distillation`, but the mean over a response's tokens first, then over responses."""
    return Method(loss, _sequence_distillation_term, num_responses, logps=False, frozen=frozen)


def _at_pairs(by_slot: Array, batch: Batch) -> Array:
    """Values of the listed pairs: `[R, slots]` -> `[R * P, 2]`."""
    rows, pairs = batch.pairs.shape[:2]
    return jnp.take_along_axis(by_slot, batch.pairs.reshape(rows, -1), axis=1).reshape(rows * pairs, 2)


def _at_lists(by_slot: Array, batch: Batch) -> Array:
    """Values of every example's responses: `[R, slots]` -> `[R * G, K]`."""
    return by_slot[:, 1:].reshape(-1, batch.valid.shape[2])


def _sums(forward: Forward, batch: Batch) -> tuple[Array, Array]:
    """Sequence log-probabilities of policy and reference, by slot."""
    assert forward.tokens is not None and forward.reference_logps is not None  # `Method` says that it reads them
    return sum_by_slot(forward.tokens.logps, batch), sum_by_slot(forward.reference_logps, batch)


def _pairwise_term(method, forward, batch, hyper):
    policy, reference = _sums(forward, batch)
    values = method.loss(_at_pairs(policy, batch), _at_pairs(reference, batch), **hyper)
    return _sum_listed(values, batch), _preference_metrics(policy, reference, hyper.get("beta", 1.0), batch)


def _pairwise_average_term(method, forward, batch, hyper):
    policy, reference = _sums(forward, batch)
    lengths = lengths_by_slot(batch)
    values = method.loss(_at_pairs(policy / lengths, batch), _at_pairs(reference / lengths, batch), **hyper)
    return _sum_listed(values, batch), _preference_metrics(policy, reference, hyper.get("beta", 1.0), batch)


def _pairwise_free_term(method, forward, batch, hyper):
    policy = sum_by_slot(forward.tokens.logps, batch)
    average = policy / lengths_by_slot(batch)
    values = method.loss(_at_pairs(average, batch), **hyper)
    metrics = _preference_metrics(average, jnp.zeros_like(average), hyper.get("beta", 1.0), batch)
    return _sum_listed(values, batch), metrics | _logp_metrics(policy, batch)


def _listwise_term(method, forward, batch, hyper):
    policy, reference = _sums(forward, batch)
    lists = [_at_lists(x, batch) for x in (policy, reference)]
    labels, valid = (x.reshape(lists[0].shape) for x in (batch.scores, batch.valid))
    values = method.loss(*lists, labels, valid, **hyper)
    return jnp.sum(values), _preference_metrics(policy, reference, hyper.get("beta", 1.0), batch)


def _sum_listed(values, batch):
    return jnp.sum(jnp.where(_listed(batch), values, 0.0))


def _listed(batch):
    return batch.pairs[..., 0].reshape(-1) > 0


def _logp_metrics(policy, batch):
    logps, listed = _at_pairs(policy, batch), _listed(batch)
    return {"logps/chosen": mean_over(logps[:, 0], listed), "logps/rejected": mean_over(logps[:, 1], listed)}


def _preference_metrics(policy, reference, beta, batch):
    """TRL's names; a reward is `beta` times the log-ratio, and an accuracy counts strictly larger ones."""
    rewards, listed = implicit_rewards(_at_pairs(policy, batch), _at_pairs(reference, batch), beta=beta), _listed(batch)
    margins = rewards[:, 0] - rewards[:, 1]
    return _logp_metrics(policy, batch) | {
        "rewards/chosen": mean_over(rewards[:, 0], listed),
        "rewards/rejected": mean_over(rewards[:, 1], listed),
        "rewards/margins": mean_over(margins, listed),
        "rewards/accuracies": mean_over((margins > 0).astype(jnp.float32), listed),
    }


def token_metrics(tokens: TokenValues, batch: Batch) -> dict[str, Mean]:
    """TRL's names, averaged over targets."""
    listed = batch.target_slot > 0
    return {"entropy": mean_over(tokens.entropy, listed), "mean_token_accuracy": mean_over(tokens.correct, listed)}


def _likelihood_term(method, forward, batch, hyper):
    learned = preferred_targets(batch)
    if forward.tokens is not None:  # another method has asked for them already
        return jnp.sum(jnp.where(learned, method.loss(forward.tokens.logps, **hyper), 0.0)), {}

    def at_targets(token, logits):
        tokens = values_at_targets(token, logits)
        return method.loss(tokens.logps, **hyper), tokens

    weights = learned.astype(jnp.float32)
    total, (_, tokens) = weighted_sum(at_targets, weights, (forward.tower,), batch, chunk=forward.chunk)
    return total, token_metrics(tokens, batch)


def _distillation_term(method, forward, batch, hyper):
    return _distil(method, forward, batch, hyper, jnp.ones(batch.target_slot.shape, jnp.float32))


def _sequence_distillation_term(method, forward, batch, hyper):
    weights = jnp.take_along_axis(1.0 / lengths_by_slot(batch), batch.target_slot, axis=1)
    return _distil(method, forward, batch, hyper, weights)


def _distil(method, forward, batch, hyper, weights):
    towers = (forward.tower, *(forward.frozen[role] for role in method.frozen))

    def at_targets(token, *logits):
        return method.loss(*logits, **hyper), values_at_targets(token, logits[0])

    total, (values, tokens) = weighted_sum(at_targets, weights, towers, batch, chunk=forward.chunk)
    listed = batch.target_slot > 0
    return total, token_metrics(tokens, batch) | {"divergence": mean_over(values, listed)}
