"""How hard a pair is for a reference-based loss, and how low its loss must get before the pair is ranked right."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from palign.losses.checks import as_float, check_pairs, check_positive

UNREACHABLE = -1.0  # below every squared loss


def difficulty(ref_logps: Float[Array, "B 2"]) -> Float[Array, " B"]:
    """How much likelier the reference finds the rejected response.

    `c = log(pi_ref(y_l) / pi_ref(y_w))`

    Args:
        ref_logps: `[B, 2]`, log-probabilities of the chosen (column 0) and the rejected (column 1) response under the
            reference, in nats, summed over response tokens.

    Returns:
        `[B]` in nats. Above 0 the reference ranks the pair wrong, and training must make up `c` nats of margin.

    Raises:
        ValueError: the shape is not `[B, 2]`.

    References:
        Chen et al., "Preference Learning Algorithms Do Not Learn Preference Rankings", arXiv 2405.19534, Theorem 4.1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from palign.eval.difficulty import difficulty
        >>> print(difficulty(jnp.array([[-30.0, -10.0], [-10.0, -12.0]])))
        [20. -2.]
    """
    check_pairs("difficulty", ref_logps=ref_logps)
    logps = as_float(ref_logps)
    return logps[:, 1] - logps[:, 0]


def dpo_loss_bound(
    difficulty: Float[Array, "*shape"], *, beta: float | Float[Array, ""] = 0.1
) -> Float[Array, "*shape"]:
    """The DPO loss at which a pair's ranking turns: it is ranked right if and only if its loss is no higher.

    `bound = -log sigmoid(beta c)`

    Args:
        difficulty: any shape, c of the function `difficulty`, in nats.
        beta: the beta of the loss, above 0.

    Returns:
        The shape of `difficulty`, losses in nats; log 2, the loss before training, where the reference finds both
        alike. Beyond `beta c` of about 100 the bound is 0 in f32, and so are losses on either side of it.

    Raises:
        ValueError: `beta` is a plain number that is not finite and above 0.

    References:
        Chen et al., arXiv 2405.19534, Theorem 4.1. Its Proposition 2.6 follows: a pair that the reference ranks right
        stays right at a loss of 0.6 or less, since c is then at most 0 and the bound at least log 2 = 0.693.

    Examples:
        The reference is 20 nats wrong: -log sigmoid(2) = 0.127 must be reached, though 0.5 looks well trained. At 100
        nats it is 0.000045.

        >>> import jax.numpy as jnp
        >>> from palign.eval.difficulty import dpo_loss_bound
        >>> print([f"{float(bound):.2g}" for bound in dpo_loss_bound(jnp.array([0.0, 20.0, 100.0]), beta=0.1)])
        ['0.69', '0.13', '4.5e-05']
    """
    check_positive("dpo_loss_bound", beta=beta)
    return jax.nn.softplus(-beta * as_float(difficulty))


def ipo_loss_bound(
    difficulty: Float[Array, "*shape"], *, beta: float | Float[Array, ""] = 0.1
) -> Float[Array, "*shape"]:
    """The IPO loss below which a pair is ranked right for certain.

    `bound = (1 / (2 beta) - c)^2` where `c <= 1 / (2 beta)`, else -1, which no loss reaches.

    Args:
        difficulty: any shape, c of the function `difficulty`, in nats, of log-probabilities summed as the loss sums
            them.
        beta: the beta of the loss (the paper's tau), above 0.

    Returns:
        The shape of `difficulty`. A loss at or below the bound means that the pair is ranked right; one above it says
        nothing, for IPO also punishes a margin that is too wide. Where the bound is -1, a loss of 0 ranks the pair
        *wrong*: the target margin 1 / (2 beta) is less than what the reference is wrong by.

    Raises:
        ValueError: `beta` is a plain number that is not finite and above 0.

    References:
        Chen et al., arXiv 2405.19534, Proposition A.7, with its c' = -c.

    Examples:
        beta = 0.1 asks for a margin of 5 nats over the reference. A pair that is 2 nats wrong is right from (5 - 2)^2
        on; one that is 8 nats wrong never surely is.

        >>> import jax.numpy as jnp
        >>> from palign.eval.difficulty import ipo_loss_bound
        >>> print(ipo_loss_bound(jnp.array([0.0, 2.0, 8.0]), beta=0.1))
        [25.  9. -1.]
    """
    check_positive("ipo_loss_bound", beta=beta)
    room = 1 / (2 * beta) - as_float(difficulty)
    return jnp.where(room >= 0, room**2, UNREACHABLE)
