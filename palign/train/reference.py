"""The reference's log-probabilities, computed once before training and kept per target.

The cache is keyed by the reference's weights and by the data, so a stale one is never read. It holds one array per
example and response; packing puts the numbers where the targets are.
"""

import dataclasses
import hashlib
import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from palign.data.loader import Dataset, batches, fingerprint
from palign.data.pack import split_targets
from palign.data.plan import plan_evaluation, row_needs
from palign.heads.target_values import target_logps
from palign.models.protocol import LanguageModel
from palign.sharding.mesh import SHARED, row_sharding, to_global
from palign.train.metrics import Reporter
from palign.train.sources import digest
from palign.types import Batch


def cache_reference(
    dataset: Dataset, name: str, lm: LanguageModel, params: Any, mesh: Mesh, workdir: pathlib.Path, *, chunk: int
) -> Dataset:
    """Gives a data set the reference's log-probability of every target, from the cache or by one pass over it.

    Args:
        dataset: the data.
        name: of the data set, for the file and the progress bar.
        lm: the model.
        params: the reference.
        mesh: the devices.
        workdir: where the cache is kept.
        chunk: targets per trip of the head.

    Returns:
        The same data with `reference_logps`.
    """
    key = hashlib.sha256(f"{digest(params)} {fingerprint(dataset)}".encode()).hexdigest()
    file = workdir / f"reference_{name}_{key[:16]}.npz"
    if not file.is_file():
        values = _compute(dataset, name, lm, params, mesh, chunk)
        temporary = file.with_suffix(".tmp.npz")
        np.savez(temporary, flat=np.concatenate([x for tree in values for x in tree]))
        temporary.rename(file)  # a file under its name is whole
    flat = np.load(file)["flat"]
    ends = np.cumsum([response.size for tree in dataset.trees for response in tree.responses])[:-1]
    pieces = iter(np.split(flat, ends))
    return dataclasses.replace(
        dataset, reference_logps=[tuple(next(pieces) for _ in tree.responses) for tree in dataset.trees]
    )


def _compute(dataset, name, lm, params, mesh, chunk):
    needs = row_needs(dataset.trees, layout=dataset.layout, pair_policy=dataset.pair_policy)
    plan = plan_evaluation(needs, dataset.shape, rows_per_step=dataset.plan.rows_per_step)
    once = dataclasses.replace(dataset, plan=plan)

    def logps(params, batch: Batch):
        micro = jax.tree.map(lambda x: x[0], batch)
        return target_logps(lm.hidden(params, micro), lm.unembed(params), micro, chunk=chunk)

    compiled = jax.jit(
        logps, in_shardings=(None, row_sharding(mesh, axis=1)), out_shardings=NamedSharding(mesh, SHARED)
    )
    values: list[Any] = [None] * len(dataset.trees)
    with jax.set_mesh(mesh), Reporter(f"reference of {name}", plan.num_steps) as progress:
        for step, batch in batches(once, start_step=0, micro_batches=1):
            result = np.asarray(compiled(params, to_global(mesh, batch)))
            for r in range(plan.rows_per_step):
                row = jax.tree.map(lambda x, r=r: x[0, r], batch)
                members = plan.row(step * plan.rows_per_step + r)
                for member, logp in zip(members, split_targets(row, result[r]), strict=True):
                    values[member] = logp
            progress.advance(step + 1, float((batch.group > 0).sum()))
    return values
