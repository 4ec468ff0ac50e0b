"""DPO with a second term that keeps the chosen response likely: supervised, as a penalty, or by calibration."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from palign.losses.checks import as_float, check_pairs, check_positive, log_ratios, margins


def rpo(
    policy_logps: Float[Array, "B 2"],
    ref_logps: Float[Array, "B 2"],
    *,
    beta: float | Float[Array, ""] = 0.1,
    eta: float | Float[Array, ""] = 0.005,
) -> Float[Array, " B"]:
    """Regularised preference optimisation: DPO plus a supervised term on the chosen response.

    `L = -log sigmoid(beta h) - eta beta logp_w`, with `rho = policy_logps - ref_logps` and `h = rho_w - rho_l`.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens: in the supervised term too.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        beta: strength of the tie to the reference, per nat, above 0.
        eta: weight of the supervised term in units of beta: a nat of logp_w counts eta beta; 0 is `dpo`.

    Returns:
        `[B]` losses in nats, at least 0; log 2 - eta beta logp_w where the policy equals the reference.

    Raises:
        ValueError: a shape is not `[B, 2]`, or `beta` is a plain number that is not finite and above 0.

    References:
        Liu et al., "Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an Adversarial
        Regularizer", arXiv 2405.16436.

    Notes:
        The authors' code has this form with eta = 0.005 and beta = 0.01 (Zephyr) or 0.05 (Gemma). TRL (the list
        `["sigmoid", "sft"]`) and OpenRLHF average the supervised term over tokens: for that add `nll` of the chosen
        response's average to `dpo`, with a weight of its own. tunix and EasyDeL do not have it.

    Examples:
        h = 4: log(1 + exp(-0.4)) = 0.513. The chosen response has -10 nats, so 0.05 * 0.1 * 10 = 0.05 on top.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> policy, reference = jnp.array([[-10.0, -14.0]]), jnp.array([[-12.0, -12.0]])
        >>> print(np.asarray(losses.rpo(policy, reference, beta=0.1, eta=0.05)).round(4))
        [0.563]
    """
    check_pairs("rpo", policy_logps=policy_logps, ref_logps=ref_logps)
    check_positive("rpo", beta=beta)
    preference = jax.nn.softplus(-beta * margins(log_ratios(policy_logps, ref_logps)))
    return preference - eta * beta * as_float(policy_logps)[:, 0]


def dpop(
    policy_logps: Float[Array, "B 2"],
    ref_logps: Float[Array, "B 2"],
    *,
    beta: float | Float[Array, ""] = 0.3,
    penalty: float | Float[Array, ""] = 50.0,
) -> Float[Array, " B"]:
    """DPO-positive (Smaug): DPO that charges for making the chosen response less likely than under the reference.

    `L = -log sigmoid(beta (h - lambda max(0, -rho_w)))`, with `rho = policy_logps - ref_logps`,
    `h = rho_w - rho_l` and lambda = `penalty`.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        beta: strength of the tie to the reference, per nat, above 0.
        penalty: lambda, nats of margin taken for every nat that the chosen response has lost; 0 is `dpo`.

    Returns:
        `[B]` losses in nats, at least 0; `dpo` wherever rho_w >= 0, so log 2 where the policy equals the reference.

    Raises:
        ValueError: a shape is not `[B, 2]`, or `beta` is a plain number that is not finite and above 0.

    References:
        Pal et al., "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive", arXiv 2402.13228.

    Notes:
        TRL, tunix and EasyDeL do not have it. At rho_w = 0, where training starts, the gradient is that of `dpo`.

    Examples:
        Both pairs have h = 4. In the first the chosen response gained 2 nats: DPO's log(1 + exp(-0.4)) = 0.513. In the
        second it lost 1 nat and the rejected one 5: 0.1 * (4 - 10 * 1) = -0.6, and log(1 + exp(0.6)) = 1.0375.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> policy, reference = jnp.array([[-10.0, -14.0], [-13.0, -17.0]]), jnp.full((2, 2), -12.0)
        >>> print(np.asarray(losses.dpop(policy, reference, beta=0.1, penalty=10.0)).round(4))
        [0.513  1.0375]
    """
    check_pairs("dpop", policy_logps=policy_logps, ref_logps=ref_logps)
    check_positive("dpop", beta=beta)
    ratios = log_ratios(policy_logps, ref_logps)
    return jax.nn.softplus(-beta * (margins(ratios) - penalty * jax.nn.relu(-ratios[:, 0])))


def cal_dpo(
    policy_logps: Float[Array, "B 2"],
    ref_logps: Float[Array, "B 2"],
    *,
    beta: float | Float[Array, ""] = 0.001,
    coefficient: float | Float[Array, ""] = 0.5,
) -> Float[Array, " B"]:
    """Calibrated DPO: the log-ratios themselves, not only their difference, are given a target.

    `L = -log sigmoid(h) + c [(rho_w - 1 / (2 beta))^2 + (rho_l + 1 / (2 beta))^2]`, with
    `rho = policy_logps - ref_logps`, `h = rho_w - rho_l` and c = `coefficient`. The squares have their minimum where
    the chosen response has gained 1 / (2 beta) nats and the rejected one has lost as many.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats, summed over response tokens.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        beta: per nat, above 0; it sets the target only, the logistic term has none.
        coefficient: c, of the squares; 0 is `dpo` with beta = 1.

    Returns:
        `[B]` losses, at least 0; log 2 + c / (2 beta^2) where the policy equals the reference.

    Raises:
        ValueError: a shape is not `[B, 2]`, or `beta` is a plain number that is not finite and above 0.

    References:
        Xiao et al., "Cal-DPO: Calibrated Direct Preference Optimization for Language Model Alignment",
        arXiv 2412.14516.

    Notes:
        The coefficient of 1/2 and the logistic term without beta are those of the authors' code, whose configuration
        has beta = 0.002. TRL, tunix and EasyDeL do not have it.

    Examples:
        beta = 0.25 has targets of 2 and -2. The first pair is there: only log(1 + exp(-4)) = 0.0181 is left. The second
        has not moved: log 2 + 0.5 * (4 + 4) = 4.6931.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> policy, reference = jnp.array([[-10.0, -14.0], [-12.0, -12.0]]), jnp.full((2, 2), -12.0)
        >>> print(np.asarray(losses.cal_dpo(policy, reference, beta=0.25, coefficient=0.5)).round(4))
        [0.0181 4.6931]
    """
    check_pairs("cal_dpo", policy_logps=policy_logps, ref_logps=ref_logps)
    check_positive("cal_dpo", beta=beta)
    ratios = log_ratios(policy_logps, ref_logps)
    target = 1 / (2 * beta)
    squares = jnp.square(ratios[:, 0] - target) + jnp.square(ratios[:, 1] + target)
    return jax.nn.softplus(-margins(ratios)) + coefficient * squares
