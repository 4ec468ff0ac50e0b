"""MAPL's comparison between samples, a reconstruction and not the paper's letter: one prompt's gap against another's.

The paper's equation was not at hand. What is here is the plausible form of its description: a preference pair must be
further apart under one prompt than under the other. Do not report numbers as the paper's method.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from palign.losses.checks import check_positive, check_same_shape, log_ratios


def mapl_inter(
    policy_logps: Float[Array, "B 2 2"], ref_logps: Float[Array, "B 2 2"], *, beta: float | Float[Array, ""] = 0.1
) -> Float[Array, " B"]:
    """Preference between two preference pairs: the gap of the first prompt shall exceed that of the second.

    `L = -log sigmoid(gap(x') - gap(x))`, with `gap(x) = beta (rho(x, y_w) - rho(x, y_l))` and
    `rho = policy_logps - ref_logps`.

    Args:
        policy_logps: `[B, 2, 2]`, log-probabilities under the policy, in nats, summed over response tokens. Axis 1 is
            the prompt: 0 = x', whose gap is expected to be larger (the one with more instructions), 1 = x. Axis 2 is
            the response to it: 0 = chosen, 1 = rejected.
        ref_logps: `[B, 2, 2]`, the same under the frozen reference. Receives no gradient.
        beta: strength of the tie to the reference, per nat, above 0.

    Returns:
        `[B]` losses in nats, at least 0; log 2 where both gaps are equal.

    Raises:
        ValueError: a shape is not `[B, 2, 2]`, or `beta` is a plain number that is not finite and above 0.

    References:
        After Sun et al., "Multi-Level Aware Preference Learning: Enhancing RLHF for Complex Multi-Instruction Tasks",
        arXiv 2505.12845; see the module's first line.

    Notes:
        The normaliser of the implicit reward depends on the prompt alone, so it cancels within each gap. It does not in
        a comparison of one response under two prompts. With a gap of 0 under x the loss is `dpo` under x'.

    Examples:
        Log-ratios 3 and -1 under x', 1 and 0 under x: gaps of 0.4 and 0.1, and log(1 + exp(-0.3)) = 0.5544.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign.losses import experimental
        >>> policy = jnp.array([[[-9.0, -13.0], [-11.0, -12.0]]])
        >>> print(np.asarray(experimental.mapl_inter(policy, jnp.full((1, 2, 2), -12.0), beta=0.1)).round(4))
        [0.5544]
    """
    shape = jnp.shape(policy_logps)
    if len(shape) != 3 or shape[1:] != (2, 2):
        raise ValueError(
            f"mapl_inter: policy_logps has shape {list(shape)}; expected [B, 2, 2]: prompts (larger gap first), then "
            "chosen and rejected"
        )
    check_same_shape("mapl_inter", policy_logps=policy_logps, ref_logps=ref_logps)
    check_positive("mapl_inter", beta=beta)
    ratios = log_ratios(policy_logps, ref_logps)
    gaps = ratios[:, :, 0] - ratios[:, :, 1]
    return jax.nn.softplus(-beta * (gaps[:, 0] - gaps[:, 1]))
