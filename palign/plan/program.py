"""What a compiled step does between devices, read from its text.

The text names every computation, so loops can be followed: a collective inside the loop over layers happens once a
layer. Loops whose length is data (the block pairs of attention, the targets of the heads) have no trip count there.
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

WIDTHS = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8}  # bytes; integers say theirs in bits
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_SHAPE = re.compile(r"\b(pred|bf16|f16|f32|f64|c64|[su]\d+|f8\w+)\[([\d,]*)\]")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Shape(NamedTuple):
    """An array on one device."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """In memory, without padding."""
        bits = re.fullmatch(r"[su](\d+)", self.dtype)
        return -(-self.size * int(bits[1]) // 8) if bits else self.size * WIDTHS.get(self.dtype, 1)


class Collective(NamedTuple):
    """One exchange between devices.

    Attributes:
        kind: one of `KINDS`.
        shapes: what is whole at one of its ends: gathered, or before it is scattered.
        group: devices that take part together.
        slices: of how many slices or nodes the devices of a group are.
        times: how often a step does it.
        counted: whether `times` follows from the text alone.
    """

    kind: str
    shapes: tuple[Shape, ...]
    group: int
    slices: int
    times: int
    counted: bool

    @property
    def bytes(self) -> int:
        """Of the whole arrays, all times."""
        return self.times * sum(shape.bytes for shape in self.shapes)

    @property
    def crosses(self) -> bool:
        """Whether it needs the network between slices or nodes."""
        return self.slices > 1

    @property
    def over_links(self) -> float:
        """Bytes that each device receives from its own slice or node, all times, in the cheapest way (a ring)."""
        return self._received(self.group) if self.group > self.slices else 0.0

    @property
    def over_network(self) -> float:
        """Bytes that each device receives from others: a slice's devices share what has to enter it once."""
        return self._received(self.slices) * self.slices / self.group

    def _received(self, peers: int) -> float:
        share = (peers - 1) / peers
        ways = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}
        return self.bytes * (ways.get(self.kind, share) if peers > 1 else 0.0)


class _Use(NamedTuple):
    """How often a computation runs."""

    times: int
    counted: bool


def shapes_in(text: str) -> list[Shape]:
    """Every array that a text names, in order."""
    return [Shape(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _SHAPE.findall(text)]


def read_collectives(text: str, *, slice_of: Sequence[int] = (), unknown_trips: int = 1) -> list[Collective]:
    """Lists the collectives of a compiled program.

    Args:
        text: `compiled.as_text()`.
        slice_of: the slice or node of every device, in the mesh's order; empty = one for all.
        unknown_trips: how often a loop is taken to run whose length is data.

    Returns:
        The collectives; one that the compiler has spread over several instructions, to overlap it, is listed once.
    """
    computations = _split(text)
    uses = _uses(computations, unknown_trips)
    found: dict[object, Collective] = {}
    for name, lines in computations.items():
        for number, line in enumerate(lines):
            if (match := _COLLECTIVE.search(line)) and uses[name].times:
                collective = _collective(match, line, name, uses[name], slice_of)
                chain = _CHAIN.search(line)  # parts of one exchange, between which the TPU does other work
                found.setdefault(chain[1] if chain else (name, number), collective)
    return [collective for collective in found.values() if collective.group > 1]


def _split(text: str) -> dict[str, list[str]]:
    """The lines of every computation, by name; the entry comes last, as in the text."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = computations.setdefault(match[1], [])
        elif line.startswith("  "):
            lines.append(line)
    return computations


def _uses(computations: dict[str, list[str]], unknown_trips: int) -> dict[str, _Use]:
    """How often each computation runs: callers stand below what they call, so one pass from below is enough."""
    uses = dict.fromkeys(computations, _Use(0, True))
    uses[next(reversed(computations))] = _Use(1, True)
    for name in reversed(computations):
        times, counted = uses[name]
        for line in computations[name] if times else ():
            looped = re.search(r" while\(.*condition=%?([\w.\-]+)", line)
            trips = _trip_count(line, computations[looped[1]]) if looped else 1
            here = _Use(times * (unknown_trips if trips is None else trips), counted and trips is not None)
            for called in _called(line):
                before = uses[called]
                uses[called] = _Use(before.times + here.times, before.counted and here.counted)
    return uses


def _called(line: str) -> Iterator[str]:
    for one, several in _CALLED.findall(line):
        yield from (name.strip().lstrip("%") for name in (several or one).split(","))


def _trip_count(line: str, condition: list[str]) -> int | None:
    """From the compiler's note, or from a condition that compares a counter with a constant; None = from data."""
    if match := _TRIPS.search(line):
        return int(match[1])
    constants = dict(re.findall(r"%([\w.\-]+) = s32\[\]\S* constant\((\d+)\)", "\n".join(condition)))
    operands = re.findall(r"%([\w.\-]+)", condition[-1].partition(" = ")[2])
    limits = [int(constants[name]) for name in operands if name in constants]
    return limits[0] if len(limits) == 1 else None


def _collective(match: re.Match, line: str, computation: str, use: _Use, slice_of: Sequence[int]) -> Collective:
    result, kind, asynchronous = match.groups()
    members, group = _group(line)
    shapes = shapes_in(result)
    if asynchronous and kind != "all-reduce":  # operands stand before results
        half = len(shapes) // 2
        shapes = shapes[:half] if kind == "reduce-scatter" else shapes[half:]
    elif kind == "reduce-scatter":
        shapes = [shape._replace(dims=(group, *shape.dims)) for shape in shapes]
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # how the TPU compiler writes one: each device keeps its slice
    slices = len({slice_of[device] for device in members}) if slice_of else 1
    return Collective(kind, tuple(shapes), group, slices, *use)


def _group(line: str) -> tuple[list[int], int]:
    """The devices of the first group, and how many there are in each; the three ways of writing groups."""
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", line):
        members = _numbers(match[1])
    elif match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line):
        members = _order(match[3])[: int(match[2])]
    elif match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? \{([^}]*)\}", line):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        devices = _order(match[2] or f"[{math.prod(axes.values())}]")
        along = re.findall(r"'(\w+)'", match[3])
        ids = np.reshape(devices, tuple(axes.values()))
        members = ids[tuple(slice(None) if name in along else 0 for name in axes)].reshape(-1).tolist()
    else:
        members = []
    return members, max(len(members), 1)


def _order(written: str) -> list[int]:
    """Devices in an order: `[2,8]T(1,0)` counts them up in that shape and transposes it; or they are listed."""
    sizes, transposed, axes = written.partition("T")
    if not sizes.startswith("["):
        return _numbers(written)
    ids = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return (ids.transpose(_numbers(axes)) if transposed else ids).reshape(-1).tolist()


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


class Expectation(NamedTuple):
    """What a step's text is held against.

    Attributes:
        layers: the dimensions of stacked parameters that are cut, all devices together, in ascending order and without
            ones.
        outside: what happens at most so often is outside the loop over layers.
        rows: tokens of a device's micro-batch, R * T.
        vocabulary: V, padded, on one device.
        dim: D; a kernel `[D, V]` is no logits.
        gathers: kinds that bring weights together.
    """

    layers: frozenset[tuple[int, ...]]
    outside: int
    rows: int
    vocabulary: int
    dim: int
    gathers: tuple[str, ...]


def find_faults(text: str, collectives: Iterable[Collective], expected: Expectation) -> list[str]:
    """Looks for what must not be in a step that scales.

    Args:
        text: `compiled.as_text()`.
        collectives: of the same text.
        expected: sizes to look for.

    Returns:
        One sentence for every fault: a stacked parameter that is gathered whole, outside the loop over layers, and an
        array of logits for all positions of a device's rows. None is good.
    """
    faults = []
    for collective, shape in ((c, s) for c in collectives for s in c.shapes):
        outside = collective.times <= expected.outside and collective.kind in expected.gathers
        if outside and _essential(shape.dims) in expected.layers:
            faults.append(f"{collective.kind} of a whole stacked parameter, {_written(shape)}")
    for dims in sorted({shape.dims for shape in shapes_in(text) if expected.vocabulary in shape.dims}):
        rows = math.prod(dims) // expected.vocabulary
        if rows >= expected.rows and rows != expected.dim:
            faults.append(f"logits of all positions, [{','.join(map(str, dims))}]")
    return list(dict.fromkeys(faults))


def _essential(dims: Sequence[int]) -> tuple[int, ...]:
    """Dimensions that layouts and bitcasts leave: in order, without ones."""
    return tuple(sorted(size for size in dims if size > 1))


def stacked_shapes(shapes: Iterable[Sequence[int]]) -> frozenset[tuple[int, ...]]:
    """What `Expectation.layers` holds of stacked matrices; vectors a layer, as of norms, are left out."""
    return frozenset(_essential(dims) for dims in shapes if len(_essential(dims)) > 2)


def _written(shape: Shape) -> str:
    return f"{shape.dtype}[{','.join(map(str, shape.dims))}]"


def by_kind(collectives: Iterable[Collective]) -> list[tuple[str, bool, list[Collective]]]:
    """Groups collectives as (kind, whether they cross slices, those), most bytes first."""
    ordered = sorted(collectives, key=lambda c: (c.kind, c.crosses))
    groups = [(*key, list(those)) for key, those in itertools.groupby(ordered, key=lambda c: (c.kind, c.crosses))]
    return sorted(groups, key=lambda group: -sum(c.bytes for c in group[2]))
