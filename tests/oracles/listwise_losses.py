"""Listwise losses in float64, one list at a time, from their definitions as rankings."""

import math

import numpy as np


def _scores(policy, reference, labels, valid, beta):
    """(score, label) of the valid responses of one list."""
    return [
        (beta * (float(p) - float(r)), float(label))
        for p, r, label, ok in zip(policy, reference, labels, valid, strict=True)
        if ok
    ]


def _log_sum_exp(values):
    highest = max(values)
    return highest + math.log(sum(math.exp(value - highest) for value in values))


def plackett_luce(policy, reference, labels, valid, beta, top=None):
    losses = []
    for row in zip(policy, reference, labels, valid, strict=True):
        items = _scores(*row, beta)
        loss, placed = 0.0, 0
        blocks = sorted({label for _, label in items}, reverse=True)
        # Pick block after block from what is left; the last block is then no choice any more.
        for block in blocks[:-1]:
            if top is not None and placed >= top:
                break
            left = [score for score, label in items if label <= block]
            for score, label in items:
                if label == block:
                    loss += _log_sum_exp(left) - score
                    placed += 1
        losses.append(loss)
    return np.array(losses)


def lipo_lambda(policy, reference, labels, valid, beta):
    losses = []
    for row in zip(policy, reference, labels, valid, strict=True):
        items = _scores(*row, beta)
        by_score = sorted(range(len(items)), key=lambda i: (-items[i][0], i))
        rank = {i: place for place, i in enumerate(by_score, start=1)}
        loss = 0.0
        for i, (score_i, label_i) in enumerate(items):
            for j, (score_j, label_j) in enumerate(items):
                if label_i > label_j:
                    gain = abs((2.0**label_i - 1.0) - (2.0**label_j - 1.0))
                    discount = abs(1.0 / math.log(1.0 + rank[i]) - 1.0 / math.log(1.0 + rank[j]))
                    loss += gain * discount * float(np.logaddexp(0.0, -(score_i - score_j)))
        losses.append(loss)
    return np.array(losses)


def _per_list(one, policy, reference, labels, valid, beta):
    """`one` of the valid responses, (s, label), of every list; nothing is paid for an empty list."""
    rows = (_scores(*row, beta) for row in zip(policy, reference, labels, valid, strict=True))
    return np.array([one(items) if items else 0.0 for items in rows])


def _log_sigmoid(x):
    return -float(np.logaddexp(0.0, -x))


def lipo_pointwise_mse(policy, reference, labels, valid, beta):
    def one(items):
        return sum((label - score) ** 2 for score, label in items)

    return _per_list(one, policy, reference, labels, valid, beta)


def lipo_pointwise_sigmoid(policy, reference, labels, valid, beta):
    def one(items):
        return -sum(label * _log_sigmoid(score) + (1.0 - label) * _log_sigmoid(-score) for score, label in items)

    return _per_list(one, policy, reference, labels, valid, beta)


def _over_pairs(term, policy, reference, labels, valid, beta):
    """Sum of `term(s_i - s_j)` over the pairs with label_i > label_j."""

    def one(items):
        return sum(term(s_i - s_j) for s_i, label_i in items for s_j, label_j in items if label_i > label_j)

    return _per_list(one, policy, reference, labels, valid, beta)


def lipo_pair_logistic(policy, reference, labels, valid, beta):
    return _over_pairs(lambda gap: -_log_sigmoid(gap), policy, reference, labels, valid, beta)


def lipo_pair_hinge(policy, reference, labels, valid, beta):
    return _over_pairs(lambda gap: max(0.0, 1.0 - gap), policy, reference, labels, valid, beta)


def _log_softmax(values):
    normaliser = _log_sum_exp(values)
    return [value - normaliser for value in values]


def lipo_softmax(policy, reference, labels, valid, beta):
    def one(items):
        log_p = _log_softmax([score for score, _ in items])
        return -sum(label * value for (_, label), value in zip(items, log_p, strict=True))

    return _per_list(one, policy, reference, labels, valid, beta)


def _targets(items, temperature):
    """Softmax of the labels."""
    return [math.exp(value) for value in _log_softmax([label / temperature for _, label in items])]


def listnet(policy, reference, labels, valid, beta, temperature):
    def one(items):
        log_p = _log_softmax([score for score, _ in items])
        return -sum(w * value for w, value in zip(_targets(items, temperature), log_p, strict=True))

    return _per_list(one, policy, reference, labels, valid, beta)


def nca(policy, reference, labels, valid, beta, temperature):
    def one(items):
        weights = _targets(items, temperature)
        return -sum(
            w * _log_sigmoid(reward) + _log_sigmoid(-reward) / len(items)
            for w, (reward, _) in zip(weights, items, strict=True)
        )

    return _per_list(one, policy, reference, labels, valid, beta)


def exo(policy, reference, labels, valid, beta, temperature):
    def one(items):
        log_p = _log_softmax([score for score, _ in items])
        log_w = _log_softmax([label / temperature for _, label in items])
        return sum(math.exp(p) * (p - w) for p, w in zip(log_p, log_w, strict=True))

    return _per_list(one, policy, reference, labels, valid, beta)


def sppo(policy, reference, win_rates, valid, beta):
    def one(items):
        return sum((ratio - (rate - 0.5) / beta) ** 2 for ratio, rate in items) / 2.0

    return _per_list(one, policy, reference, win_rates, valid, 1.0)


def gpo(policy, reference, scores, valid, beta):
    def one(items):
        return sum((ratio - score / beta) ** 2 for ratio, score in items) / 2.0

    return _per_list(one, policy, reference, scores, valid, 1.0)
