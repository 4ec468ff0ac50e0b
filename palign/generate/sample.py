"""Sampling with a KV cache: K samples of every prompt, whose cache they share."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from palign.heads.targets import PADDED_LOGIT, finish_logits
from palign.models.protocol import Cache, LanguageModel
from palign.types import Unembedding

DRAW_BLOCK = 128  # logits; any size draws the same distribution


class Samples(NamedTuple):
    """K continuations of each of B prompts, of at most N tokens."""

    token: Int[Array, "B K N"]  # EOS included; 0 after it
    length: Int[Array, "B K"]  # tokens, EOS included
    finished: Bool[Array, "B K"]  # whether EOS came
    logps: Float[Array, "B K"]  # nats, summed, under the model itself (temperature 1, no cut)


class _Carry(NamedTuple):
    step: Array
    hidden: Array  # [B, K, D] that predicts the next token
    cache: Cache
    samples: Samples
    key: Array


@functools.cache
def make_sampler(
    lm: LanguageModel,
    *,
    samples: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Callable[[Any, Array, Array, Array], Samples]:
    """Makes `sample(params, token [B, P], length [B], key) -> Samples`, jitted; prompts are right-padded.

    Logits are divided by the temperature, then cut to the `top_k` largest, then to the smallest set of most likely
    tokens whose probability reaches `top_p`. Padding of the vocabulary is never emitted. A sample ends with EOS.

    Args:
        lm: the model.
        samples: K, how many of each prompt.
        max_new_tokens: N.
        eos_ids: the tokens that end a sample.
        temperature: 0 takes the most likely token.
        top_k: 0 for all.
        top_p: 1 for all.

    Raises:
        ValueError: a setting out of its range.
    """
    _check(samples, max_new_tokens, temperature, top_k, top_p)
    pick = functools.partial(pick_tokens, temperature=temperature, top_k=top_k, top_p=top_p)

    @jax.jit
    def sample(params, token, length, key) -> Samples:
        unembedding = lm.unembed(params)
        hidden, cache = lm.prefill(params, token, length, samples=samples, capacity=max_new_tokens)
        shape = (token.shape[0], samples)
        hidden = jnp.broadcast_to(hidden[:, None], (*shape, hidden.shape[-1]))
        carry = _Carry(jnp.zeros((), jnp.int32), hidden, cache, _nothing(*shape, max_new_tokens), key)

        def go_on(carry):
            return (carry.step < max_new_tokens) & ~jnp.all(carry.samples.finished)

        def advance(carry):
            logits = next_logits(carry.hidden, unembedding)
            chosen = pick(logits, jax.random.fold_in(carry.key, carry.step))
            grown = _append(carry.samples, carry.step, chosen, logits, jnp.asarray(eos_ids))
            hidden, cache = lm.decode_step(params, carry.cache, chosen)
            return _Carry(carry.step + 1, hidden, cache, grown, carry.key)

        return jax.lax.while_loop(go_on, advance, carry).samples

    return sample


def next_logits(hidden: Float[Array, "*batch D"], unembedding: Unembedding) -> Float[Array, "*batch V"]:
    """Float32 logits, padding of the vocabulary masked."""
    kernel = unembedding.kernel
    raw = jnp.matmul(hidden.astype(kernel.dtype), kernel, preferred_element_type=jnp.float32)
    flat = finish_logits(raw.reshape(-1, raw.shape[-1]), unembedding.softcap, unembedding.vocab_size)
    return flat.reshape(raw.shape)


def pick_tokens(
    logits: Float[Array, "*batch V"], key: Array, *, temperature: float, top_k: int, top_p: float
) -> Int[Array, "*batch"]:
    """Draws one token from each row of logits; see `make_sampler`."""
    if temperature == 0:
        return most_likely(logits)
    logits = cut_logits(logits / temperature, top_k=top_k, top_p=top_p)
    return draw_tokens(logits, key)


def most_likely(logits: Float[Array, "*batch V"]) -> Int[Array, "*batch"]:
    """The first of the largest. `jnp.argmax` is scalar code on a CPU: two passes take a sixth of its time."""
    size = logits.shape[-1]
    largest = logits == jnp.max(logits, axis=-1, keepdims=True)
    return jnp.minimum(jnp.min(jnp.where(largest, jnp.arange(size, dtype=jnp.int32), size), axis=-1), size - 1)


def draw_tokens(logits: Float[Array, "*batch V"], key: Array) -> Int[Array, "*batch"]:
    """Draws from `softmax(logits)` by its cumulative distribution: over `DRAW_BLOCK`s first, then within one.

    That takes a random number for a row; Gumbel noise, as of `jax.random.categorical`, takes one for every logit, which
    was half of the time of sampling on a CPU.
    """
    weight = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    short = -weight.shape[-1] % DRAW_BLOCK
    blocks = jnp.pad(weight, [(0, 0)] * (weight.ndim - 1) + [(0, short)]).reshape(*weight.shape[:-1], -1, DRAW_BLOCK)
    sums = jnp.sum(blocks, axis=-1)
    place = jax.random.uniform(key, sums.shape[:-1]) * jnp.sum(sums, axis=-1)
    block, place = _find(sums, place)
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    return block * DRAW_BLOCK + _find(inside, place)[0]


def _find(weight: Float[Array, "*batch N"], place: Float[Array, "*batch"]) -> tuple[Int[Array, "*batch"], Array]:
    """In whose interval a place lies, where intervals as long as the weights follow one another; how far into it.

    It is the last that begins before, among those that have a length: rounding never finds an entry of weight 0.
    """
    ends = jnp.cumsum(weight, axis=-1)
    starts = jnp.pad(ends[..., :-1], [(0, 0)] * (ends.ndim - 1) + [(1, 0)])
    begun = (starts <= place[..., None]) & (weight > 0)
    index = jnp.max(jnp.where(begun, jnp.arange(weight.shape[-1], dtype=jnp.int32), 0), axis=-1)
    return index, place - jnp.take_along_axis(starts, index[..., None], axis=-1)[..., 0]


def cut_logits(logits: Float[Array, "*batch V"], *, top_k: int, top_p: float) -> Float[Array, "*batch V"]:
    """Masks what top-k and then top-p leave out; ties at the edge stay in, and the most likely token always does."""
    if top_k and top_k < logits.shape[-1]:
        edge = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits >= edge, logits, PADDED_LOGIT)
    if top_p < 1:
        falling = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        probability = jax.nn.softmax(falling, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability  # of all that are more likely
        edge = jnp.min(jnp.where(before < top_p, falling, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= edge, logits, PADDED_LOGIT)
    return logits


def _nothing(B: int, K: int, N: int) -> Samples:
    return Samples(
        jnp.zeros((B, K, N), jnp.int32), jnp.zeros((B, K), jnp.int32), jnp.zeros((B, K), bool), jnp.zeros((B, K))
    )


def _append(samples: Samples, step, chosen, logits, eos_ids: Array) -> Samples:
    open_ = ~samples.finished
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), chosen[..., None], axis=-1)[..., 0]
    return Samples(
        samples.token.at[:, :, step].set(jnp.where(open_, chosen, 0)),
        samples.length + open_.astype(jnp.int32),
        samples.finished | jnp.isin(chosen, eos_ids),
        samples.logps + jnp.where(open_, logp, 0.0),
    )


def _check(samples, max_new_tokens, temperature, top_k, top_p):
    for name, value, good, expected in (
        ("samples", samples, samples >= 1, "1 or more"),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "0 (most likely token) or above"),
        ("top_k", top_k, top_k >= 0, "0 (all) or above"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0, at most 1 (all)"),
    ):
        if not good:
            raise ValueError(f"{name} = {value}: expected {expected}")
