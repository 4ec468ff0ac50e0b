"""Diagnostics in float64, one pair at a time, from the papers' definitions."""

import functools
import math

import numpy as np


def summed_states(states, prompt_length, response_length):
    """`sum_k h(x, y_<k)` for k = 1..n, of the states `[tokens, D]` of prompt and response in one sequence."""
    total = np.zeros(states.shape[-1])
    for k in range(response_length):
        total += np.asarray(states[prompt_length - 1 + k], np.float64)
    return total


def ches(sums):
    values = []
    for chosen, rejected in np.asarray(sums, np.float64):
        values.append(sum(a * b for a, b in zip(chosen, rejected, strict=True)) - sum(a * a for a in chosen))
    return np.array(values)


def length_normalised_ches(sums, lengths):
    values = []
    for (chosen, rejected), (n_chosen, n_rejected) in zip(np.asarray(sums, np.float64), lengths, strict=True):
        product = sum(a * b for a, b in zip(chosen, rejected, strict=True))
        square = sum(a * a for a in chosen)
        values.append(product / (float(n_chosen) * float(n_rejected)) - square / float(n_chosen) ** 2)
    return np.array(values)


def ranking_accuracy(policy):
    return np.array([float(chosen) >= float(rejected) for chosen, rejected in policy])


def full_ranking_accuracy(policy, scores, valid):
    """The responses sorted by the model must be a way of sorting them by score."""
    found = []
    for logps, labels, mask in zip(policy, scores, valid, strict=True):
        kept = [k for k in range(len(mask)) if mask[k]]
        by_model = sorted(kept, key=lambda k: (-logps[k], -labels[k]))  # what the model ties may stand either way
        found.append([labels[k] for k in by_model] == sorted((labels[k] for k in kept), reverse=True))
    return np.array(found)


def implicit_reward_accuracy(policy, reference, beta):
    rewards = [[beta * (float(p) - float(r)) for p, r in zip(*pair, strict=True)] for pair in zip(policy, reference)]  # noqa: B905
    return np.array([chosen > rejected for chosen, rejected in rewards])


def idealised_ranking_accuracy(reference, beta, alpha):
    """In probabilities, as the paper writes it; for margins that exp() holds."""
    found = []
    for (chosen, rejected), probability in zip(reference, np.broadcast_to(alpha, len(reference)), strict=True):
        probability = 1 - 1e-3 if probability == 1 else float(probability)
        ratio = math.exp(float(chosen) - float(rejected))
        found.append(ratio * (probability / (1 - probability)) ** (1 / beta) > 1)
    return np.array(found)


def dpo_loss(policy, reference, beta):
    losses = []
    for (pw, pl), (rw, rl) in zip(policy, reference, strict=True):
        odds = math.exp(beta * ((float(pw) - float(rw)) - (float(pl) - float(rl))))
        losses.append(-math.log(odds / (1 + odds)))
    return np.array(losses)


def ipo_loss(policy, reference, tau):
    losses = []
    for (pw, pl), (rw, rl) in zip(policy, reference, strict=True):
        losses.append(((float(pw) - float(rw)) - (float(pl) - float(rl)) - 1 / (2 * tau)) ** 2)
    return np.array(losses)


def edit_distance(one, other):
    """Levenshtein's recursion."""

    @functools.cache
    def distance(i, j):
        if not i or not j:
            return i + j
        replaced = distance(i - 1, j - 1) + (one[i - 1] != other[j - 1])
        return min(replaced, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    return distance(len(one), len(other))
