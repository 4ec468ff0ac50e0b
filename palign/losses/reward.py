"""Losses of reward models: scalar rewards of pairs, graded attributes, and preferences that no scalar can express.

Rewards are any real numbers, what a scalar head returns for a whole response. Only differences within a prompt count
for the Bradley-Terry losses; `bradley_terry_centred` ties down the rest.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from palign.losses.checks import as_float, check_mask, check_pairs, check_positive, check_same_shape, check_shape
from palign.losses.checks import margins as chosen_minus_rejected


def bradley_terry(rewards: Float[Array, "B 2"]) -> Float[Array, " B"]:
    """Bradley-Terry: the negative log-probability that the chosen response wins.

    `L = -log sigmoid(r_w - r_l)`

    Args:
        rewards: `[B, 2]`, rewards of the chosen (column 0) and the rejected (column 1) response.

    Returns:
        `[B]` losses in nats, at least 0; log 2 where the rewards are equal.

    Raises:
        ValueError: the shape is not `[B, 2]`.

    References:
        Bradley and Terry, "Rank Analysis of Incomplete Block Designs: I. The Method of Paired Comparisons",
        Biometrika 39 (1952). As the loss of a reward model: Ouyang et al., arXiv 2203.02155, Eq. 1.

    Examples:
        A lead of 2 costs log(1 + exp(-2)) = 0.1269, a tie log 2 = 0.6931.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> print(np.asarray(losses.bradley_terry(jnp.array([[1.5, -0.5], [3.0, 3.0]]))).round(4))
        [0.1269 0.6931]
    """
    check_pairs("bradley_terry", rewards=rewards)
    return jax.nn.softplus(-chosen_minus_rejected(as_float(rewards)))


def bradley_terry_margin(rewards: Float[Array, "B 2"], margins: Float[Array, " B"]) -> Float[Array, " B"]:
    """Bradley-Terry with a margin: the clearer the preference, the larger the lead that is asked for.

    `L = -log sigmoid(r_w - r_l - m)`

    Args:
        rewards: `[B, 2]`, rewards of the chosen (column 0) and the rejected (column 1) response.
        margins: `[B]`, m in units of reward, larger for clearer preferences; 0 for an ordinary pair. Receives no
            gradient.

    Returns:
        `[B]` losses in nats, at least 0; log 2 where the lead is exactly the margin.

    Raises:
        ValueError: the shapes are not `[B, 2]` and `[B]`.

    References:
        Touvron et al., "Llama 2: Open Foundation and Fine-Tuned Chat Models", arXiv 2307.09288, Eq. 2.

    Examples:
        A lead of 2 with a margin of 1: log(1 + exp(-1)) = 0.3133.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> print(np.asarray(losses.bradley_terry_margin(jnp.array([[1.5, -0.5]]), jnp.array([1.0]))).round(4))
        [0.3133]
    """
    check_pairs("bradley_terry_margin", rewards=rewards)
    check_same_shape("bradley_terry_margin", margins=margins, **{"rewards[:, 0]": rewards[:, 0]})
    return jax.nn.softplus(jax.lax.stop_gradient(as_float(margins)) - chosen_minus_rejected(as_float(rewards)))


def bradley_terry_scaled(rewards: Float[Array, "B 2"], margins: Float[Array, " B"]) -> Float[Array, " B"]:
    """Bradley-Terry weighed by a margin: the clearer the preference, the more it counts.

    `L = -m log sigmoid(r_w - r_l)`. A pair of margin 3 is as good as the same pair three times; no lead is prescribed.

    Args:
        rewards: `[B, 2]`, rewards of the chosen (column 0) and the rejected (column 1) response.
        margins: `[B]`, strength m of the preference, at least 0 (in HelpSteer2-Preference 1, 2 or 3). Receives no
            gradient.

    Returns:
        `[B]` losses in nats, at least 0; m log 2 where the rewards are equal.

    Raises:
        ValueError: the shapes are not `[B, 2]` and `[B]`.

    References:
        Wang et al., "HelpSteer2-Preference: Complementing Ratings with Preferences", arXiv 2410.01257 (scaled
        Bradley-Terry).

    Examples:
        A lead of 2 and strength 3: 3 log(1 + exp(-2)) = 0.3808.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> print(np.asarray(losses.bradley_terry_scaled(jnp.array([[1.5, -0.5]]), jnp.array([3.0]))).round(4))
        [0.3808]
    """
    check_pairs("bradley_terry_scaled", rewards=rewards)
    check_same_shape("bradley_terry_scaled", margins=margins, **{"rewards[:, 0]": rewards[:, 0]})
    return jax.lax.stop_gradient(as_float(margins)) * jax.nn.softplus(-chosen_minus_rejected(as_float(rewards)))


def bradley_terry_centred(
    rewards: Float[Array, "B 2"], *, coefficient: float | Float[Array, ""] = 0.01
) -> Float[Array, " B"]:
    """Bradley-Terry with rewards held around 0, so that they can be compared between prompts and models.

    `L = -log sigmoid(r_w - r_l) + coefficient (r_w + r_l)^2`

    Args:
        rewards: `[B, 2]`, rewards of the chosen (column 0) and the rejected (column 1) response.
        coefficient: strength of the centring, above 0.

    Returns:
        `[B]` losses, at least 0; `bradley_terry` where the two rewards are opposite numbers.

    Raises:
        ValueError: the shape is not `[B, 2]`, or `coefficient` is a plain number that is not finite and above 0.

    References:
        Eisenstein et al., "Helping or Herding? Reward Model Ensembles Mitigate but do not Eliminate Reward Hacking",
        arXiv 2312.09244.

    Notes:
        TRL's reward trainer has the coefficient as `center_rewards_coefficient`.

    Examples:
        A lead of 2 costs log(1 + exp(-2)) = 0.1269, the sum of 1 another 0.01 * 1^2.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> print(np.asarray(losses.bradley_terry_centred(jnp.array([[1.5, -0.5]]), coefficient=0.01)).round(4))
        [0.1369]
    """
    check_pairs("bradley_terry_centred", rewards=rewards)
    check_positive("bradley_terry_centred", coefficient=coefficient)
    rewards = as_float(rewards)
    return jax.nn.softplus(-chosen_minus_rejected(rewards)) + coefficient * jnp.square(rewards.sum(-1))


def masked_regression(
    predictions: Float[Array, "B H"], targets: Float[Array, "B H"], valid: Bool[Array, "B H"]
) -> Float[Array, " B"]:
    """Squared error of graded attributes, where an example need not have all grades.

    `L = sum_valid (prediction - target)^2 / n_valid`

    Args:
        predictions: `[B, H]`, one per attribute (helpfulness, correctness, ...).
        targets: `[B, H]`, the grades. What stands where `valid` is False is never read, not even NaN. Receives no
            gradient.
        valid: `[B, H]` bool, True where the grade is known.

    Returns:
        `[B]` mean squared errors over the known grades, in squared units of the grades; 0, with zero gradient, for an
        example without any.

    Raises:
        ValueError: shapes are not the same `[B, H]`, or `valid` is not boolean.

    References:
        Wang et al., "Interpretable Preferences via Multi-Objective Reward Modeling and Mixture-of-Experts",
        arXiv 2406.12845 (regression on the attributes of several data sets, each with some of them).

    Examples:
        Errors of 1 and 2 with one grade missing: (1 + 4) / 2 = 2.5. The second response has no grades.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> targets = jnp.array([[4.0, 1.0, jnp.nan], [jnp.nan, jnp.nan, jnp.nan]])
        >>> print(np.asarray(losses.masked_regression(jnp.full((2, 3), 3.0), targets, ~jnp.isnan(targets))))
        [2.5 0. ]
    """
    check_shape("masked_regression", "[B, H], one column per attribute", (None, None), predictions=predictions)
    check_mask("masked_regression", "valid", valid)
    check_same_shape("masked_regression", predictions=predictions, targets=targets, valid=valid)
    predictions, targets = (jnp.where(valid, as_float(array), 0.0) for array in (predictions, targets))
    errors = jnp.square(predictions - jax.lax.stop_gradient(targets))
    return errors.sum(-1) / jnp.maximum(valid.sum(-1), 1).astype(errors.dtype)


def gpm_scores(embeddings: Float[Array, "B K two_k"], weights: Float[Array, "B k"]) -> Float[Array, "B K K"]:
    """General preference scores of all pairs of responses: antisymmetric, and not necessarily transitive.

    `s_ij = sum_l weights_l (v_i,2l v_j,2l+1 - v_i,2l+1 v_j,2l)`: response i is preferred to j where `s_ij` is positive.

    Args:
        embeddings: `[B, K, 2k]`, a vector v of even length per response, its coordinates in k pairs (0, 1), (2, 3), ...
        weights: `[B, k]`, scale of each pair of coordinates, at least 0; from a head on the prompt (in the authors'
            code k times a softmax), or ones. A gradient reaches it.

    Returns:
        `[B, K, K]` scores: `s_ij = -s_ji` and `s_ii = 0`.

    Raises:
        ValueError: the shapes are not `[B, K, 2k]` and `[B, k]`.

    References:
        Zhang et al., "Beyond Bradley-Terry Models: A General Preference Model for Language Model Alignment",
        arXiv 2410.02197.

    Notes:
        With k = 1 and vectors (r, 1) the score is `r_i - r_j`: Bradley-Terry. With two coordinates free, rock, paper
        and scissors can be put on a circle.

    Examples:
        (1, 0) against (0, 1): 1 * 1 - 0 * 0 = 1, and -1 the other way round.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> print(np.asarray(losses.gpm_scores(jnp.array([[[1.0, 0.0], [0.0, 1.0]]]), jnp.ones((1, 1)))))
        [[[ 0.  1.]
          [-1.  0.]]]
    """
    _check_embeddings("gpm_scores", embeddings, weights)
    embeddings, weights = as_float(embeddings), as_float(weights)
    even, odd = embeddings[..., 0::2], embeddings[..., 1::2]
    # A sum of products, not a matrix product, which an accelerator would round to bf16 or TF32: k is small.
    forwards = (weights[:, None, None, :] * even[:, :, None, :] * odd[:, None, :, :]).sum(-1)
    return forwards - forwards.swapaxes(1, 2)


def gpm(
    embeddings: Float[Array, "B 2 two_k"],
    weights: Float[Array, "B k"],
    *,
    temperature: float | Float[Array, ""] = 0.1,
) -> Float[Array, " B"]:
    """General preference model: logistic regression on the antisymmetric score of a pair.

    `L = -log sigmoid(s / temperature)`, with `s = gpm_scores(...)` of the chosen over the rejected response.

    Args:
        embeddings: `[B, 2, 2k]`, vectors of the chosen (index 0) and the rejected (index 1) response.
        weights: `[B, k]`, scale of each pair of coordinates, as in `gpm_scores`. A gradient reaches it.
        temperature: divides the score, above 0.

    Returns:
        `[B]` losses in nats, at least 0; log 2 where both vectors are equal.

    Raises:
        ValueError: the shapes are not `[B, 2, 2k]` and `[B, k]`, or `temperature` is a plain number that is not finite
            and above 0.

    References:
        Zhang et al., "Beyond Bradley-Terry Models: A General Preference Model for Language Model Alignment",
        arXiv 2410.02197.

    Notes:
        The authors use temperature 0.1 and 2 to 8 coordinates. TRL, tunix and EasyDeL have no such loss.

    Examples:
        A score of 0.5 * 1 - 1 * 0.3 = 0.2 at temperature 0.1: log(1 + exp(-2)) = 0.1269.

        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from palign import losses
        >>> vectors = jnp.array([[[0.5, 1.0], [0.3, 1.0]]])
        >>> print(np.asarray(losses.gpm(vectors, jnp.ones((1, 1)))).round(4))
        [0.1269]
    """
    _check_embeddings("gpm", embeddings, weights)
    check_positive("gpm", temperature=temperature)
    if jnp.shape(embeddings)[1] != 2:
        raise ValueError(
            f"gpm: embeddings has shape {list(jnp.shape(embeddings))}; expected [B, 2, 2k] with index 0 = chosen, "
            "index 1 = rejected"
        )
    return jax.nn.softplus(-gpm_scores(embeddings, weights)[:, 0, 1] / temperature)


def _check_embeddings(loss: str, embeddings: Array, weights: Array) -> None:
    """Raise ValueError unless the shapes are `[B, K, 2k]` and `[B, k]`."""
    given, scales = jnp.shape(embeddings), jnp.shape(weights)
    if len(given) != 3 or given[-1] % 2:
        raise ValueError(f"{loss}: embeddings has shape {list(given)}; expected [B, K, 2k], vectors of even length")
    if scales != (given[0], given[-1] // 2):
        raise ValueError(
            f"{loss}: weights has shape {list(scales)}; expected {[given[0], given[-1] // 2]}, one for each pair of "
            f"coordinates of embeddings {list(given)}"
        )
