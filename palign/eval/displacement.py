"""Likelihood displacement: what a preference loss does to the preferred response, and the score that foretells it.

Everything here is a diagnostic. Hidden states are those that the unembedding multiplies, after the final norm: what
`LanguageModel.hidden` gives.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from palign.losses.checks import as_float, check_mask, check_pairs
from palign.sharding.mesh import ROWS, TOKENS, over_rows, own_columns, sum_over_pieces
from palign.types import Batch


class Displacement(NamedTuple):
    """What training did to the two responses of each pair."""

    chosen: Float[Array, " B"]  # change of the chosen response's log-probability, nats
    rejected: Float[Array, " B"]  # change of the rejected response's, nats
    displaced: Bool[Array, " B"]  # whether the chosen response became less likely


def displacement(policy_logps: Float[Array, "B 2"], initial_logps: Float[Array, "B 2"]) -> Displacement:
    """Change of the chosen and of the rejected log-probability since training began.

    `chosen = log pi(y_w) - log pi_0(y_w)`, `rejected` likewise; a pair is displaced where `chosen < 0`.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response now, in
            nats, summed over response tokens.
        initial_logps: `[B, 2]`, the same before training. Under DPO that is the reference, where training began
            from it.

    Returns:
        Three arrays `[B]`: the changes in nats, and whether the pair is displaced. A change of 0 is no displacement.

    Raises:
        ValueError: a shape is not `[B, 2]`, or the shapes differ.

    References:
        Razin et al., "Unintentional Unalignment: Likelihood Displacement in Direct Preference Optimization",
        arXiv 2410.08847.

    Notes:
        A margin that grows says nothing of this: it also grows where both responses lose and the rejected one loses
        more. TRL logs `logps/chosen` and leaves the subtraction to the reader.

    Examples:
        The first pair's margin grew by 5 nats though its chosen response lost 3: it is displaced.

        >>> import jax.numpy as jnp
        >>> from palign.eval.displacement import displacement
        >>> now, before = jnp.array([[-13.0, -20.0], [-9.0, -12.0]]), jnp.array([[-10.0, -12.0], [-10.0, -12.0]])
        >>> change = displacement(now, before)
        >>> print(change.chosen, change.rejected, change.displaced)
        [-3.  1.] [-8.  0.] [ True False]
    """
    check_pairs("displacement", policy_logps=policy_logps, initial_logps=initial_logps)
    change = as_float(policy_logps) - as_float(initial_logps)
    return Displacement(change[:, 0], change[:, 1], change[:, 0] < 0)


def ches(hidden_sums: Float[Array, "B 2 D"]) -> Float[Array, " B"]:
    """Centred hidden embedding similarity: how alike the two responses are to the model that is to be trained.

    `CHES = <S_w, S_l> - ||S_w||^2`, with `S = sum_k h(x, y_<k)` over the response's tokens `y_k`.

    The higher it is, the more a preference loss on the pair is expected to lower the chosen response as well.

    Args:
        hidden_sums: `[B, 2, D]`, sums of the hidden states that *predict* the tokens of the chosen (0) and the rejected
            (1) response: from the last prompt token's to that of the last token but one. `hidden_sums_by_slot` and
            `dense_hidden_sums` make them.

    Returns:
        `[B]`, f32 at least, in squared units of the hidden states. 0 where both responses are the same, and at most
        `||S_w|| (||S_l|| - ||S_w||)`. It grows with the square of the lengths: pairs of different lengths are compared
        by `length_normalised_ches`.

    Raises:
        ValueError: the shape is not `[B, 2, D]`.

    References:
        Razin et al., "Unintentional Unalignment: Likelihood Displacement in Direct Preference Optimization",
        arXiv 2410.08847, the definition of the CHES score.

    Notes:
        The authors' `ches.py` is right for left-padded batches only, and one of their experiment scripts also adds the
        hidden state of the response's last token, which predicts nothing. Sums by target have neither problem.

    Examples:
        <(1, 2), (3, 1)> = 5 and ||(1, 2)||^2 = 5. A response against itself has 0.

        >>> import jax.numpy as jnp
        >>> from palign.eval.displacement import ches
        >>> print(ches(jnp.array([[[1.0, 2.0], [3.0, 1.0]], [[1.0, 2.0], [1.0, 2.0]], [[1.0, 2.0], [-1.0, 0.0]]])))
        [ 0.  0. -6.]
    """
    _check_sums("ches", hidden_sums)
    return _centred_similarity(as_float(hidden_sums))


def length_normalised_ches(hidden_sums: Float[Array, "B 2 D"], lengths: Float[Array, "B 2"]) -> Float[Array, " B"]:
    """CHES of mean hidden states, so that pairs of any lengths compare: the score to filter by.

    `CHES = <S_w, S_l> / (n_w n_l) - ||S_w||^2 / n_w^2`

    Args:
        hidden_sums: `[B, 2, D]`, as `ches` takes them.
        lengths: `[B, 2]`, how many tokens each response has. 0 counts as 1: the sum is then 0 too.

    Returns:
        `[B]`, f32 at least, in squared units of the hidden states; 0 where both responses are the same.

    Raises:
        ValueError: the shapes are not `[B, 2, D]` and `[B, 2]`, with the same B.

    References:
        Razin et al., arXiv 2410.08847, the length-normalised CHES score.

    Examples:
        The chosen response's sum (2, 4) over two tokens is a mean of (1, 2), the rejected one's is (3, 1) over one
        token: 5 - 5 = 0. By sums it is <(2, 4), (3, 1)> - 20 = -10.

        >>> import jax.numpy as jnp
        >>> from palign.eval.displacement import ches, length_normalised_ches
        >>> sums = jnp.array([[[2.0, 4.0], [3.0, 1.0]]])
        >>> print(length_normalised_ches(sums, jnp.array([[2, 1]])), ches(sums))
        [0.] [-10.]
    """
    _check_sums("length_normalised_ches", hidden_sums)
    expected = hidden_sums.shape[:2]
    chex.assert_shape(
        lengths,
        expected,
        custom_message=f"length_normalised_ches: lengths has shape {list(jnp.shape(lengths))}; expected "
        f"{list(expected)}, one length for each response of hidden_sums",
        exception_type=ValueError,
    )
    sums = as_float(hidden_sums)
    return _centred_similarity(sums / jnp.maximum(jnp.asarray(lengths), 1).astype(sums.dtype)[..., None])


def _centred_similarity(vectors):
    # Subtracted before it is multiplied: equal responses give exactly 0, and no two numbers of 1e6 cancel. No matrix
    # product either, which TPUs would round to bf16.
    return jnp.sum(vectors[:, 0] * (vectors[:, 1] - vectors[:, 0]), axis=-1)


def hidden_sums_by_slot(hidden: Float[Array, "R T D"], batch: Batch) -> Float[Array, "R slots D"]:
    """Sums, for each response, the hidden states that predict its tokens.

    `out[r, s] = sum of hidden[r, target_source[r, m]] over the targets m with target_slot[r, m] = s`

    Args:
        hidden: `[R, T, D]`, of `LanguageModel.hidden`. Receives no gradient.
        batch: its target table says which states belong to which response.

    Returns:
        `[R, 1 + G * K, D]` f32, added up in f32 whatever the model computes in; zeros in slot 0, where padding goes,
        and for responses that are not there. Where prompts and padding stand in the row does not matter.

    Raises:
        ValueError: `hidden` is not `[R, T, D]` with the batch's R and T.

    References:
        The sums of Razin et al., arXiv 2410.08847, in the definition of the CHES score.
    """
    expected = (*batch.token.shape, None)
    chex.assert_shape(
        hidden,
        expected,
        custom_message=f"hidden_sums_by_slot: hidden has shape {list(jnp.shape(hidden))}; expected "
        f"[{batch.token.shape[0]}, {batch.token.shape[1]}, D], one state for each token of the batch",
        exception_type=ValueError,
    )
    slots = 1 + batch.valid.shape[1] * batch.valid.shape[2]

    def sum_row(hidden, source, slot):
        own, place = own_columns(source, hidden.shape[0])
        predicting = jnp.where((own & (slot > 0))[:, None], hidden[place].astype(jnp.float32), 0.0)
        return jax.ops.segment_sum(predicting, slot, num_segments=slots)

    rows = over_rows(lambda *arrays: sum_over_pieces(jax.vmap(sum_row)(*arrays)), (TOKENS, ROWS, ROWS), ROWS)
    return rows(jax.lax.stop_gradient(hidden), batch.target_source, batch.target_slot)


def dense_hidden_sums(hidden: Float[Array, "B T D"], response_mask: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """Sums the hidden states that predict each row's response: for code without palign's batches.

    `out[b] = sum of hidden[b, t - 1] over the t > 0 with response_mask[b, t]`

    Args:
        hidden: `[B, T, D]`, *not* shifted: `hidden[:, t]` predicts token t + 1. After the final norm, such as
            `hidden_states[-1]` of a `transformers` model. Receives no gradient.
        response_mask: `[B, T]` bool, True for the tokens of the response, its end of turn included, aligned with the
            token ids as `losses.dense` takes it.

    Returns:
        `[B, D]`, f32 at least. Padding may stand on either side, and what it holds is never read. Nothing predicts the
        first token of a row: it is not counted.

    Raises:
        ValueError: shapes do not fit, or the mask is not boolean.

    References:
        The sums of Razin et al., arXiv 2410.08847, in the definition of the CHES score.

    Examples:
        The response is the last two tokens of four. The states before each of them are 20 and 300; the last state,
        4000, predicts nothing. A pair is two of these, stacked on axis 1.

        >>> import jax.numpy as jnp
        >>> from palign.eval.displacement import dense_hidden_sums
        >>> states = jnp.array([[[1.0], [20.0], [300.0], [4000.0]]])
        >>> print(dense_hidden_sums(states, jnp.array([[False, False, True, True]])))
        [[320.]]
    """
    check_mask("dense_hidden_sums", "response_mask", response_mask)
    expected = (*jnp.shape(response_mask), None)
    chex.assert_rank(
        [response_mask, hidden],
        [2, 3],
        custom_message=f"dense_hidden_sums: response_mask has shape {list(jnp.shape(response_mask))} and hidden "
        f"{list(jnp.shape(hidden))}; expected [B, T] and [B, T, D]",
        exception_type=ValueError,
    )
    chex.assert_shape(
        hidden,
        expected,
        custom_message=f"dense_hidden_sums: hidden has shape {list(jnp.shape(hidden))} and response_mask "
        f"{list(jnp.shape(response_mask))}; expected one state for each position of the mask",
        exception_type=ValueError,
    )
    states = jax.lax.stop_gradient(as_float(hidden))[:, :-1]
    return jnp.sum(jnp.where(jnp.asarray(response_mask)[:, 1:, None], states, 0.0), axis=1)


def _check_sums(function, hidden_sums):
    chex.assert_shape(
        hidden_sums,
        (None, 2, None),
        custom_message=f"{function}: hidden_sums has shape {list(jnp.shape(hidden_sums))}; expected [B, 2, D] with "
        "0 = chosen, 1 = rejected on axis 1: sums over each response's tokens, not the states themselves",
        exception_type=ValueError,
    )
