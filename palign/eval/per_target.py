"""A function of a batch on every example once, handed back row by row or example by example."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from palign.data.loader import Dataset, batches
from palign.data.pack import split_targets
from palign.sharding.mesh import SHARED, row_sharding, to_global
from palign.sharding.processes import local_rows
from palign.types import Array, Batch


def per_target(
    dataset: Dataset,
    function: Callable[[Any, Batch], Array],
    params: Any,
    mesh: Mesh,
    *,
    advance: Callable[[int, float], None] | None = None,
) -> list[tuple[np.ndarray, ...]]:
    """Evaluates `function(params, batch [R, ...]) -> [R, M]` on every example once.

    Args:
        dataset: the data; its order and layout are kept, its plan is not.
        function: pure; compiled once for each function, so pass the same one again.
        params: what it is given, of one model or several.
        mesh: the devices.
        advance: told (steps done, tokens of the step), for a progress bar.

    Returns:
        For each example, one array for each of its responses, one number a token.
    """
    values: list[Any] = [None] * len(dataset.trees)
    for result in per_row(dataset, function, params, mesh, advance=advance):
        for member, numbers in zip(result.members, split_targets(result.row, result.values), strict=True):
            values[member] = numbers
    return values


class RowResult(NamedTuple):
    """What a function makes of one row of a batch."""

    values: Any  # leaves [...], the row's own
    row: Batch  # leaves [...]
    members: np.ndarray  # the examples in it, in the order of the batch's axis G


def per_row(
    dataset: Dataset,
    function: Callable[[Any, Batch], Any],
    params: Any,
    mesh: Mesh,
    *,
    advance: Callable[[int, float], None] | None = None,
) -> Iterator[RowResult]:
    """Evaluates `function(params, batch [R, ...]) -> tree of [R, ...]` and yields every row that holds examples.

    Args:
        dataset: the data; its order and layout are kept, its plan is not. Without reference log-probabilities and
            weights.
        function: pure; compiled once for each function, so pass the same one again.
        params: what it is given, of one model or several.
        mesh: the devices.
        advance: told (steps done, tokens of the step), for a progress bar.
    """
    once = dataclasses.replace(dataset.once(), reference_logps=None, weights=None, hidden=None)
    compiled, rows = _compile(function, mesh), local_rows(mesh, once.plan.rows_per_step)
    with jax.set_mesh(mesh):
        for step, local in batches(once, start_step=0, micro_batches=1, rows=rows):
            result, batch = jax.device_get(compiled(params, to_global(mesh, local)))
            for r in range(once.plan.rows_per_step):
                values, row = jax.tree.map(lambda x, r=r: x[r], (result, batch))
                yield RowResult(values, row, once.plan.row(step * once.plan.rows_per_step + r))
            if advance is not None:
                advance(step + 1, float((batch.group > 0).sum()))


@functools.cache
def _compile(function: Callable[[Any, Batch], Any], mesh: Mesh) -> Callable[[Any, Batch], tuple[Any, Batch]]:
    """Gives every process the results of all rows, and the rows, of which it has built its own only."""

    def first_micro_batch(params, batch):
        first = jax.tree.map(lambda x: x[0], batch)
        return function(params, first), first

    rows, whole = row_sharding(mesh, axis=1), NamedSharding(mesh, SHARED)
    return jax.jit(first_micro_batch, in_shardings=(None, rows), out_shardings=whole)
