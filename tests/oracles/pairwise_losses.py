"""Pairwise losses in float64, one pair at a time, from the papers' equations."""

import math

import numpy as np


def minus_log_sigmoid(x: float) -> float:
    return float(np.logaddexp(0.0, -x))


def reward_gap(policy, reference) -> float:
    chosen = float(policy[0]) - float(reference[0])
    rejected = float(policy[1]) - float(reference[1])
    return chosen - rejected


def dpo(policy, reference, beta):
    return np.array([minus_log_sigmoid(beta * reward_gap(p, r)) for p, r in zip(policy, reference, strict=True)])


def dpo_gradient(policy, reference, beta):
    rows = []
    for p, r in zip(policy, reference, strict=True):
        slope = -beta / (1.0 + math.exp(min(beta * reward_gap(p, r), 700.0)))
        rows.append([slope, -slope])
    return np.array(rows)


def ipo(policy, reference, beta):
    return np.array([(reward_gap(p, r) - 1.0 / (2.0 * beta)) ** 2 for p, r in zip(policy, reference, strict=True)])


def simpo(policy, beta, gamma):
    return np.array([minus_log_sigmoid(beta * (float(p[0]) - float(p[1])) - gamma) for p in policy])
