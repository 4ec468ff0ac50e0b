"""From logits `[B, T, V]`: for code that holds them, outside palign's own heads.

`logits[:, t]` predicts `ids[:, t + 1]`. That shift is made here, once; everything that goes in or comes out is aligned
with `ids`. `response_mask[b, t]` says that token t of row b belongs to the response: its first token and its end of
turn included, prompt and padding not. Padding may stand on either side, and what it holds is never read.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from palign.losses import distill
from palign.losses.checks import as_float, check_mask, check_positive, check_same_shape, check_shape


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
    check_shape(loss, "[B, T]", (None, None), response_mask=response_mask)
    expected = f"[B, T, V], not shifted, with the B and T of response_mask {list(response_mask.shape)}"
    check_shape(loss, expected, (*response_mask.shape, None), **logits)
    keep = response_mask[:, 1:]
    return keep, [jnp.where(keep[..., None], as_float(values)[:, :-1], 0.0) for values in logits.values()]


def _over_length(sums: Float[Array, " B"], keep: Bool[Array, "B S"]) -> Float[Array, " B"]:
    """Divide by the number of kept tokens; an empty response, whose sum is 0, stays 0."""
    return sums / jnp.maximum(keep.sum(-1), 1).astype(sums.dtype)


def sequence_kl(
    logits: Float[Array, "B T V"], ref_logits: Float[Array, "B T V"], response_mask: Bool[Array, "B T"]
) -> Float[Array, " B"]:
    """Forward KL divergence of the policy from the reference along every response, over the whole vocabulary.

    `out[b] = sum_t KL(softmax(ref_logits[b, t]) || softmax(logits[b, t]))`, over the positions t that predict a
    response token.

    Args:
        logits: `[B, T, V]`, logits of the policy, not shifted. Gradient flows through them.
        ref_logits: `[B, T, V]`, logits of the frozen reference, not shifted. Receives no gradient.
        response_mask: `[B, T]` bool, True for the tokens of the response, aligned with the input ids, not shifted.

    Returns:
        `[B]` in nats, at least 0 up to rounding; 0 for an empty response. What `tdpo1` and `tdpo2` take.

    Raises:
        ValueError: shapes do not fit, or the mask is not boolean.

    References:
        Zeng et al., "Token-level Direct Preference Optimization", arXiv 2404.11999, the sequential KL divergence.

    Examples:
        Two tokens, at each of which the reference is (3/4, 1/4) and the policy (1/2, 1/2):
        2 * (3/4 log 3/2 + 1/4 log 1/2) = 0.2616.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> reference = jnp.tile(jnp.log(jnp.array([3.0, 1.0])), (1, 3, 1))
        >>> mask = jnp.array([[False, True, True]])
        >>> print(np.asarray(losses.dense.sequence_kl(jnp.zeros((1, 3, 2)), reference, mask)).round(4))
        [0.2616]
    """
    keep, (policy, reference) = _predicting("sequence_kl", response_mask, logits=logits, ref_logits=ref_logits)
    return jnp.where(keep, distill.forward_kl(policy, reference), 0.0).sum(-1)


def alignment_logps(
    logits: Float[Array, "B T V"], ids: Int[Array, "B T"], response_mask: Bool[Array, "B T"]
) -> Float[Array, " B"]:
    """How likely the tokens of every response are, next to tokens sampled from the policy.

    `out[b] = sum_t (log p_t(y_t) - log sum_v p_t(v)^2) / |y_b|`, with `p_t = softmax(logits[b, t - 1])`: the sum of
    squares is the probability that a sampled token has on average.

    Args:
        logits: `[B, T, V]`, logits of the policy, not shifted.
        ids: `[B, T]`, token ids.
        response_mask: `[B, T]` bool, True for the tokens of the response.

    Returns:
        `[B]` in nats per token; 0, with zero gradient, for an empty response. Above 0 where the tokens are likelier
        than sampled ones. What `wpo` takes.

    Raises:
        ValueError: shapes do not fit, or the mask is not boolean.

    References:
        Zhou et al., "WPO: Enhancing RLHF with Weighted Preference Optimization", arXiv 2406.11827, sampled alignment.

    Examples:
        Under p = (3/4, 1/4) the squares sum to 10/16. Twice the first token: log(0.75 / 0.625) = 0.1823.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> logits = jnp.tile(jnp.log(jnp.array([3.0, 1.0])), (1, 3, 1))
        >>> ids, mask = jnp.array([[1, 0, 0]]), jnp.array([[False, True, True]])
        >>> print(np.asarray(losses.dense.alignment_logps(logits, ids, mask)).round(4))
        [0.1823]
    """
    keep, (policy,) = _predicting("alignment_logps", response_mask, logits=logits)
    check_same_shape("alignment_logps", ids=ids, response_mask=response_mask)
    squares = jax.nn.logsumexp(2 * jax.nn.log_softmax(policy), axis=-1)
    expected = jnp.where(keep, squares, 0.0).sum(-1)
    return _over_length(sequence_logps(logits, ids, response_mask) - expected, keep)


def shared_and_tail_logps(
    logits: Float[Array, "B T V"],
    ids: Int[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    shared_lengths: Int[Array, " B"],
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Log-probability of the first tokens of every response, as many as the other one has, and of those beyond.

    `shared[b] = sum of token_logps over the first shared_lengths[b] tokens of the response`, `tail[b] = the rest`.

    Args:
        logits: `[B, T, V]`, not shifted.
        ids: `[B, T]`, token ids.
        response_mask: `[B, T]` bool, True for the tokens of the response. They need not be adjacent.
        shared_lengths: `[B]`, number of tokens in the first part: for a pair the length of its shorter response.

    Returns:
        `[B]` and `[B]` in nats, at most 0, whose sum is `sequence_logps`; 0 for a part without tokens. What `ld_dpo`
        takes, from the policy and from the reference. Position 0, which nothing predicts, is not counted.

    Raises:
        ValueError: shapes do not fit, or the mask is not boolean.

    References:
        Liu et al., "Length Desensitization in Direct Preference Optimization", arXiv 2409.06411.

    Examples:
        Two tokens of probability 1/4, one of them shared.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> ids, mask = jnp.array([[2, 0, 3]]), jnp.array([[False, True, True]])
        >>> parts = losses.dense.shared_and_tail_logps(jnp.zeros((1, 3, 4)), ids, mask, jnp.array([1]))
        >>> print(np.asarray(parts).round(4))
        [[-1.3863]
         [-1.3863]]
    """
    # For its checks, so that errors name this function.
    _predicting("shared_and_tail_logps", response_mask, logits=logits)
    check_same_shape("shared_and_tail_logps", ids=ids, response_mask=response_mask)
    shared_lengths = jnp.asarray(shared_lengths)
    expected = f"[B] with the B of response_mask {list(response_mask.shape)}"
    check_shape("shared_and_tail_logps", expected, response_mask.shape[:1], shared_lengths=shared_lengths)
    logps = token_logps(logits, ids, response_mask)[:, 1:]
    # Counted in int32 whatever the lengths come in: int8 would wrap at the 128th token.
    shared = jnp.cumsum(response_mask[:, 1:], axis=1, dtype=jnp.int32) <= shared_lengths.astype(jnp.int32)[:, None]
    return jnp.where(shared, logps, 0.0).sum(-1), jnp.where(shared, 0.0, logps).sum(-1)


def extrapolated_sequence_logps(
    logits: Float[Array, "B T V"],
    ref_logits: Float[Array, "B T V"],
    ids: Int[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    weight: float | Float[Array, ""] = 1.0,
) -> Float[Array, " B"]:
    """Log-probability of every response under a model on the line from the reference through the policy.

    `out[b] = sum_t log softmax(weight z[b, t - 1] + (1 - weight) z_ref[b, t - 1])[ids[b, t]]`

    Args:
        logits: `[B, T, V]`, the z of the policy, not shifted. Receives no gradient.
        ref_logits: `[B, T, V]`, the z of the reference, not shifted. Receives no gradient.
        ids: `[B, T]`, token ids.
        response_mask: `[B, T]` bool, True for the tokens of the response.
        weight: above 0; 1 is the policy, more extrapolates beyond it.

    Returns:
        `[B]` in nats, f32, without gradient; 0 for an empty response. What `spa` detects noise with.

    Raises:
        ValueError: shapes do not fit, the mask is not boolean, or `weight` is a plain number that is not finite and
            above 0.

    References:
        Kim et al., "Spread Preference Annotation: Direct Preference Judgment for Efficient LLM Alignment",
        arXiv 2406.04412, de-coupled noise detection.

    Notes:
        The authors' weight is 1 + lambda, with lambda = 1/2, 1/4, 1/8 in successive rounds; their configuration leaves
        it at 1. The mixture is `losses.theorem1_teacher`, that of AlignDistil.

    Examples:
        The policy has odds of 3 to 1 and the reference even ones. At weight 2 the odds are 9 to 1, and two tokens of
        9/10 have 2 log 0.9 = -0.2107.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> logits = jnp.tile(jnp.log(jnp.array([3.0, 1.0])), (1, 3, 1))
        >>> ids, mask = jnp.array([[1, 0, 0]]), jnp.array([[False, True, True]])
        >>> beyond = losses.dense.extrapolated_sequence_logps(logits, jnp.zeros((1, 3, 2)), ids, mask, weight=2.0)
        >>> print(np.asarray(beyond).round(4))
        [-0.2107]
    """
    check_positive("extrapolated_sequence_logps", weight=weight)
    # For its checks, so that errors name this function.
    _predicting("extrapolated_sequence_logps", response_mask, logits=logits, ref_logits=ref_logits)
    check_same_shape("extrapolated_sequence_logps", logits=logits, ref_logits=ref_logits)
    check_same_shape("extrapolated_sequence_logps", ids=ids, response_mask=response_mask)
    mixed = distill.theorem1_teacher(logits, ref_logits, ratio=weight).logits
    return sequence_logps(mixed, ids, response_mask)
