"""What both forms of AlignDistil's head share: its constants, their flags, and hidden states and unembeddings."""

import argparse
import hashlib
from typing import Any, NamedTuple

import numpy as np

BETA0, SCALE, EPSILON = 0.1, 20.0, 1e-3


class Inputs(NamedTuple):
    """Hidden states `[T, D]` and kernels `[D, V]`: student, DPO model, reverse DPO model."""

    hidden: tuple[Any, ...]
    kernels: tuple[Any, ...]


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--vocabulary", type=int, required=True)
    parser.add_argument("--targets", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def draw_inputs(flags: argparse.Namespace) -> Inputs:
    """Three models that are alike, as three that come from one."""
    rng, root = np.random.default_rng(flags.seed), flags.width**0.5

    def normal(scale: float, *shape: int) -> np.ndarray:
        return np.float32(scale) * rng.standard_normal(shape, np.float32)

    hidden = normal(1.0, flags.targets, flags.width)
    kernel = normal(2 / root, flags.width, flags.vocabulary)
    others = [hidden + normal(0.3, *hidden.shape) for _ in range(2)]
    kernels = [kernel + normal(0.1 / root, *kernel.shape) for _ in range(2)]
    return Inputs((hidden, *others), (kernel, *kernels))


def digest(inputs: Inputs) -> str:
    found = hashlib.sha256()
    for array in (*inputs.hidden, *inputs.kernels):
        found.update(array.tobytes())
    return found.hexdigest()[:16]
