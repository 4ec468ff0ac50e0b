"""Pairwise losses with another divergence, target, weight or coupling, in float64, from the papers' equations."""

import math

import numpy as np


def log_sigmoid(x: float) -> float:
    return float(-np.logaddexp(0.0, -x))


def sigmoid(x: float) -> float:
    return math.exp(log_sigmoid(x))


def log_ratio_pairs(policy, reference):
    """The log-ratios (chosen, rejected) of each row."""
    for p, r in zip(policy, reference, strict=True):
        yield float(p[0]) - float(r[0]), float(p[1]) - float(r[1])


def f_dpo(policy, reference, beta, derivative):
    """With f' a function of the ratio of probabilities u."""
    out = []
    for chosen, rejected in log_ratio_pairs(policy, reference):
        gap = derivative(math.exp(chosen)) - derivative(math.exp(rejected))
        out.append(-log_sigmoid(beta * gap))
    return np.array(out)


def f_dpo_forward_kl(policy, reference, beta):
    return f_dpo(policy, reference, beta, lambda u: -1.0 / u)


def f_dpo_js(policy, reference, beta):
    return f_dpo(policy, reference, beta, lambda u: math.log(2.0 * u / (1.0 + u)))


def f_dpo_alpha(policy, reference, beta, alpha):
    return f_dpo(policy, reference, beta, lambda u: (1.0 - u**-alpha) / alpha)


def trl_alpha_divergence(policy, reference, beta, coefficient):
    """TRL's form: the coefficient c gives f'(u) = u^(c - 1) / (c - 1), up to a constant."""
    return f_dpo(policy, reference, beta, lambda u: u ** (coefficient - 1.0) / (coefficient - 1.0))


def tdpo1(policy, reference, divergence, beta):
    rows = zip(log_ratio_pairs(policy, reference), divergence, strict=True)
    return np.array([-log_sigmoid(beta * ((w - l) - (float(d[1]) - float(d[0])))) for (w, l), d in rows])


def tdpo2(policy, reference, divergence, beta, alpha):
    rows = zip(log_ratio_pairs(policy, reference), divergence, strict=True)
    return np.array([-log_sigmoid(beta * ((w - l) - alpha * (float(d[1]) - float(d[0])))) for (w, l), d in rows])


def exo_pair(policy, reference, beta, label_smoothing):
    """The Kullback-Leibler sum over the two outcomes."""
    label = (1.0 - label_smoothing, label_smoothing)
    out = []
    for chosen, rejected in log_ratio_pairs(policy, reference):
        normaliser = float(np.logaddexp(beta * chosen, beta * rejected))
        logs = (beta * chosen - normaliser, beta * rejected - normaliser)
        out.append(sum(math.exp(log) * (log - math.log(p)) for log, p in zip(logs, label, strict=True)))
    return np.array(out)


def nca_pair(policy, reference, beta):
    return np.array(
        [
            -log_sigmoid(beta * w) - 0.5 * log_sigmoid(-beta * w) - 0.5 * log_sigmoid(-beta * l)
            for w, l in log_ratio_pairs(policy, reference)
        ]
    )


def apo_zero(policy, reference, beta):
    return np.array([1.0 - sigmoid(beta * w) + sigmoid(beta * l) for w, l in log_ratio_pairs(policy, reference)])


def apo_down(policy, reference, beta):
    return np.array([sigmoid(beta * w) + 1.0 - sigmoid(beta * (w - l)) for w, l in log_ratio_pairs(policy, reference)])


def sppo_hard(policy, reference, beta):
    """With eta = 1 / beta and the probabilities of winning 1 and 0."""
    return np.array(
        [(w - (1.0 - 0.5) / beta) ** 2 + (l - (0.0 - 0.5) / beta) ** 2 for w, l in log_ratio_pairs(policy, reference)]
    )


def wpo_weights(alignment):
    return np.array([min(1.0, math.exp(min(float(a[0]) + float(a[1]), 700.0))) for a in alignment])


def wpo(policy, reference, alignment, beta):
    weights = wpo_weights(alignment)
    return np.array(
        [-weights[i] * log_sigmoid(beta * (w - l)) for i, (w, l) in enumerate(log_ratio_pairs(policy, reference))]
    )


def smoothed(x, label_smoothing):
    return -(1.0 - label_smoothing) * log_sigmoid(x) - label_smoothing * log_sigmoid(-x)


def aot(policy, matched, beta, label_smoothing):
    return np.array(
        [
            smoothed(beta * (float(p[0]) - float(p[1]) - float(m)), label_smoothing)
            for p, m in zip(policy, matched, strict=True)
        ]
    )


def aot_unpaired(policy, reference, matched, beta, label_smoothing):
    out = []
    for (w, l), m in zip(log_ratio_pairs(policy, reference), matched, strict=True):
        chosen = smoothed(beta * (w - float(m[0])), label_smoothing)
        rejected = smoothed(beta * (float(m[1]) - l), label_smoothing)
        out.append(0.5 * (chosen + rejected))
    return np.array(out)


def of_same_rank(values, others):
    """For every entry, by counting: the entry of `others` with as many before it."""
    out = []
    for i, value in enumerate(values):
        rank = sum(v < value or (v == value and j < i) for j, v in enumerate(values))
        out.append(sorted(float(o) for o in others)[rank])
    return np.array(out)


def discopop(policy, reference, beta, temperature):
    out = []
    for chosen, rejected in log_ratio_pairs(policy, reference):
        x = beta * (chosen - rejected)
        mix = sigmoid(x / temperature)
        out.append((1.0 - mix) * -log_sigmoid(x) + mix * math.exp(-x))
    return np.array(out)


def spa(policy, reference, detection, threshold, beta, alpha):
    out = []
    rows = zip(log_ratio_pairs(policy, reference), log_ratio_pairs(detection, reference), strict=True)
    for (w, l), (detected_w, detected_l) in rows:
        noisy = beta * (detected_w - detected_l) <= float(threshold)
        out.append(smoothed(beta * (w - l), alpha if noisy else 0.0))
    return np.array(out)


def mapl_intra(policy, reference, beta):
    return np.array([-log_sigmoid(beta * (w - l)) for w, l in log_ratio_pairs(policy, reference)])


def bvpo(trace_losses, empty_losses, alpha):
    return np.array(
        [alpha * float(t) + (1.0 - alpha) * float(e) for t, e in zip(trace_losses, empty_losses, strict=True)]
    )
