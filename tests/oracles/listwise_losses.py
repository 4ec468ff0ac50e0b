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
