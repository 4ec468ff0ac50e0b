"""What the tests that run over every loss know of one: the function, its oracle, and inputs for it."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Arrays = tuple[np.ndarray, ...]


class Case(NamedTuple):
    """One loss.

    Attributes:
        loss: the function of `palign.losses`.
        oracle: float64 NumPy of the same arguments, written from the paper's equation.
        family: pairwise, unpaired, listwise, reward, supervised, distill or experimental.
        arrays: (rng, B) -> the positional arrays: float64 that float32 holds exactly, bool or int.
        extremes: () -> the same at margins of +-1e4, with empty responses or lists where the loss has such.
        hyper: keyword arguments, not the defaults.
        differentiable: positions of the arrays that a gradient reaches, checked against finite differences.
        stopped: positions of float arrays that must get a zero gradient.
        whole: positions of values that belong to the whole batch (no leading axis B).
        checks_gradient: False where weights inside are stopped, so that finite differences see more than the gradient;
            the family's own tests check it then.
        any_shape: whether the loss takes arrays of any shape, so that none is wrong.
        name: of the case, the function's name unless it has several.
    """

    loss: Callable
    oracle: Callable
    family: str
    arrays: Callable[[np.random.Generator, int], Arrays]
    extremes: Callable[[], Arrays]
    hyper: Mapping[str, float] = {}
    differentiable: tuple[int, ...] = (0,)
    stopped: tuple[int, ...] = ()
    whole: tuple[int, ...] = ()
    checks_gradient: bool = True
    any_shape: bool = False
    name: str = ""

    @property
    def title(self) -> str:
        """What the test is called."""
        return self.name or self.loss.__name__


def as_f32(array: np.ndarray) -> np.ndarray:
    """Rounds to what float32 holds, so that both precisions see the same numbers."""
    return np.asarray(array, np.float32).astype(np.float64)


def pair_logps(rng: np.random.Generator, size: int) -> Arrays:
    """Summed log-probabilities of pairs under a policy and a reference not far from it: two `[B, 2]`."""
    policy = -rng.gamma(4.0, 8.0, (size, 2))
    return as_f32(policy), as_f32(policy + rng.normal(0.0, 6.0, (size, 2)))


def pair_averages(rng: np.random.Generator, size: int) -> Arrays:
    """Log-probabilities per token of pairs under a policy and a reference: two `[B, 2]`."""
    policy = -rng.gamma(4.0, 0.4, (size, 2))
    return as_f32(policy), as_f32(policy + rng.normal(0.0, 0.3, (size, 2)))


def pair_extremes() -> Arrays:
    """Margins of +-1e4 and of nothing against a reference of zeros: two `[B, 2]`."""
    policy = np.array([[1e4, -1e4], [-1e4, 1e4], [0.0, 1e4], [-1e4, -1e4], [-3.0, -3.0], [0.0, 0.0]])
    return policy, np.zeros_like(policy)


def list_inputs(rng: np.random.Generator, size: int, *, length: int = 5) -> Arrays:
    """Policy, reference, labels in [0, 1] (some tied) and `valid` (some padded, some empty): four `[B, K]`."""
    policy = -rng.gamma(4.0, 8.0, (size, length))
    reference = policy + rng.normal(0.0, 6.0, (size, length))
    labels = rng.integers(0, 5, (size, length)) / 4.0
    valid = rng.random((size, length)) < 0.8
    if size > 2:
        valid[0], valid[1] = True, False
    return as_f32(policy), as_f32(reference), labels, valid


def list_extremes() -> Arrays:
    """Log-ratios of +-1e4, all labels equal, one response, none: four `[B, K]`."""
    policy = np.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [1e4, 1e4, 1e4], [-5.0, 1e4, -1e4], [1e4, 0.0, -1e4]])
    labels = np.array([[1.0, 0.0, 0.5], [1.0, 0.0, 0.0], [0.0, 0.5, 1.0], [0.5, 0.5, 0.5], [1.0, 0.5, 0.0]])
    valid = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
    return policy, np.zeros_like(policy), labels, valid
