"""The reference's log-probabilities, computed once before training and kept per target.

The cache is keyed by the reference's weights and by the data, so a stale one is never read. It holds one array per
example and response; packing puts the numbers where the targets are.
"""

import dataclasses
import hashlib
import pathlib
from typing import Any

import numpy as np
from jax.sharding import Mesh

from palign.data.loader import Dataset, fingerprint
from palign.eval.per_target import per_target
from palign.heads.target_values import target_logps
from palign.models.protocol import LanguageModel
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
    def logps(params, batch: Batch):
        return target_logps(lm.hidden(params, batch), lm.unembed(params), batch, chunk=chunk)

    with Reporter(f"reference of {name}", dataset.once().num_steps) as progress:
        return per_target(dataset, logps, params, mesh, advance=progress.advance)
