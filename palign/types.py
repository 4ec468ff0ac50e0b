"""The values that pass between palign's parts.

All are NamedTuples, so they are pytrees without this module importing jax: the data pipeline fills them with numpy
arrays, the training step sees the same types as `jax.Array`s, and in a global batch every leaf has one more leading
axis `A` (micro-batches).

Letters used throughout palign:
    R rows, T tokens in a row, G trees (examples) in a row, K responses of an example, M targets in a row,
    N block pairs in a row, P response pairs in a row, B = examples or pairs in a loss, V vocabulary, D model width.
"""

from typing import Any, NamedTuple

# A numpy array on the host, a jax.Array on devices. Shapes stand beside each field.
Array = Any


class Batch(NamedTuple):
    """Rows of packed trees: each prompt once, its responses as branches (see docs/batch.md).

    `group` is the prompt copy a token belongs to (attention only; 0 = padding), `branch` is 0 for prompt tokens and k
    for tokens of response k, `position` restarts at the prompt's end in every branch. Targets are listed, not shifted:
    the hidden state at `target_source` predicts `target_token` for the response in `target_slot`.

    A slot names a response inside its row: `1 + e * K + (k - 1)` for response k (1..K) of example e (0..G-1); 0 is
    padding.
    """

    token: Array  # [R, T] int32
    position: Array  # [R, T] int32
    group: Array  # [R, T] int32, 0 = padding
    branch: Array  # [R, T] int32, 0 = prompt, k = response k
    target_source: Array  # [R, M] int32, column of the predicting hidden state
    target_token: Array  # [R, M] int32
    target_slot: Array  # [R, M] int32, 0 = padding
    block_pairs: Array  # [R, N, 2] int32 (query block, key block), sorted by query block, padded with (last, -1)
    valid: Array  # [R, G, K] bool; a response that is there but not valid belongs to another prompt (KTO's KL)
    scores: Array  # [R, G, K] float32, higher is better
    pairs: Array  # [R, P, 2] int32 slots (preferred, other), 0 = padding
    response_end: Array  # [R, G, K] int32, column of each response's last token, -1 = none
    example_id: Array  # [R, G] int32, -1 = none
    reference_logps: Array | None = None  # [R, M] float32, cached log-probs of the targets under the reference
    weight: Array | None = None  # [R, G] float32, importance of each example; None = 1
    hidden: dict[str, Array] | None = None  # role -> [R, M, D], cached hidden states of a frozen model at the targets


class Mean(NamedTuple):
    """A mean that has not been divided yet, so that shards and micro-batches add up exactly."""

    sum: Array  # [] float32
    count: Array  # [] float32


class Terms(NamedTuple):
    """What an objective returns: summed loss terms, each with its own denominator elsewhere, and metrics."""

    terms: dict[str, Array]  # name -> [] float32 sum over this micro-batch
    metrics: dict[str, Mean]
    observations: dict[str, Any]  # method -> sums that it remembers after the step; empty for most


class Unembedding(NamedTuple):
    """The map from hidden states to logits: `softcap(hidden @ kernel)`, of which the first `vocab_size` are real."""

    kernel: Array  # [D, V padded]
    softcap: float | None
    vocab_size: int
