"""Language models so small that every response can be listed: what is elsewhere an expectation is here a sum.

A response is drawn token by token until the end of turn, or until it has `max_length` tokens and is cut. A state is a
prefix without end of turn: what a token is drawn from. A *table* `[..., S, V]` of logits, one row a state, is a
language model for one prompt, and leading axes are prompts. Every distribution over the N responses is the one of a
table, so nothing that is found here is owed to a model's architecture. Functions are pure and keep float64 under
`jax.enable_x64`; to `jax.jit` a `ResponseSpace` is a constant, whether passed or closed over.

Letters: S states, N responses, L the most tokens of a response, V vocabulary.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from palign.data.tokenize import TokenTree
from palign.eval.score import as_dataset, sequence_logps
from palign.losses.checks import as_float, check_positive, check_shape
from palign.models.protocol import LanguageModel

MOST_RESPONSES = 1_000_000
BLOCK = 64  # of attention, in tokens


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class ResponseSpace:
    """Every state and every response over a vocabulary, and how they hang together.

    Attributes:
        vocab_size: V, the end of turn included.
        prefixes: the S states as tokens, shortest first; the first is empty.
        responses: the N responses as tokens, the end of turn included where there is one.
        child: `[S, V]` int32, the node that a token leads to: a state below S, else S + the number of a response.
        state: `[N, L]` int32, the state that token t of a response is drawn from; 0 beyond its end.
        token: `[N, L]` int32, the token; 0 beyond the end.
        keep: `[N, L]` bool, where a token is.
        levels: for each length of a prefix, the first state of that length and the one after the last.
    """

    vocab_size: int
    prefixes: tuple[tuple[int, ...], ...]
    responses: tuple[tuple[int, ...], ...]
    child: np.ndarray
    state: np.ndarray
    token: np.ndarray
    keep: np.ndarray
    levels: tuple[tuple[int, int], ...]

    @property
    def num_states(self) -> int:
        """S."""
        return len(self.prefixes)

    @property
    def num_responses(self) -> int:
        """N."""
        return len(self.responses)

    @property
    def lengths(self) -> np.ndarray:
        """`[N]`, tokens of each response, the end of turn included."""
        return self.keep.sum(-1)


@functools.cache
def all_responses(vocab_size: int, max_length: int, *, eos: int = 0) -> ResponseSpace:
    """Lists every response of at most `max_length` tokens.

    With W = V - 1 words there are `S = sum_{l < L} W^l` states, and `N = S + W^L` responses: one that ends at every
    state, and those that are cut. Their probabilities sum to 1 under any table.

    Args:
        vocab_size: V, at least 2.
        max_length: L, at least 1; the end of turn counts.
        eos: the token that ends a turn.

    Returns:
        The space; the same object for the same arguments.

    Raises:
        ValueError: a number is out of range, or there are more than a million responses.

    Examples:
        Two words and an end of turn, at most two tokens: "", "1", "2" that end, and four that are cut.

        >>> from palign.eval.enumerate import all_responses
        >>> all_responses(3, 2).responses
        ((0,), (1, 0), (2, 0), (1, 1), (1, 2), (2, 1), (2, 2))
    """
    if vocab_size < 2 or max_length < 1 or not 0 <= eos < vocab_size:
        raise ValueError(
            f"all_responses got vocab_size={vocab_size}, max_length={max_length}, eos={eos}; expected at least two "
            f"tokens, a length of at least 1, and eos among the tokens"
        )
    words = [token for token in range(vocab_size) if token != eos]
    sizes = [len(words) ** length for length in range(max_length + 1)]
    if sum(sizes) > MOST_RESPONSES:
        raise ValueError(
            f"all_responses: vocab_size={vocab_size} and max_length={max_length} give {sum(sizes)} responses; expected "
            f"at most {MOST_RESPONSES}. Take a smaller vocabulary or a shorter length"
        )
    prefixes = tuple(p for length in range(max_length) for p in itertools.product(words, repeat=length))
    responses = (*((*p, eos) for p in prefixes), *itertools.product(words, repeat=max_length))
    ends = list(itertools.accumulate(sizes[:-1]))
    levels = tuple(zip([0, *ends[:-1]], ends, strict=True))
    child, state, token, keep = _links(vocab_size, prefixes, responses)
    return ResponseSpace(vocab_size, prefixes, responses, child, state, token, keep, levels)


def _links(vocab_size, prefixes, responses):
    """The arrays of a `ResponseSpace`: child `[S, V]`, state, token and keep `[N, L]`."""
    node = {tokens: i for i, tokens in enumerate((*prefixes, *responses))}
    child = [[node[(*prefix, token)] for token in range(vocab_size)] for prefix in prefixes]
    shape = (len(responses), max(map(len, responses)))
    state, token, keep = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    for n, tokens in enumerate(responses):
        for t, drawn in enumerate(tokens):
            state[n, t], token[n, t], keep[n, t] = node[tokens[:t]], drawn, True
    return np.asarray(child, np.int32), state, token, keep


def response_logps(space: ResponseSpace, logits: Float[Array, "*prompts S V"]) -> Float[Array, "*prompts N"]:
    """Log-probability of every response under a table: the sum over its tokens.

    `log pi(y) = sum_t log softmax(logits[s_t])[y_t]`

    Args:
        space: the responses.
        logits: `[..., S, V]`, one row a state; a constant added to a row changes nothing.

    Returns:
        `[..., N]` in nats; the probabilities sum to 1.

    Raises:
        ValueError: the shape is not `[..., S, V]`.

    Examples:
        A fair coin that ends the turn at once or, with two words left, after one more draw.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign.eval.enumerate import all_responses, response_logps
        >>> print(np.exp(np.asarray(response_logps(all_responses(2, 2), jnp.zeros((2, 2))))).round(4))
        [0.5  0.25 0.25]
    """
    _check("response_logps", space, (space.num_states, space.vocab_size), logits=logits)
    logps = jax.nn.log_softmax(as_float(logits), axis=-1)
    return _sum_kept(space, logps[..., space.state, space.token])


def conditional_logits(space: ResponseSpace, logps: Float[Array, "*prompts N"]) -> Float[Array, "*prompts S V"]:
    """The table that has a given distribution over responses: the inverse of `response_logps`.

    `logits[s, v] = log P(prefix s followed by v) - log P(prefix s)`

    Args:
        space: the responses.
        logps: `[..., N]` in nats, finite. A constant added to all of them changes nothing, so they may be scores.

    Returns:
        `[..., S, V]`, log-probabilities of the next token at every state.

    Raises:
        ValueError: the shape is not `[..., N]`.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign.eval.enumerate import all_responses, conditional_logits
        >>> logits = conditional_logits(all_responses(2, 2), jnp.log(jnp.array([0.2, 0.6, 0.2])))
        >>> print(np.exp(np.asarray(logits)).round(4))
        [[0.2  0.8 ]
         [0.75 0.25]]
    """
    _check("conditional_logits", space, (space.num_responses,), logps=logps)
    logps = as_float(logps)
    zeros = jnp.zeros((*logps.shape[:-1], *space.child.shape), logps.dtype)
    mass = back_up(space, zeros, logps)
    return mass[..., space.child] - mass[..., : space.num_states, None]


def back_up(
    space: ResponseSpace,
    scores: Float[Array, "*prompts S V"],
    ends: Float[Array, "*prompts N"],
    *,
    beta: float | Float[Array, "*prompts S"] = 1.0,
) -> Float[Array, "*prompts nodes"]:
    """The soft Bellman recursion, from the ends of the responses back to the empty prefix.

    `V(s) = beta log sum_v exp(scores[s, v] + V(child(s, v)) / beta)`, and `V = ends` where a response ends.

    Args:
        space: the responses.
        scores: `[..., S, V]`, in nats: what a token adds at its state.
        ends: `[..., N]`, values of the finished responses, in units of beta.
        beta: the temperature, above 0, or `[..., S]` one for each state.

    Returns:
        `[..., S + N]`, values of the states and then of the responses, in units of beta: what `space.child` indexes.

    Raises:
        ValueError: a shape is wrong, or `beta` is a plain number that is not finite and above 0.

    References:
        Ziebart, "Modeling Purposeful Adaptive Behavior with the Principle of Maximum Causal Entropy" (2010).

    Examples:
        Two tokens, two draws, nothing scored: the logarithm of the number of responses.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign.eval.enumerate import all_responses, back_up
        >>> values = back_up(all_responses(2, 2), jnp.zeros((2, 2)), jnp.zeros(3))
        >>> print(np.exp(np.asarray(values)).round(4))
        [3. 2. 1. 1. 1.]
    """
    _check("back_up", space, (space.num_states, space.vocab_size), scores=scores)
    _check("back_up", space, (space.num_responses,), ends=ends)
    check_positive("back_up", beta=beta)
    scores, ends = as_float(scores), as_float(ends)
    temperature = jnp.broadcast_to(jnp.asarray(beta, scores.dtype), scores.shape[:-1])
    values = jnp.concatenate([jnp.zeros_like(temperature), ends], axis=-1)
    for first, last in reversed(space.levels):
        here = temperature[..., first:last]
        tokens = scores[..., first:last, :] + values[..., space.child[first:last]] / here[..., None]
        values = values.at[..., first:last].set(here * jax.nn.logsumexp(tokens, axis=-1))
    return values


def along_responses(space: ResponseSpace, values: Float[Array, "*prompts S"]) -> Float[Array, "*prompts N"]:
    """Sum of a value over the states that a response passes: a loss per position becomes one per response.

    `out[n] = sum_t values[s_t]`

    Args:
        space: the responses.
        values: `[..., S]`, one for each state.

    Returns:
        `[..., N]`; divide by `space.lengths` for the mean over tokens.

    Raises:
        ValueError: the shape is not `[..., S]`.

    Examples:
        With 1 at every state it counts tokens.

        >>> import jax.numpy as jnp
        >>> from palign.eval.enumerate import all_responses, along_responses
        >>> print(along_responses(all_responses(2, 3), jnp.ones(3)))
        [1. 2. 3. 3.]
    """
    _check("along_responses", space, (space.num_states,), values=values)
    return _sum_kept(space, as_float(values)[..., space.state])


def _sum_kept(space, values):
    """Sum over the tokens that are there of values `[..., N, L]`."""
    return jnp.where(jnp.broadcast_to(space.keep, values.shape), values, 0.0).sum(-1)


def model_logps(
    lm: LanguageModel, params: Any, prompts: Sequence[np.ndarray], space: ResponseSpace, mesh: Mesh
) -> np.ndarray:
    """Log-probability of every response under a language model: its forward pass over trees with N branches.

    Args:
        lm: a model whose vocabulary is the space's.
        params: its parameters.
        prompts: token ids of each prompt.
        space: the responses. `conditional_logits` makes the table that equals the model on them.
        mesh: the devices.

    Returns:
        `[P, N]` in nats, float64 sums of the model's float32 values.

    Raises:
        ValueError: the vocabularies differ.
    """
    vocab_size = lm.unembed(params).vocab_size
    if vocab_size != space.vocab_size:
        raise ValueError(
            f"model_logps: the model has {vocab_size} tokens, the space {space.vocab_size}; expected the same number. "
            f"List the model's responses with all_responses({vocab_size}, ...)"
        )
    responses = tuple(np.asarray(tokens, np.int32) for tokens in space.responses)
    scores = (0.0,) * len(responses)
    trees = [TokenTree(np.asarray(prompt, np.int32), responses, scores, i) for i, prompt in enumerate(prompts)]
    longest = max(len(prompt) for prompt in prompts) + int(space.lengths.sum())
    dataset = as_dataset(trees, row_length=-(-longest // BLOCK) * BLOCK, rows_per_step=1, block=BLOCK)
    return np.stack(sequence_logps(lm, params, dataset, mesh))


def _check(function: str, space: ResponseSpace, shape: tuple[int, ...], **arrays: Array) -> None:
    """Raises ValueError unless the last axes of every array are the given ones."""
    for name, array in arrays.items():
        sizes = f"{space.num_states} states, {space.vocab_size} tokens and {space.num_responses} responses"
        expected = f"[..., {', '.join(map(str, shape))}]: the space has {sizes}"
        leading = (None,) * (jnp.ndim(array) - len(shape))
        check_shape(function, expected, (*leading, *shape), **{name: array})
