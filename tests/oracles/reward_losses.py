"""Losses of reward models in float64, one example at a time."""

import numpy as np


def minus_log_sigmoid(x: float) -> float:
    return float(np.logaddexp(0.0, -x))


def bradley_terry(rewards):
    return np.array([minus_log_sigmoid(float(w) - float(l)) for w, l in rewards])


def bradley_terry_margin(rewards, margins):
    pairs = zip(rewards, margins, strict=True)
    return np.array([minus_log_sigmoid(float(w) - float(l) - float(m)) for (w, l), m in pairs])


def bradley_terry_scaled(rewards, margins):
    pairs = zip(rewards, margins, strict=True)
    return np.array([float(m) * minus_log_sigmoid(float(w) - float(l)) for (w, l), m in pairs])


def bradley_terry_centred(rewards, coefficient=0.01):
    return np.array(
        [minus_log_sigmoid(float(w) - float(l)) + coefficient * (float(w) + float(l)) ** 2 for w, l in rewards]
    )


def masked_regression(predictions, targets, valid):
    losses = []
    for row in zip(predictions, targets, valid, strict=True):
        errors = [(float(p) - float(t)) ** 2 for p, t, ok in zip(*row, strict=True) if ok]
        losses.append(sum(errors) / len(errors) if errors else 0.0)
    return np.array(losses)


def rotation(scales):
    """The skew-symmetric matrix R of the paper, a block (0, -1; 1, 0) for each pair of coordinates, scaled."""
    matrix = np.zeros((2 * len(scales), 2 * len(scales)))
    for l, scale in enumerate(scales):
        matrix[2 * l, 2 * l + 1], matrix[2 * l + 1, 2 * l] = -float(scale), float(scale)
    return matrix


def gpm_scores(embeddings, weights):
    """s(y_i > y_j) = <R v_i, v_j>."""
    size, count = embeddings.shape[:2]
    scores = np.zeros((size, count, count))
    for b in range(size):
        for i in range(count):
            for j in range(count):
                scores[b, i, j] = (rotation(weights[b]) @ embeddings[b, i]) @ embeddings[b, j]
    return scores


def gpm(embeddings, weights, temperature=0.1):
    return np.array([minus_log_sigmoid(s[0, 1] / temperature) for s in gpm_scores(embeddings, weights)])
