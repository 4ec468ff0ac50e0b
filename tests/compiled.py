"""What a compiled program contains, read from its text: buffers and collectives. And what must not be cached."""

import contextlib
import math
import re
from typing import NamedTuple

import jax

SHAPE = re.compile(r"\b(?:pred|bf16|[suf]\d+\w*|c\d+)\[([\d,]*)\]")
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute", "collective-broadcast")
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")


class Collective(NamedTuple):
    kind: str
    shape: tuple[int, ...]  # of one result, on one device


@contextlib.contextmanager
def uncached():
    """Keeps programs that are compiled inside out of the persistent compilation cache: those of several CPU devices.

    Read back from the cache (jax 0.10), the devices of one program start its collectives in different orders, wait for
    one another, and after 40 seconds XLA ends the process.
    """
    name, never = "jax_persistent_cache_min_compile_time_secs", float("inf")
    before = getattr(jax.config, name)
    jax.config.update(name, never)
    try:
        yield
    finally:
        jax.config.update(name, before)


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
