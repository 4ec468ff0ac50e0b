"""Identity preference optimisation: a squared loss with a finite target."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from palign.losses.checks import check_pairs, check_positive, log_ratios, margins


def ipo(
    policy_logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"], *, beta: float | Float[Array, ""] = 0.1
) -> Float[Array, " B"]:
    """Identity preference optimisation: regress the difference of log-ratios on a finite target.

    `L = (h - 1 / (2 beta))^2`, with `rho = policy_logps - ref_logps` and `h = rho_w - rho_l`. Unlike DPO the loss has
    its minimum at a finite h, so certain preferences do not push the policy ever further.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under
            the policy, in nats: sums over response tokens (the paper) or means (TRL), see the notes.
        ref_logps: `[B, 2]`, the same under the frozen reference, averaged in the same way. Receives no gradient.
        beta: the paper's tau, per nat, above 0; the target of h is 1 / (2 beta).

    Returns:
        `[B]` losses in squared nats, at least 0; 1 / (4 beta^2) where the policy equals the reference.

    Raises:
        ValueError: a shape is not `[B, 2]`, or `beta` is a plain number that is not finite and above 0.

    References:
        Azar et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences",
        arXiv 2310.12036, Eq. 17.

    Notes:
        The paper's formula holds for sums, and so the DPO authors' code and OpenRLHF have it. TRL, HALOs and EasyDeL
        divide each response's log-ratio by its number of tokens; pass `losses.dense.average_logps` of both models to
        get theirs. A good beta for sums is far smaller: h is then larger by about the response length.

    Examples:
        h = 4 against the target 1 / (2 * 0.1) = 5 costs 1; the untouched policy, h = 0, costs 25.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> reference = jnp.array([[-12.0, -12.0], [-12.0, -12.0]])
        >>> policy = jnp.array([[-10.0, -14.0], [-12.0, -12.0]])
        >>> print(np.asarray(losses.ipo(policy, reference, beta=0.1)).round(4))
        [ 1. 25.]
    """
    check_pairs("ipo", policy_logps=policy_logps, ref_logps=ref_logps)
    check_positive("ipo", beta=beta)
    return jnp.square(margins(log_ratios(policy_logps, ref_logps)) - 1 / (2 * beta))
