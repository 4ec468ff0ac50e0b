"""Supervised losses: log-probabilities of tokens, of any shape."""

import numpy as np

from palign import losses
from tests.losses.cases.case import Case, as_f32
from tests.oracles import supervised_losses as oracle


def _arrays(rng, size):
    return (as_f32(-rng.gamma(1.0, 1.5, (size, 4))),)


def _extremes():
    return (np.array([0.0, -1e-6, -104.0, -1e4]),)


CASES = (
    Case(losses.nll, oracle.nll, "supervised", _arrays, _extremes, any_shape=True),
    # A finite difference would see the weight move too.
    Case(losses.dft, oracle.dft, "supervised", _arrays, _extremes, any_shape=True, checks_gradient=False),
)
