"""The reconstructed losses in float64, one list or one demonstration at a time."""

import math

import numpy as np


def minus_log_sigmoid(x: float) -> float:
    return float(np.logaddexp(0.0, -x))


def _ranked(scores, labels, valid):
    """(score, label) of the valid responses, best label first, ties in the order of their index."""
    items = [(float(s), float(label)) for s, label, ok in zip(scores, labels, valid, strict=True) if ok]
    return sorted(items, key=lambda item: -item[1])


def rank_list(scores, labels, valid, skips=1, margin=0.0):
    losses = []
    for row in zip(scores, labels, valid, strict=True):
        items = _ranked(*row)
        loss = 0.0
        for skip in range(1, int(skips) + 1):
            for (above, label_above), (below, label_below) in zip(items, items[skip:], strict=False):
                if label_above > label_below and label_above - label_below >= margin:
                    loss += minus_log_sigmoid(above - below)
        losses.append(loss)
    return np.array(losses)


def rank_list_lse(scores, labels, valid):
    losses = []
    for row in zip(scores, labels, valid, strict=True):
        items = _ranked(*row)
        loss = 0.0
        for score, label in items:
            below = [other - score for other, other_label in items if other_label < label]
            loss += float(np.logaddexp.reduce([0.0, *below]))
        losses.append(loss)
    return np.array(losses)


def mapl_inter(policy, reference, beta=0.1):
    losses = []
    for p, r in zip(policy, reference, strict=True):
        gaps = [beta * ((float(p[x][0]) - float(r[x][0])) - (float(p[x][1]) - float(r[x][1]))) for x in range(2)]
        losses.append(minus_log_sigmoid(gaps[0] - gaps[1]))
    return np.array(losses)


def _f_sft(phi, slope, lowest, policy, reference, beta):
    """-phi(u), and below `lowest` minus the tangent of phi there."""

    def loss(p, r):
        u = beta * (float(p) - float(r))
        return -phi(u) if u >= lowest else -(phi(lowest) + slope(lowest) * (u - lowest))

    return np.vectorize(loss, otypes=[float])(policy, reference)


def f_sft_chi2(policy, reference, beta=0.1):
    return _f_sft(lambda u: u - u**2 / 4, lambda u: 1 - u / 2, -math.inf, policy, reference, beta)


def f_sft_hellinger(policy, reference, beta=0.1):
    return _f_sft(lambda u: u / (1 + u), lambda u: (1 + u) ** -2, -0.9, policy, reference, beta)


def f_sft_reverse_kl(policy, reference, beta=0.1):
    return _f_sft(lambda u: -math.exp(-u - 1), lambda u: math.exp(-u - 1), -71.0, policy, reference, beta)


def f_sft_forward_kl(policy, reference, beta=0.1):
    return _f_sft(lambda u: 1 + math.log(u), lambda u: 1 / u, 0.1, policy, reference, beta)


def f_sft_js(policy, reference, beta=0.1):
    def slope(u):
        return math.exp(-u) / (2 - math.exp(-u))

    return _f_sft(lambda u: math.log(2 - math.exp(-u)), slope, 0.1 - math.log(2), policy, reference, beta)
