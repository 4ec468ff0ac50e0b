"""What a compiled program contains, read from its text: buffers and collectives."""

import math
import re
from typing import NamedTuple

SHAPE = re.compile(r"\b(?:pred|bf16|[suf]\d+\w*|c\d+)\[([\d,]*)\]")
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute", "collective-broadcast")
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")


class Collective(NamedTuple):
    kind: str
    shape: tuple[int, ...]  # of one result, on one device


def shapes_in(text: str) -> list[tuple[int, ...]]:
    return [tuple(int(n) for n in dims.split(",") if n) for dims in SHAPE.findall(text)]


def largest_buffer(compiled) -> int:
    """Elements of the largest array that any instruction names, the insides of fusions included."""
    return max(math.prod(shape) for shape in shapes_in(compiled.as_text()))


def collectives(compiled) -> list[Collective]:
    """Every collective and the shape of each of its results; a combined one counts once per result."""
    return [
        Collective(kind, shape)
        for result, kind in COLLECTIVE.findall(compiled.as_text())
        for shape in shapes_in(result)
    ]
