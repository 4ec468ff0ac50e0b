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


def cdpo(policy, reference, beta, label_smoothing):
    losses = []
    for p, r in zip(policy, reference, strict=True):
        x = beta * reward_gap(p, r)
        losses.append((1.0 - label_smoothing) * minus_log_sigmoid(x) + label_smoothing * minus_log_sigmoid(-x))
    return np.array(losses)


def robust_dpo(policy, reference, beta, label_smoothing):
    losses = []
    for p, r in zip(policy, reference, strict=True):
        x = beta * reward_gap(p, r)
        kept = (1.0 - label_smoothing) * minus_log_sigmoid(x)
        swapped = label_smoothing * minus_log_sigmoid(-x)
        losses.append((kept - swapped) / (1.0 - 2.0 * label_smoothing))
    return np.array(losses)


def hinge(policy, reference, beta):
    return np.array([max(0.0, 1.0 - beta * reward_gap(p, r)) for p, r in zip(policy, reference, strict=True)])


def slic_hf(policy, target, delta, regularisation):
    losses = []
    for (chosen, rejected), supervised in zip(policy, target, strict=True):
        losses.append(max(0.0, delta - chosen + rejected) - regularisation * supervised)
    return np.array(losses)


def ln_dpo(policy, reference, lengths, beta):
    losses = []
    for p, r, n in zip(policy, reference, lengths, strict=True):
        chosen = (p[0] - r[0]) / max(float(n[0]), 1.0)
        rejected = (p[1] - r[1]) / max(float(n[1]), 1.0)
        losses.append(minus_log_sigmoid(beta * chosen - beta * rejected))
    return np.array(losses)


def r_dpo(policy, reference, lengths, beta, alpha):
    # The DPO reward of a policy trained on r - alpha |y| is beta rho + alpha |y|.
    losses = []
    for p, r, n in zip(policy, reference, lengths, strict=True):
        rewards = [beta * (p[i] - r[i]) + alpha * float(n[i]) for i in range(2)]
        losses.append(minus_log_sigmoid(rewards[0] - rewards[1]))
    return np.array(losses)


def ld_dpo(policy_shared, policy_tail, ref_shared, ref_tail, beta, alpha):
    policy = [[s[i] + alpha * t[i] for i in range(2)] for s, t in zip(policy_shared, policy_tail, strict=True)]
    reference = [[s[i] + alpha * t[i] for i in range(2)] for s, t in zip(ref_shared, ref_tail, strict=True)]
    return dpo(policy, reference, beta)


def scaled_dpo(policy, reference, beta, gamma):
    losses = []
    for p, r in zip(policy, reference, strict=True):
        losses.append(minus_log_sigmoid(beta * ((p[0] - p[1]) - gamma * (r[0] - r[1]))))
    return np.array(losses)


def margin_dpo(policy, reference, scores, beta, alpha):
    losses = []
    for p, r, s in zip(policy, reference, scores, strict=True):
        losses.append(minus_log_sigmoid(beta * reward_gap(p, r) - alpha * (float(s[0]) - float(s[1]))))
    return np.array(losses)


def mm_dpo_beta(scores, beta, weight, rate):
    values = []
    for chosen, rejected in scores:
        delta = max(0.0, float(chosen) - float(rejected))
        values.append(beta * (1.0 + weight * (1.0 - math.exp(-rate * delta))))
    return np.array(values)


def mm_dpo(policy, reference, scores, beta, weight, rate):
    betas = mm_dpo_beta(scores, beta, weight, rate)
    return np.array([minus_log_sigmoid(b * reward_gap(p, r)) for p, r, b in zip(policy, reference, betas, strict=True)])


def cpo(policy, supervised, beta, alpha):
    losses = []
    for (chosen, rejected), logp in zip(policy, supervised, strict=True):
        losses.append(minus_log_sigmoid(beta * chosen - beta * rejected) + alpha * -logp)
    return np.array(losses)


def log_odds(average: float) -> float:
    # p / (1 - p) with 1 - p kept where p is nearly 1.
    return float(average) - math.log(-math.expm1(average))


def orpo(policy, weight):
    losses = []
    for chosen, rejected in policy:
        losses.append(-chosen + weight * minus_log_sigmoid(log_odds(chosen) - log_odds(rejected)))
    return np.array(losses)


def alphapo(policy, beta, gamma, alpha):
    losses = []
    for averages in policy:
        rewards = [(1.0 - math.exp(average) ** -alpha) / alpha for average in averages]
        losses.append(minus_log_sigmoid(beta * (rewards[0] - rewards[1]) - gamma))
    return np.array(losses)


def rpo(policy, reference, beta, eta):
    losses = []
    for p, r in zip(policy, reference, strict=True):
        losses.append(minus_log_sigmoid(beta * reward_gap(p, r)) + eta * beta * -p[0])
    return np.array(losses)


def dpop(policy, reference, beta, penalty):
    losses = []
    for p, r in zip(policy, reference, strict=True):
        # log of pi_ref(y_w) / pi(y_w): what the chosen response has lost.
        lost = max(0.0, r[0] - p[0])
        losses.append(minus_log_sigmoid(beta * (reward_gap(p, r) - penalty * lost)))
    return np.array(losses)


def cal_dpo(policy, reference, beta, coefficient):
    losses = []
    for p, r in zip(policy, reference, strict=True):
        chosen, rejected = p[0] - r[0], p[1] - r[1]
        squares = (chosen - 1.0 / (2.0 * beta)) ** 2 + (rejected + 1.0 / (2.0 * beta)) ** 2
        losses.append(minus_log_sigmoid(chosen - rejected) + coefficient * squares)
    return np.array(losses)
