"""What all forms of a head share: their flags, hidden states `[T, D]`, kernels `[D, V]` and target tokens."""

import argparse

import numpy as np

from benchmarks.contestants import distill_inputs
from benchmarks.contestants.distill_inputs import Inputs, digest

WHAT = ("logps", "divergence")


def parse(description: str, sides: tuple[str, ...]) -> argparse.Namespace:
    parser = distill_inputs.make_parser(description.split("\n", 1)[0])
    parser.add_argument("--what", choices=WHAT, required=True)
    parser.add_argument("--side", choices=sides, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True, help="of hidden states and kernels")
    parser.add_argument("--chunk", type=int, default=512, help="targets per trip of palign's head")
    return parser.parse_args()


def draw(flags: argparse.Namespace) -> tuple[Inputs, np.ndarray, str]:
    """A student and, for the divergence, a teacher; target tokens; and what is equal only where both are."""
    drawn = distill_inputs.draw_inputs(flags)
    models = 1 + (flags.what == "divergence")
    inputs = Inputs(drawn.hidden[:models], drawn.kernels[:models])
    token = np.random.default_rng(flags.seed).integers(flags.vocabulary, size=flags.targets, dtype=np.int32)
    return inputs, token, f"{digest(inputs)}, {flags.dtype}"
