"""Losses on single responses in float64, one response at a time, and what they need of a whole batch."""

import math

import numpy as np


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def minus_log_sigmoid(x: float) -> float:
    return float(np.logaddexp(0.0, -x))


def kto_kl(policy, reference, listed):
    ratios = [float(p) - float(r) for p, r, ok in zip(policy, reference, listed, strict=True) if ok]
    return max(0.0, sum(ratios) / len(ratios)) if ratios else 0.0


def kto(policy, reference, desirable, kl, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    """lambda_y - v(x, y), with the value function v of the paper."""
    losses = []
    for p, r, good in zip(policy, reference, desirable, strict=True):
        ratio = float(p) - float(r)
        if good:
            losses.append(desirable_weight - desirable_weight * sigmoid(beta * (ratio - float(kl))))
        else:
            losses.append(undesirable_weight - undesirable_weight * sigmoid(beta * (float(kl) - ratio)))
    return np.array(losses)


def apo_zero_unpaired(policy, reference, desirable, beta=0.1):
    losses = []
    for p, r, good in zip(policy, reference, desirable, strict=True):
        probability = sigmoid(beta * (float(p) - float(r)))
        losses.append(1.0 - probability if good else probability)
    return np.array(losses)


def bco(policy, reference, desirable, weights, shift, beta=0.1):
    losses = []
    for p, r, good, w in zip(policy, reference, desirable, weights, strict=True):
        reward = beta * (float(p) - float(r))
        losses.append(float(w) * minus_log_sigmoid(reward - float(shift) if good else -(reward - float(shift))))
    return np.array(losses)


def bco_pair(policy, reference, shift, beta=0.1):
    losses = []
    for p, r in zip(policy, reference, strict=True):
        chosen, rejected = (beta * (float(p[k]) - float(r[k])) for k in range(2))
        losses.append(minus_log_sigmoid(chosen - float(shift)) + minus_log_sigmoid(-(rejected - float(shift))))
    return np.array(losses)


def bco_means(steps, decay):
    """Means of both kinds after `steps` of (sums, counts): moving averages over sum of coefficients, from the start."""
    means = []
    for kind in range(2):
        seen = [float(sums[kind]) / float(counts[kind]) for sums, counts in steps if counts[kind]]
        coefficients = [decay ** (len(seen) - 1 - i) for i in range(len(seen))]
        weighed = sum(c * mean for c, mean in zip(coefficients, seen, strict=True))
        means.append(weighed / sum(coefficients) if seen else 0.0)
    return means


def udm_weights(probability, desirable, low=0.5, high=10.0):
    return np.array(
        [
            1.0 if good else high if p == 1 else min(max(float(p) / (1.0 - float(p)), low), high)
            for p, good in zip(probability, desirable, strict=True)
        ]
    )


def balanced_logistic(kernel, bias, embeddings, desirable, regularisation):
    """scikit-learn's objective with class_weight="balanced", divided by C, and its gradient (the bias's last)."""
    size, good = len(desirable), int(sum(desirable))
    value = 0.5 * regularisation * float(kernel @ kernel)
    gradient = np.append(regularisation * kernel, 0.0)
    for x, liked in zip(embeddings, desirable, strict=True):
        weight, y = (size / (2 * good), 1.0) if liked else (size / (2 * (size - good)), -1.0)
        margin = y * (float(x @ kernel) + bias)
        value += weight * minus_log_sigmoid(margin)
        gradient -= weight * sigmoid(-margin) * y * np.append(x, 1.0)
    return value, gradient


def fit_prompt_classifier(embeddings, desirable, regularisation):
    """Kernel and bias, by Newton's method with numerical curvature and halved steps."""
    width = embeddings.shape[1]

    def at(solution):
        return balanced_logistic(solution[:-1], solution[-1], embeddings, desirable, regularisation)

    solution = np.zeros(width + 1)
    for _ in range(50):
        value, gradient = at(solution)
        if np.abs(gradient).max() < 1e-9:
            break
        probes = 1e-5 * np.eye(width + 1)
        hessian = np.array([(at(solution + probe)[1] - at(solution - probe)[1]) / 2e-5 for probe in probes])
        direction = np.linalg.solve(hessian, gradient)
        length = 1.0
        while at(solution - length * direction)[0] > value and length > 1e-8:
            length /= 2
        solution = solution - length * direction
    return solution[:-1], solution[-1]
