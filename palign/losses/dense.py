"""From logits `[B, T, V]`: for code that holds them, outside palign's own heads.

`logits[:, t]` predicts `ids[:, t + 1]`. That shift is made here, once; everything that goes in or comes out is aligned
with `ids`. `response_mask[b, t]` says that token t of row b belongs to the response: its first token and its end of
turn included, prompt and padding not. Padding may stand on either side, and what it holds is never read.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from palign.losses import distill
from palign.losses.checks import as_float, check_mask, check_same_shape


def token_logps(
    logits: Float[Array, "B T V"], ids: Int[Array, "B T"], response_mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Log-probability of every response token.

    `out[b, t] = log softmax(logits[b, t - 1])[ids[b, t]]` where the mask is True and t > 0, else 0.

    Args:
        logits: `[B, T, V]`, *not* shifted: position t predicts `ids[:, t + 1]`.
        ids: `[B, T]`, token ids in [0, V) where the mask is True, anything elsewhere (such as -100).
        response_mask: `[B, T]` bool, True for the tokens of the response, aligned with `ids`.

    Returns:
        `[B, T]` in nats, f32, aligned with `ids`. Nothing predicts the first token of a row: it is 0. An id outside
        [0, V) under the mask gives NaN rather than another token's log-probability.

    Raises:
        ValueError: shapes do not fit, or the mask is not boolean.

    References:
        The per-token terms of log pi(y | x) in Rafailov et al., arXiv 2305.18290, section 3.

    Notes:
        A mask applied to logits without this shift drops the first response token and trains the position after the
        last one: the bug of AlignDistil's and EasyDeL's distillation.

    Examples:
        Row 0 of the logits predicts ids[1], row 1 predicts ids[2]; the last row predicts nothing. Uniform over four
        tokens is -log 4 = -1.3863.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> ids, mask = jnp.array([[2, 0, 3]]), jnp.array([[False, True, True]])
        >>> print(np.asarray(losses.dense.token_logps(jnp.zeros((1, 3, 4)), ids, mask)).round(4))
        [[ 0.     -1.3863 -1.3863]]
    """
    keep, (shifted,) = _predicting("token_logps", response_mask, logits=logits)
    check_same_shape("token_logps", ids=ids, response_mask=response_mask)
    # Negative ids would wrap around; beyond the end they are filled with NaN like all others out of range.
    targets = jnp.where(keep, jnp.where(ids < 0, logits.shape[-1], ids)[:, 1:], 0)
    logps = jnp.take_along_axis(shifted, targets[..., None], axis=-1, mode="fill")[..., 0]
    logps = logps - jax.nn.logsumexp(shifted, axis=-1)
    return jnp.pad(jnp.where(keep, logps, 0.0), ((0, 0), (1, 0)))


def sequence_logps(
    logits: Float[Array, "B T V"], ids: Int[Array, "B T"], response_mask: Bool[Array, "B T"]
) -> Float[Array, " B"]:
    """Log-probability of every response: the sum over its tokens.

    `out[b] = sum_t token_logps[b, t]`

    Args:
        logits: `[B, T, V]`, not shifted.
        ids: `[B, T]`, token ids.
        response_mask: `[B, T]` bool, True for the tokens of the response.

    Returns:
        `[B]` in nats, f32; 0 for an empty response. What `dpo` and the listwise losses take.

    Raises:
        ValueError: shapes do not fit, or the mask is not boolean.

    References:
        log pi(y | x) in Rafailov et al., arXiv 2305.18290, Eq. 7.

    Examples:
        Two tokens of probability 1/4.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> ids, mask = jnp.array([[2, 0, 3]]), jnp.array([[False, True, True]])
        >>> print(np.asarray(losses.dense.sequence_logps(jnp.zeros((1, 3, 4)), ids, mask)).round(4))
        [-2.7726]
    """
    return token_logps(logits, ids, response_mask).sum(-1)


def average_logps(
    logits: Float[Array, "B T V"], ids: Int[Array, "B T"], response_mask: Bool[Array, "B T"]
) -> Float[Array, " B"]:
    """Log-probability per token of every response: the mean over its tokens.

    `out[b] = sum_t token_logps[b, t] / |y_b|`

    Args:
        logits: `[B, T, V]`, not shifted.
        ids: `[B, T]`, token ids.
        response_mask: `[B, T]` bool, True for the tokens of the response.

    Returns:
        `[B]` in nats per token, f32; 0, with zero gradient, for an empty response. What `simpo` takes. Position 0,
        which nothing predicts, is not counted.

    Raises:
        ValueError: shapes do not fit, or the mask is not boolean.

    References:
        Meng, Xia and Chen, arXiv 2405.14734, Eq. 3.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> ids, mask = jnp.array([[2, 0, 3]]), jnp.array([[False, True, True]])
        >>> print(np.asarray(losses.dense.average_logps(jnp.zeros((1, 3, 4)), ids, mask)).round(4))
        [-1.3863]
    """
    return _over_length(sequence_logps(logits, ids, response_mask), response_mask[:, 1:])


def aligndistil(
    student_logits: Float[Array, "B T V"],
    dpo_logits: Float[Array, "B T V"],
    reverse_logits: Float[Array, "B T V"],
    response_mask: Bool[Array, "B T"],
    *,
    beta0: float | Float[Array, ""] = 0.1,
    scale: float | Float[Array, ""] = 20.0,
    epsilon: float | Float[Array, ""] = 1e-3,
) -> Float[Array, " B"]:
    """AlignDistil over whole responses: the mean over their tokens of `losses.aligndistil`.

    `L = (1 / |y|) sum_t (beta0 / alpha_t) KL(softmax(z_student,t) || softmax(z*_t))`, over the positions t that predict
    a response token: the one before the first counts, the one of the last token does not.

    Args:
        student_logits: `[B, T, V]`, logits of the policy in training, not shifted.
        dpo_logits: `[B, T, V]`, logits of a model trained by DPO. Receives no gradient.
        reverse_logits: `[B, T, V]`, logits of a model trained by DPO on swapped pairs. Receives no gradient.
        response_mask: `[B, T]` bool, True for the tokens of the response, aligned with the input ids, not shifted.
        beta0: beta of both DPO trainings, above 0.
        scale: alpha where the two models are disjoint, above 0; 20 off-policy, 30 on-policy.
        epsilon: alpha where the two models agree, above 0.

    Returns:
        `[B]` losses in weighted nats per token; 0, with zero gradient, for an empty response.

    Raises:
        ValueError: shapes do not fit, the mask is not boolean, or a hyper-parameter is a plain number that is not
            finite and above 0.

    References:
        Zhang et al., "AlignDistil: Token-Level Language Model Alignment as Adaptive Policy Distillation",
        arXiv 2503.02832, Eq. 18-19.

    Notes:
        The authors' trainers use the mask on unshifted logits and so never distil the first response token. Several
        f32 arrays of `[B, T, V]` are alive at once: for a large vocabulary use palign's chunked heads.

    Examples:
        Both response tokens have a loss of 14.38 (see `losses.aligndistil`), and so has their mean.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> dpo = jnp.tile(jnp.log(jnp.array([3.0, 1.0])), (1, 3, 1))
        >>> mask = jnp.array([[False, True, True]])
        >>> print(np.asarray(losses.dense.aligndistil(jnp.zeros((1, 3, 2)), dpo, dpo, mask)).round(2))
        [14.38]
    """
    keep, logits = _predicting(
        "dense.aligndistil",
        response_mask,
        student_logits=student_logits,
        dpo_logits=dpo_logits,
        reverse_logits=reverse_logits,
    )
    values = distill.aligndistil(*logits, beta0=beta0, scale=scale, epsilon=epsilon)
    return _over_length(jnp.where(keep, values, 0.0).sum(-1), keep)


def _predicting(
    loss: str, response_mask: Bool[Array, "B T"], **logits: Float[Array, "B T V"]
) -> tuple[Bool[Array, "B S"], list[Float[Array, "B S V"]]]:
    """Return, for the positions that predict a token (S = T - 1), which predict a response, and the logits there.

    Logits elsewhere are replaced by zeros before any formula: whatever stood there, even NaN, gets gradient 0.
    """
    check_mask(loss, "response_mask", response_mask)
    chex.assert_rank(
        response_mask,
        2,
        custom_message=f"{loss}: response_mask has shape {list(response_mask.shape)}; expected [B, T]",
        exception_type=ValueError,
    )
    for name, values in logits.items():
        chex.assert_shape(
            values,
            (*response_mask.shape, None),
            custom_message=f"{loss}: {name} has shape {list(jnp.shape(values))}, response_mask "
            f"{list(response_mask.shape)}; expected [B, T, V] and [B, T], neither shifted",
            exception_type=ValueError,
        )
    keep = response_mask[:, 1:]
    return keep, [jnp.where(keep[..., None], as_float(values)[:, :-1], 0.0) for values in logits.values()]


def _over_length(sums: Float[Array, " B"], keep: Bool[Array, "B S"]) -> Float[Array, " B"]:
    """Divide by the number of kept tokens; an empty response, whose sum is 0, stays 0."""
    return sums / jnp.maximum(keep.sum(-1), 1).astype(sums.dtype)
