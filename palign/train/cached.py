"""What a frozen model says of every target, computed once before training and kept.

The reference's log-probabilities are one number a target, a teacher's hidden states D. A cache is keyed by the model's
weights and settings and by the data as the model sees them: all token ids and targets, that is by what tokenizer, chat
template and truncation make of the texts. So a stale one is never read. It holds one array per example and response;
packing puts the values where the targets are. Until the pass is done it is kept in parts, so that one that was killed
goes on.
"""

import dataclasses
import hashlib
import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from jax.sharding import Mesh

from palign.data.loader import Dataset, fingerprint
from palign.data.stored import tree_sizes
from palign.eval.per_target import per_target
from palign.heads.target_values import target_logps
from palign.heads.targets import Tower, at_targets
from palign.models.protocol import LanguageModel
from palign.sharding.processes import is_main, wait_for_all
from palign.train.digest import digest
from palign.train.metrics import Reporter, say
from palign.train.paths import is_local
from palign.types import Array, Batch

PART = 1024  # examples: at most so many are taken again where a pass was killed

Values = list[tuple[np.ndarray, ...]]  # of each example, one array `[targets, ...]` for each of its responses


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
        dataset, reference_logps=_cached(dataset, f"reference_{name}", logps, lm, params, mesh, workdir)
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

    values = _cached(dataset, f"{role}_{name}", hidden, lm, params, mesh, workdir)
    return dataclasses.replace(dataset, hidden={**(dataset.hidden or {}), role: values})


def _cached(
    dataset: Dataset, title: str, function: Callable, lm: LanguageModel, params: Any, mesh: Mesh, workdir: epath.Path
) -> Values:
    key = hashlib.sha256(f"{lm.settings} {digest(params)} {fingerprint(dataset)}".encode()).hexdigest()
    file = workdir / f"{title}_{key[:16]}.npy"
    if not file.is_file():
        for other in sorted(workdir.glob(f"{title}_{'[0-9a-f]' * 16}.npy")):
            say(f"{other}: of another model or other data, not read")
        parts = _compute(dataset, title, function, params, mesh, file)
        if is_main():
            _put_together(parts, file)
        wait_for_all(file.name)
    sizes = tree_sizes(dataset.trees)
    ends = np.cumsum([targets for size in sizes for targets in size.targets])
    flat = _restored(_load_whole(file, int(ends[-1])))
    pieces: Iterator[np.ndarray] = iter(np.split(flat, ends[:-1]))
    return [tuple(next(pieces) for _ in size.responses) for size in sizes]


def _compute(
    dataset: Dataset, title: str, function: Callable, params: Any, mesh: Mesh, file: epath.Path
) -> list[epath.Path]:
    """One pass over the data in parts, each in a file once it is done; what is there is not taken again."""
    starts = range(0, len(dataset.trees), PART)
    parts = [dataclasses.replace(dataset, trees=dataset.trees[first : first + PART]) for first in starts]
    files = [file.with_suffix(f".part{i}.npy") for i in range(len(parts))]
    if there := sum(part.is_file() for part in files):
        say(f"caching {title}: goes on, {there} of {len(files)} parts are there")
    missing = [(part, piece) for part, piece in zip(parts, files, strict=True) if not piece.is_file()]
    with Reporter(f"caching {title}", sum(part.once().num_steps for part, _ in missing)) as progress:
        done = itertools.count(1)
        for part, piece in missing:
            values = per_target(part, function, params, mesh, advance=lambda _, n: progress.advance(next(done), n))
            flat = _checked(title, np.concatenate([x for tree in values for x in tree]))
            if is_main():
                _save(piece, flat)
    return files


def _put_together(parts: list[epath.Path], file: epath.Path) -> None:
    flat = np.concatenate([_load(part) for part in parts])
    _save(file, flat)
    for part in parts:
        part.unlink()
    say(f"{file}: {flat.nbytes / 2**20:,.1f} MiB")


def _checked(title: str, flat: np.ndarray) -> np.ndarray:
    wrong = int((~np.isfinite(flat.astype(np.float32))).sum())
    if wrong:
        raise ValueError(
            f"caching {title}: {wrong} of {flat.size} numbers are not finite; look at the model that "
            f"config.{title.partition('_')[0]}_from names, or compute in float32 (config.model.dtype)"
        )
    return flat


def _save(file: epath.Path, flat: np.ndarray) -> None:
    temporary = file.with_suffix(".tmp.npy")
    with temporary.open("wb") as opened:
        np.save(opened, _storable(flat))
    temporary.replace(file)  # a file under its name is whole


def _load(file: epath.Path) -> np.ndarray:
    """Maps a local file into memory; one in a bucket is read."""
    return np.load(file, mmap_mode="r") if is_local(file) else np.load(io.BytesIO(file.read_bytes()))


def _load_whole(file: epath.Path, targets: int) -> np.ndarray:
    try:
        flat = _load(file)
        damage = "" if len(flat) == targets else f"it holds {len(flat)} of {targets} targets"
    except (ValueError, EOFError) as error:
        damage = str(error)
    if damage:
        raise ValueError(f"{file}: is damaged ({damage}); remove it, and it is computed again")
    return flat


def _storable(flat: np.ndarray) -> np.ndarray:
    """NumPy files know no bfloat16: its bits are kept as uint16, which no cache holds otherwise."""
    return flat.view(np.uint16) if flat.dtype == ml_dtypes.bfloat16 else flat


def _restored(flat: np.ndarray) -> np.ndarray:
    return flat.view(ml_dtypes.bfloat16) if flat.dtype == np.uint16 else flat
