"""Supervised losses in float64, one token at a time, and the gradients that they shall have."""

import math

import numpy as np


def nll(logps):
    return np.vectorize(lambda logp: -float(logp), otypes=[float])(logps)


def dft(logps):
    return np.vectorize(lambda logp: -math.exp(logp) * float(logp), otypes=[float])(logps)


def dft_gradient(logps):
    """d(-sg(p) log p) / d(log p) = -p."""
    return np.vectorize(lambda logp: -math.exp(logp), otypes=[float])(logps)
