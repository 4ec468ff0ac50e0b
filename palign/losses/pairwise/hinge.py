"""Losses that stop at a margin: pairs that are far enough apart add no gradient."""

import jax
from jaxtyping import Array, Float

from palign.losses.checks import as_float, check_pairs, check_positive, check_same_shape, log_ratios, margins


def hinge(
    policy_logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"], *, beta: float | Float[Array, ""] = 0.1
) -> Float[Array, " B"]:
    """Hinge loss on the reward that DPO implies: a support vector machine where DPO is a logistic regression.

    `L = max(0, 1 - beta h)`, with `rho = policy_logps - ref_logps` and `h = rho_w - rho_l`.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        beta: reward per nat, above 0; the margin asked for is h = 1 / beta.

    Returns:
        `[B]` losses in units of reward, at least 0; exactly 1 where the policy equals the reference, and 0 with zero
        gradient from h = 1 / beta on.

    Raises:
        ValueError: a shape is not `[B, 2]`, or `beta` is a plain number that is not finite and above 0.

    References:
        Liu et al., "Statistical Rejection Sampling Improves Preference Optimization", arXiv 2309.06657: the loss
        `hinge-norm`.

    Notes:
        TRL and EasyDeL have it as `hinge`. It is beta times the margin term of `slic_hf` with delta = 1 / beta and
        log-ratios to the reference in place of log-probabilities.

    Examples:
        beta h = 0.1 * 4 = 0.4 is 0.6 short of 1. At h = 12 nothing is left to learn.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> policy, reference = jnp.array([[-10.0, -14.0], [-6.0, -18.0]]), jnp.full((2, 2), -12.0)
        >>> print(np.asarray(losses.hinge(policy, reference, beta=0.1)).round(4))
        [0.6 0. ]
    """
    check_pairs("hinge", policy_logps=policy_logps, ref_logps=ref_logps)
    check_positive("hinge", beta=beta)
    return jax.nn.relu(1 - beta * margins(log_ratios(policy_logps, ref_logps)))


def slic_hf(
    policy_logps: Float[Array, "B 2"],
    target_logps: Float[Array, " B"],
    *,
    delta: float | Float[Array, ""] = 1.0,
    regularisation: float | Float[Array, ""] = 0.1,
) -> Float[Array, " B"]:
    """Sequence likelihood calibration with human feedback: a margin on log-probabilities, tied to a supervised target.

    `L = max(0, delta - logp_w + logp_l) - lambda logp_target`, with lambda = `regularisation`. There is no reference
    model: the supervised term alone keeps the policy near the data.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        target_logps: `[B]`, log-probability under the policy of the response that supervised fine-tuning would train
            on for the same prompt, in nats, summed over its tokens. Which response that is, and whether it is averaged
            instead, is the caller's choice; `policy_logps[:, 0]` takes the chosen one. It does receive a gradient.
        delta: margin in nats by which the chosen response is to be more likely.
        regularisation: lambda, weight of the supervised term.

    Returns:
        `[B]` losses in nats; delta - lambda logp_target where both responses are equally likely.

    Raises:
        ValueError: `policy_logps` is not `[B, 2]` or `target_logps` is not `[B]`.

    References:
        Zhao et al., "SLiC-HF: Sequence Likelihood Calibration with Human Feedback", arXiv 2305.10425.

    Notes:
        The defaults are those of HALOs, whose supervised term has one value per token, `[B, T]`, added to a margin of
        shape `[B]`. TRL has the margin as `hinge` of its experimental CPO trainer.

    Examples:
        The chosen response is 0.4 nats ahead of the rejected one: 1 - 0.4 = 0.6, and 0.1 * 5 = 0.5 for the target.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> policy, target = jnp.array([[-10.0, -10.4]]), jnp.array([-5.0])
        >>> print(np.asarray(losses.slic_hf(policy, target, delta=1.0, regularisation=0.1)).round(4))
        [1.1]
    """
    check_pairs("slic_hf", policy_logps=policy_logps)
    check_same_shape("slic_hf", **{"policy_logps[:, 0]": policy_logps[:, 0]}, target_logps=target_logps)
    return jax.nn.relu(delta - margins(as_float(policy_logps))) - regularisation * as_float(target_logps)
