"""Preferences between prompts: one response that answers the one and not the other."""

from jaxtyping import Array, Float

from palign.losses.checks import check_pairs, check_positive
from palign.losses.pairwise.dpo import dpo


def mapl_intra(
    policy_logps: Float[Array, "B 2"], ref_logps: Float[Array, "B 2"], *, beta: float | Float[Array, ""] = 0.1
) -> Float[Array, " B"]:
    """Multi-level aware preference learning within a sample: one response is likelier under the prompt it answers.

    `L = -log sigmoid(beta (rho(y | x_w) - rho(y | x_l)))`, with `rho = policy_logps - ref_logps`.

    Args:
        policy_logps: `[B, 2]`, log-probabilities of one and the same response given the prompt that it answers
            (column 0) and given one that it does not (column 1), under the policy, in nats, summed over response
            tokens.
        ref_logps: `[B, 2]`, the same under the frozen reference. Receives no gradient.
        beta: strength of the tie to the reference, per nat, above 0.

    Returns:
        `[B]` losses in nats, at least 0; exactly log 2 where the policy equals the reference.

    Raises:
        ValueError: a shape is not `[B, 2]`, or `beta` is a plain number that is not finite and above 0.

    References:
        Sun et al., "Multi-Level Aware Preference Learning: Enhancing RLHF for Complex Multi-Instruction Tasks",
        arXiv 2505.12845, the loss within a sample.

    Notes:
        The formula is that of `dpo`, but not its derivation. A reward is `beta rho + beta log Z(x)`, and here the two
        prompts have normalisers of their own: `beta log(Z(x_w) / Z(x_l))` is dropped from the margin, as it is in
        other response-conditioned forms of DPO. For a reward model, which has no Z, the loss is Bradley-Terry's.

    Examples:
        The right prompt made the response 2 nats likelier than under the reference, the wrong one 2 nats less likely:
        log(1 + exp(-0.1 * 4)) = 0.5130.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> reference, policy = jnp.array([[-12.0, -20.0]]), jnp.array([[-10.0, -22.0]])
        >>> print(np.asarray(losses.mapl_intra(policy, reference, beta=0.1)).round(4))
        [0.513]
    """
    check_pairs("mapl_intra", policy_logps=policy_logps, ref_logps=ref_logps)
    check_positive("mapl_intra", beta=beta)
    return dpo(policy_logps, ref_logps, beta=beta)
