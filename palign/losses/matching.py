"""Underlying-distribution matching for BCO: what to do where good and bad responses answer different prompts.

A classifier on frozen prompt embeddings learns which prompts tend to have desirable responses; undesirable responses to
prompts that look like those of desirable ones then weigh more. Fit it once before training, on a thousand prompts or
so, and give the weights to `bco`.
"""

import numbers
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from palign.losses.checks import as_float, check_mask, check_positive, check_same_shape, check_shape

# Twice what the slowest tried needs, barely separable embeddings in the thousands whose logits pass 1000. Most need 10.
_NEWTON_STEPS = 40
_DOUBLINGS = 10  # of a step, at most
_EMBEDDINGS = "[N, D], one row per prompt"


class PromptClassifier(NamedTuple):
    """Logistic regression on prompt embeddings: the logit is `embedding . kernel + bias`."""

    kernel: Float[Array, " D"]
    bias: Float[Array, ""]


def fit_prompt_classifier(
    embeddings: Float[Array, "N D"], desirable: Bool[Array, " N"], *, regularisation: float | Float[Array, ""] = 1.0
) -> PromptClassifier:
    """Fit the probability that a prompt's response is desirable: logistic regression with balanced classes.

    `min over kernel, bias of sum_i c_i log(1 + exp(-y_i (e_i . kernel + bias))) + regularisation / 2 |kernel|^2`, with
    y = 1 for desirable and -1 for undesirable, and `c = N / (2 N_class)`, so that both kinds weigh the same. The bias
    is not penalised. Solved by damped Newton steps, a fixed number of them.

    Args:
        embeddings: `[N, D]`, one vector per prompt from a frozen model, any real numbers. Raw or standardised: scaling
            them changes what `regularisation` means, moving their origin changes nothing. Receives no gradient.
        desirable: `[N]` bool, True where the response to the prompt is wanted.
        regularisation: strength of the penalty, above 0; scikit-learn's 1 / C.

    Returns:
        The classifier, in float32 or in the wider type of `embeddings`. If all examples are of one kind the minimum
        lies at an infinite bias; a large finite one, for that kind, is returned.

    Raises:
        ValueError: shapes are not `[N, D]` and `[N]`, `desirable` is not boolean, or `regularisation` is a plain number
            that is not finite and above 0.

    References:
        Jung et al., "Binary Classifier Optimization for Large Language Model Alignment", arXiv 2404.04656. The length
        of a step: Sun and Tran-Dinh, "Generalized Self-Concordant Functions: A Recipe for Newton-Type Methods",
        arXiv 1703.04599, for the logistic loss.

    Notes:
        The objective is that of scikit-learn's `LogisticRegression(class_weight="balanced", C=1 / regularisation)`,
        which TRL's BCO trainer (0.24) fits with C = 1 on the embeddings of 1024 prompts.

    Examples:
        Two prompts at -1 and 1: by symmetry the bias is 0, and the kernel w solves 2 sigmoid(-w) = w, so w = 0.6748
        (2 / (1 + exp(0.6748)) = 0.6748).

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> classifier = losses.fit_prompt_classifier(jnp.array([[-1.0], [1.0]]), jnp.array([False, True]))
        >>> print(np.asarray(classifier.kernel).round(4))
        [0.6748]
    """
    check_shape("fit_prompt_classifier", _EMBEDDINGS, (None, None), embeddings=embeddings)
    check_mask("fit_prompt_classifier", "desirable", desirable)
    rows = embeddings.shape[0]
    check_shape("fit_prompt_classifier", f"[{rows}], one for each row of embeddings", (rows,), desirable=desirable)
    check_positive("fit_prompt_classifier", regularisation=regularisation)
    features = jax.lax.stop_gradient(as_float(embeddings))
    # With the default of an accelerator these products would be rounded to bf16 or TF32.
    with jax.default_matmul_precision("highest"):
        # The bias takes up any shift, so centring is free; far from the origin it would drown in rounding.
        centre = features.mean(0)
        features = features - centre[None]
        basis = None
        if features.shape[1] > features.shape[0]:
            # The kernel lies in the span of the examples: N unknowns instead of D.
            basis, triangle = jnp.linalg.qr(features.T)
            features = triangle.T
        solution = _newton(features, desirable, regularisation)
        kernel = solution[:-1] if basis is None else basis @ solution[:-1]
        return PromptClassifier(kernel, solution[-1] - kernel @ centre)


def desirable_probability(classifier: PromptClassifier, embeddings: Float[Array, "N D"]) -> Float[Array, " N"]:
    """Probability that the response to a prompt is desirable, whatever the response.

    `p = sigmoid(embedding . kernel + bias)`. No gradient flows through it.

    Args:
        classifier: from `fit_prompt_classifier`.
        embeddings: `[N, D]`, one vector per prompt, from the model (and scaled in the way) that the classifier was
            fitted on.

    Returns:
        `[N]` probabilities between 0 and 1, as if both kinds were equally frequent.

    Raises:
        ValueError: the shape is not `[N, D]` with the classifier's D.

    References:
        Jung et al., "Binary Classifier Optimization for Large Language Model Alignment", arXiv 2404.04656.

    Examples:
        A logit of 2 * 0.5 - 1 = 0 and one of 2 * 1.5 - 1 = 2: sigmoid(2) = 0.8808.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> classifier = losses.PromptClassifier(jnp.array([2.0]), jnp.float32(-1.0))
        >>> print(np.asarray(losses.desirable_probability(classifier, jnp.array([[0.5], [1.5]]))).round(4))
        [0.5    0.8808]
    """
    check_shape("desirable_probability", _EMBEDDINGS, (None, None), embeddings=embeddings)
    width, expected = jnp.shape(embeddings)[1], jnp.shape(classifier.kernel)
    if (width,) != expected:
        raise ValueError(
            f"desirable_probability: embeddings have {width} dimensions; classifier.kernel has shape {list(expected)}. "
            "Embed with the model that the classifier was fitted on"
        )
    logits = jnp.matmul(as_float(embeddings), classifier.kernel, precision=jax.lax.Precision.HIGHEST) + classifier.bias
    return jax.lax.stop_gradient(jax.nn.sigmoid(logits))


def udm_weights(
    probability: Float[Array, " B"],
    desirable: Bool[Array, " B"],
    *,
    low: float | Float[Array, ""] = 0.5,
    high: float | Float[Array, ""] = 10.0,
) -> Float[Array, " B"]:
    """Importance weights that make the prompts of undesirable responses look like those of desirable ones.

    `w = 1` for a desirable response, `w = clip(p / (1 - p), low, high)` for an undesirable one. No gradient flows
    through them.

    Args:
        probability: `[B]`, probability between 0 and 1 that the prompt's response is desirable
            (`desirable_probability`).
        desirable: `[B]` bool, True where the response is wanted.
        low: smallest weight, above 0.
        high: largest weight, at least `low`.

    Returns:
        `[B]` weights for `bco`.

    Raises:
        ValueError: shapes are not the same `[B]`, `desirable` is not boolean, or `low` and `high` are plain numbers
            that are not finite, above 0 and in this order.

    References:
        Jung et al., "Binary Classifier Optimization for Large Language Model Alignment", arXiv 2404.04656.

    Notes:
        0.5 and 10 are the limits of TRL's BCO trainer (0.24).

    Examples:
        0.8 / 0.2 = 4; 0.1 / 0.9 is below 0.5; the last response is desirable.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> desirable = jnp.array([False, False, True])
        >>> print(np.asarray(losses.udm_weights(jnp.array([0.8, 0.1, 0.1]), desirable)).round(4))
        [4.  0.5 1. ]
    """
    check_shape("udm_weights", "[B]", (None,), probability=probability)
    check_mask("udm_weights", "desirable", desirable)
    check_same_shape("udm_weights", probability=probability, desirable=desirable)
    check_positive("udm_weights", low=low, high=high)
    if isinstance(low, numbers.Real) and isinstance(high, numbers.Real) and low > high:
        raise ValueError(f"udm_weights: low is {low} and high is {high}; expected low at most high")
    probability = jax.lax.stop_gradient(as_float(probability))
    # Certain prompts (p = 1) get `high`, without a division by zero on the way.
    ratio = probability / jnp.maximum(1 - probability, jnp.finfo(probability.dtype).tiny)
    return jnp.where(desirable, 1.0, jnp.clip(ratio, low, high))


def _newton(
    features: Float[Array, "N F"], desirable: Bool[Array, " N"], regularisation: float | Float[Array, ""]
) -> Float[Array, " F_plus_1"]:
    """Return the minimiser of the balanced logistic objective, the bias last."""
    size, dtype = features.shape[0], features.dtype
    inputs = jnp.concatenate([features, jnp.ones((size, 1), dtype)], axis=1)
    wanted = desirable.sum()
    balance = size / (2 * jnp.where(desirable, wanted, size - wanted).astype(dtype))
    penalty = jnp.full(inputs.shape[1], regularisation, dtype).at[-1].set(0.0)

    def step(_, solution):
        # Both residuals as sigmoids: 1 - sigmoid(x) has no digits left for a large x.
        def slopes(solution, logits):
            residuals = jnp.where(desirable, -jax.nn.sigmoid(-logits), jax.nn.sigmoid(logits))
            return balance * residuals, penalty * solution

        logits = inputs @ solution
        by_logit, by_weight = slopes(solution, logits)
        gradient = inputs.T @ by_logit + by_weight
        curvature = balance * jax.nn.sigmoid(logits) * jax.nn.sigmoid(-logits)
        direction = _solve((inputs * curvature[:, None]).T @ inputs + jnp.diag(penalty), gradient)
        moves = inputs @ direction

        def slope_after(length):
            by_logit, by_weight = slopes(solution - length * direction, logits - length * moves)
            return -(moves @ by_logit + direction @ by_weight)

        return solution - _step_length(slope_after, moves) * direction

    return jax.lax.fori_loop(0, _NEWTON_STEPS, step, jnp.zeros(inputs.shape[1], dtype))


def _solve(hessian: Float[Array, "F F"], gradient: Float[Array, " F"]) -> Float[Array, " F"]:
    """Return the Newton direction, or 0 where there is no curvature to tell one."""
    # Rounding must not make the matrix indefinite. It bends a step a little, not the point where the steps end.
    jitter = hessian.shape[0] * jnp.finfo(hessian.dtype).eps * jnp.diag(jnp.diag(hessian))
    direction = jax.scipy.linalg.solve(hessian + jitter, gradient, assume_a="pos")
    # With one kind of examples alone the bias runs until no curvature is left: it stays there.
    return jnp.where(jnp.isfinite(direction).all(), direction, 0.0)


def _step_length(slope_after: Callable[[Array], Array], moves: Float[Array, " N"]) -> Float[Array, ""]:
    """Return how far to go along a direction that changes the logits by `moves`, without overshooting."""
    # This far it surely goes down: no logit moves by more than log(1 + reach). Towards the end reach goes to 0 and
    # the step to a whole one.
    reach = jnp.maximum(jnp.abs(moves).max(), jnp.finfo(moves.dtype).tiny)
    sure = jnp.log1p(reach) / reach
    # Far from the end that is too careful: doubled while it still goes down there, as the slope only rises along the
    # way. No values are compared, which float32 could not tell apart near the end.
    doublings = 2.0 ** jnp.arange(1, 1 + _DOUBLINGS, dtype=moves.dtype)
    falling = jax.vmap(slope_after)(sure * doublings) <= 0
    return sure * 2.0 ** falling.sum().astype(moves.dtype)
