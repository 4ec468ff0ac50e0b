"""DPO for labels that are wrong now and then: conservative (smoothed) and robust (unbiased)."""

import numbers

import jax
from jaxtyping import Array, Float

from palign.losses.checks import check_between, check_pairs, check_positive, log_ratios, margins


def cdpo(
    policy_logps: Float[Array, "B 2"],
    ref_logps: Float[Array, "B 2"],
    *,
    beta: float | Float[Array, ""] = 0.1,
    label_smoothing: float | Float[Array, ""] = 0.1,
) -> Float[Array, " B"]:
    """Conservative DPO: cross-entropy against the label "chosen is better with probability 1 - eps".

    `L = -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)`, with `rho = policy_logps - ref_logps`,
    `h = rho_w - rho_l` and eps = `label_smoothing`. The minimum is at a finite margin,
    `beta h = log((1 - eps) / eps)`.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        beta: strength of the tie to the reference, per nat, above 0.
        label_smoothing: eps, the assumed share of pairs whose labels are swapped, from 0 (DPO) to 0.5 (no preference).

    Returns:
        `[B]` losses in nats, at least the entropy of the label; log 2 where the policy equals the reference.

    Raises:
        ValueError: a shape is not `[B, 2]`, `beta` is a plain number that is not finite and above 0, or
            `label_smoothing` is one outside [0, 0.5].

    References:
        Mitchell, "A note on DPO with noisy preferences & relationship to IPO" (2023),
        https://ericmitchell.ai/cdpo.pdf.

    Notes:
        tunix and EasyDeL compute this when DPO is given `label_smoothing`; HALOs has eps = 0.2. TRL 1.16 dropped it:
        there `label_smoothing` has no effect on `sigmoid`.

    Examples:
        h = 4 and beta = 0.5, so beta h = 2. The label costs log(1 + exp(-2)) = 0.1269 where it is right and
        log(1 + exp(2)) = 2.1269 where it is swapped: 0.9 * 0.1269 + 0.1 * 2.1269 = 0.3269.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> policy, reference = jnp.array([[-10.0, -14.0]]), jnp.array([[-12.0, -12.0]])
        >>> print(np.asarray(losses.cdpo(policy, reference, beta=0.5, label_smoothing=0.1)).round(4))
        [0.3269]
    """
    check_pairs("cdpo", policy_logps=policy_logps, ref_logps=ref_logps)
    check_positive("cdpo", beta=beta)
    check_between("cdpo", 0.0, 0.5, label_smoothing=label_smoothing)
    logits = beta * margins(log_ratios(policy_logps, ref_logps))
    # -log sigmoid(-x) = -log sigmoid(x) + x, so smoothing only adds a straight line.
    return jax.nn.softplus(-logits) + label_smoothing * logits


def robust_dpo(
    policy_logps: Float[Array, "B 2"],
    ref_logps: Float[Array, "B 2"],
    *,
    beta: float | Float[Array, ""] = 0.1,
    label_smoothing: float | Float[Array, ""] = 0.1,
) -> Float[Array, " B"]:
    """Robust DPO: an unbiased estimate of the DPO loss on clean labels, from labels swapped at a known rate.

    `L = [-(1 - eps) log sigmoid(beta h) + eps log sigmoid(-beta h)] / (1 - 2 eps)`, with
    `rho = policy_logps - ref_logps`, `h = rho_w - rho_l` and eps = `label_smoothing`. Averaged over a swap with
    probability eps it is the DPO loss of the true pair.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        beta: strength of the tie to the reference, per nat, above 0.
        label_smoothing: eps, the share of pairs whose labels are swapped, from 0 (DPO) to below 0.5.

    Returns:
        `[B]` losses in nats; log 2 where the policy equals the reference. Not bounded below: for a large margin the
        loss falls like -beta h eps / (1 - 2 eps).

    Raises:
        ValueError: a shape is not `[B, 2]`, `beta` is a plain number that is not finite and above 0, or
            `label_smoothing` is one outside [0, 0.5).

    References:
        Chowdhury, Kini and Natarajan, "Provably Robust DPO: Aligning Language Models with Noisy Feedback",
        arXiv 2403.00409.

    Notes:
        TRL and EasyDeL have it as `robust`. It pushes margins further than DPO, where `cdpo` holds them back.

    Examples:
        h = 8 and beta = 1: the label costs 0.0003 where it is right and 8.0003 where it is swapped, and
        (0.8 * 0.0003 - 0.2 * 8.0003) / 0.6 = -2.6663: below 0.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> policy, reference = jnp.array([[-10.0, -18.0]]), jnp.array([[-12.0, -12.0]])
        >>> print(np.asarray(losses.robust_dpo(policy, reference, beta=1.0, label_smoothing=0.2)).round(4))
        [-2.6663]
    """
    check_pairs("robust_dpo", policy_logps=policy_logps, ref_logps=ref_logps)
    check_positive("robust_dpo", beta=beta)
    if isinstance(label_smoothing, numbers.Real) and not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"robust_dpo: label_smoothing is {label_smoothing}; expected a share of swapped labels in [0, 0.5): at 0.5 "
            "labels tell nothing"
        )
    logits = beta * margins(log_ratios(policy_logps, ref_logps))
    # The swapped term as in cdpo, with the opposite sign: subtracting two large softplus would cancel.
    return jax.nn.softplus(-logits) - label_smoothing / (1 - 2 * label_smoothing) * logits
