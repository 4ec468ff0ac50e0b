"""Divergences and AlignDistil in float64, one position and one token at a time. Excluded tokens hold -inf."""

import math

import numpy as np


def log_softmax(logits):
    highest = max(logits)
    normaliser = highest + math.log(sum(math.exp(z - highest) for z in logits))
    return [z - normaliser for z in logits]


def softmax(logits):
    return [math.exp(value) for value in log_softmax(logits)]


def kl(first, second):
    """KL(first || second) of two vectors of logits."""
    total = 0.0
    for log_p, log_q in zip(log_softmax(first), log_softmax(second), strict=True):
        if log_p > -math.inf:
            total += math.exp(log_p) * (log_p - log_q)
    return total


def entropy(probabilities):
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def jsd(student, teacher, beta):
    """Entropy of the mixture less the mixed entropies."""
    p, q = softmax(teacher), softmax(student)
    mixture = [beta * p_v + (1 - beta) * q_v for p_v, q_v in zip(p, q, strict=True)]
    return entropy(mixture) - beta * entropy(p) - (1 - beta) * entropy(q)


def combine(first, second, weight_first, weight_second):
    pairs = zip(first, second, strict=True)
    return [-math.inf if a == -math.inf else weight_first * a + weight_second * b for a, b in pairs]


def theorem1(student, dpo, reference, beta, beta0):
    return beta * kl(student, combine(dpo, reference, beta0 / beta, 1 - beta0 / beta))


def contrastive(student, dpo, reverse, beta, beta0):
    return beta * kl(student, combine(dpo, reverse, 1 + beta0 / beta, -beta0 / beta))


def alpha(dpo, reverse, scale, epsilon):
    return scale * 0.5 * sum(abs(p - n) for p, n in zip(softmax(dpo), softmax(reverse), strict=True)) + epsilon


def adaptive_kl(student, dpo, reverse, scale, epsilon):
    a = alpha(dpo, reverse, scale, epsilon)
    return kl(student, combine(dpo, reverse, 1 + a, -a))


def aligndistil(student, dpo, reverse, beta0, scale, epsilon):
    return beta0 / alpha(dpo, reverse, scale, epsilon) * adaptive_kl(student, dpo, reverse, scale, epsilon)


def aligndistil_official(student, dpo, reverse, beta0, scale, epsilon):
    distance = sum(abs(p - n) for p, n in zip(softmax(dpo), softmax(reverse), strict=True))
    a = scale * distance + epsilon
    return beta0 / a * kl(student, combine(dpo, reverse, 1 + a, -a))


def aligndistil_constant(student, dpo, reverse, beta0, scale, epsilon=1e-3):
    return beta0 * adaptive_kl(student, dpo, reverse, scale, epsilon)


def aligndistil_capped(student, dpo, reverse, beta0, cap, scale=20.0, epsilon=1e-3):
    weight = min(beta0 / alpha(dpo, reverse, scale, epsilon), cap)
    return weight * adaptive_kl(student, dpo, reverse, scale, epsilon)


def forward_kl(student, teacher):
    return kl(teacher, student)


def scaled_jsd(student, teacher, beta):
    return jsd(student, teacher, beta) / (beta * (1 - beta))


def per_position(function, *logits, **options):
    """Apply a function of vectors of logits to arrays `[..., V]`."""
    arrays = [np.asarray(values, np.float64) for values in logits]
    out = np.empty(arrays[0].shape[:-1])
    for index in np.ndindex(out.shape):
        out[index] = function(*[array[index].tolist() for array in arrays], **options)
    return out
