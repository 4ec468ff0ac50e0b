"""Distillation of rankings and raw scores in float64, one position, place and pair at a time."""

import math

import numpy as np

from tests.oracles.distill_losses import log_softmax, softmax


def _position(student, teacher, label, temperature, top):
    others = [v for v in range(len(student)) if v != label]
    ranking = [label, *sorted(others, key=lambda v: (-teacher[v], v))]
    alpha = softmax([t / temperature for t in teacher])
    loss = 0.0
    for k, chosen in enumerate(ranking[:top]):
        # The chosen one comes first among what is left.
        loss -= alpha[chosen] * log_softmax([student[v] for v in ranking[k:]])[0] if alpha[chosen] else 0.0
    return loss


def pld(student, teacher, labels, temperature=1.0, top=None):
    out = np.empty(np.shape(labels))
    for index in np.ndindex(out.shape):
        out[index] = _position(student[index].tolist(), teacher[index].tolist(), int(labels[index]), temperature, top)
    return out


def margin_mse(scores, teacher):
    return np.array([((s[0] - s[1]) - (t[0] - t[1])) ** 2 for s, t in zip(scores, teacher, strict=True)])


def pairwise_mse(scores, teacher, valid):
    losses = []
    for s, t, keep in zip(scores, teacher, valid, strict=True):
        kept = [k for k, ok in enumerate(keep) if ok]
        squares = [((s[i] - s[j]) - (t[i] - t[j])) ** 2 for n, i in enumerate(kept) for j in kept[n + 1 :]]
        losses.append(sum(squares) / len(squares) if squares else 0.0)
    return np.array(losses)


def binary_kl_norm(student, teacher, temperature):
    """The sum of KL(1/2 || sigmoid((s - t) / T)) over the classes, times T^2."""
    out = np.zeros(np.shape(student)[:-1])
    for index in np.ndindex(out.shape):
        for s, t in zip(student[index].tolist(), teacher[index].tolist(), strict=True):
            x = (s - t) / temperature
            log_p, log_not_p = -np.logaddexp(0.0, -x), -np.logaddexp(0.0, x)
            out[index] += 0.5 * (math.log(0.5) - log_p) + 0.5 * (math.log(0.5) - log_not_p)
    return temperature**2 * out
