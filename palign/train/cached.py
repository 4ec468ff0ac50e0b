"""What a frozen model says of every target, computed once before training and kept.

The reference's log-probabilities are one number a target, a teacher's hidden states D. A cache is keyed by the model's
weights and by the data, so a stale one is never read. It holds one array per example and response; packing puts the
values where the targets are.
"""

import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from jax.sharding import Mesh

from palign.data.loader import Dataset, fingerprint
from palign.eval.per_target import per_target
from palign.heads.target_values import target_logps
from palign.heads.targets import Tower, at_targets
from palign.models.protocol import LanguageModel
from palign.sharding.processes import is_main, wait_for_all
from palign.train.digest import digest
from palign.train.metrics import Reporter, say
from palign.train.paths import is_local
from palign.types import Array, Batch

Values = list[tuple[np.ndarray, ...]]  # of each example, one array `[tokens, ...]` for each of its responses


def cache_reference(
    dataset: Dataset, name: str, lm: LanguageModel, params: Any, mesh: Mesh, workdir: epath.Path, *, chunk: int
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

    def logps(params: Any, batch: Batch) -> Array:
        return target_logps(lm.hidden(params, batch), lm.unembed(params), batch, chunk=chunk)

    return dataclasses.replace(
        dataset, reference_logps=_cached(dataset, f"reference_{name}", logps, params, mesh, workdir)
    )


def cache_hidden(
    dataset: Dataset, name: str, role: str, lm: LanguageModel, params: Any, mesh: Mesh, workdir: epath.Path
) -> Dataset:
    """Gives a data set a frozen model's hidden state at every target, from the cache or by one pass over it.

    Args:
        dataset: the data.
        name: of the data set, for the file and the progress bar.
        role: of the frozen model.
        lm: the model.
        params: the frozen model's.
        mesh: the devices.
        workdir: where the cache is kept: D numbers a target in the type that the model computes in.

    Returns:
        The same data with `hidden[role]`.
    """

    def hidden(params: Any, batch: Batch) -> Array:
        return at_targets(Tower(lm.hidden(params, batch), lm.unembed(params)), batch).hidden

    values = _cached(dataset, f"{role}_{name}", hidden, params, mesh, workdir)
    return dataclasses.replace(dataset, hidden={**(dataset.hidden or {}), role: values})


def _cached(dataset: Dataset, title: str, function: Callable, params: Any, mesh: Mesh, workdir: epath.Path) -> Values:
    key = hashlib.sha256(f"{digest(params)} {fingerprint(dataset)}".encode()).hexdigest()
    file = workdir / f"{title}_{key[:16]}.npy"
    if not file.is_file():
        flat = np.concatenate([x for tree in _compute(dataset, title, function, params, mesh) for x in tree])
        if is_main():
            _save(file, flat)
        wait_for_all(file.name)
    flat = _restored(_load(file))
    ends = np.cumsum([response.size for tree in dataset.trees for response in tree.responses])[:-1]
    pieces: Iterator[np.ndarray] = iter(np.split(flat, ends))
    return [tuple(next(pieces) for _ in tree.responses) for tree in dataset.trees]


def _compute(dataset: Dataset, title: str, function: Callable, params: Any, mesh: Mesh) -> Values:
    with Reporter(f"caching {title}", dataset.once().num_steps) as progress:
        return per_target(dataset, function, params, mesh, advance=progress.advance)


def _save(file: epath.Path, flat: np.ndarray) -> None:
    temporary = file.with_suffix(".tmp.npy")
    with temporary.open("wb") as opened:
        np.save(opened, _storable(flat))
    temporary.replace(file)  # a file under its name is whole
    say(f"{file}: {flat.nbytes / 2**20:,.1f} MiB")


def _load(file: epath.Path) -> np.ndarray:
    """Maps a local file into memory; one in a bucket is read."""
    return np.load(file, mmap_mode="r") if is_local(file) else np.load(io.BytesIO(file.read_bytes()))


def _storable(flat: np.ndarray) -> np.ndarray:
    """NumPy files know no bfloat16: its bits are kept as uint16, which no cache holds otherwise."""
    return flat.view(np.uint16) if flat.dtype == ml_dtypes.bfloat16 else flat


def _restored(flat: np.ndarray) -> np.ndarray:
    return flat.view(ml_dtypes.bfloat16) if flat.dtype == np.uint16 else flat
