"""Token trees on disk: a TFDS data set of ArrayRecord files, read by index, and their sizes in a file beside it.

Plans need sizes only, so a run begins without reading the tokens, however many there are.
"""

import hashlib
import itertools
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import numpy as np
from etils import epath

from palign.data.tokenize import TokenTree

NAME, VERSION = "palign_trees", "1.0.0"
PART = 1000  # trees that are written at a time
PER_SHARD = 100_000


class TreeSize(NamedTuple):
    """What a plan reads of a tree.

    Attributes:
        prompt: tokens of the prompt.
        responses: tokens of each response.
        targets: targets of each response.
        scores: as the tree's.
    """

    prompt: int
    responses: tuple[int, ...]
    targets: tuple[int, ...]
    scores: tuple[float, ...]


def tree_size(tree: TokenTree) -> TreeSize:
    """Returns the sizes of a tree."""
    responses = tuple(response.size for response in tree.responses)
    return TreeSize(tree.prompt.size, responses, tuple(tree.num_targets), tree.scores)


def tree_sizes(trees: Sequence[TokenTree]) -> Sequence[TreeSize]:
    """Returns the sizes of trees; of stored ones without reading them."""
    return trees.sizes if isinstance(trees, StoredTrees) else [tree_size(tree) for tree in trees]


def trees_digest(trees: Iterable[TokenTree]) -> str:
    """Returns a SHA-256 in hex of all that trees hold; of stored ones without reading them."""
    if isinstance(trees, StoredTrees) and trees.digest:
        return trees.digest
    digest = hashlib.sha256()
    for tree in trees:
        parts = (tree.prompt, *tree.responses)
        digest.update(np.asarray([tree.id, *(part.size for part in parts)], "<i8").tobytes())
        digest.update(np.asarray(tree.scores, "<f8").tobytes())
        for part in parts:
            digest.update(part.astype("<i4", copy=False).tobytes())
        for mask in tree.learned or ():
            digest.update(mask.tobytes())
    return digest.hexdigest()


class StoredTrees(Sequence[TokenTree]):
    """Trees that are read when they are asked for.

    Args:
        place: where they are, for messages.
        rows: the examples of a TFDS data source.
        sizes: of all of them.
        digest: `trees_digest` of all of them, "" if it is not known.
    """

    def __init__(self, place: str, rows: Sequence[Mapping[str, Any]], sizes: Sequence[TreeSize], digest: str):
        self.sizes, self.digest = sizes, digest
        self._place, self._rows, self._numbers = place, rows, range(len(sizes))

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> TokenTree: ...
    @overload
    def __getitem__(self, index: slice) -> "StoredTrees": ...
    def __getitem__(self, index: int | slice) -> "TokenTree | StoredTrees":
        """Reads one tree; a slice reads nothing yet."""
        if isinstance(index, slice):
            part = StoredTrees(self._place, self._rows, self.sizes[index], "")
            part._numbers = self._numbers[index]
            return part
        number = self._numbers[index]
        try:
            return _to_tree(self._rows[number])
        except (RuntimeError, AttributeError) as error:  # a file whose end is missing gives None
            raise ValueError(f"{self._place}: example {number} cannot be read: {_damaged(error)}") from None


def write_trees(
    directory: epath.PathLike,
    sets: Mapping[str, Sequence[TokenTree]],
    advance: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Writes sets of trees as the splits of one TFDS data set, in their order, and the sizes of each.

    Args:
        directory: where to; is there.
        sets: name -> its trees, none of them with mismatched responses.
        advance: told the tokens of each tree as it is written, and again as it is read back.

    Raises:
        ValueError: what was written is not what is read back.
    """
    import tensorflow_datasets as tfds

    identity = tfds.core.dataset_info.DatasetIdentity(
        name=NAME, version=tfds.core.Version(VERSION), data_dir=str(directory), module_name=__name__
    )
    info = tfds.core.DatasetInfo(builder=identity, features=_features(), description="Token trees of palign.")
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=PER_SHARD, file_format="array_record")
    writer.initialize_splits(list(sets))
    for name, trees in sets.items():
        for first in range(0, len(trees), PART):
            writer.add_examples({name: [_to_row(tree) for tree in _watched(trees[first : first + PART], advance)]})
        with (epath.Path(directory) / _sizes_file(name)).open("wb") as file:
            np.savez(file, allow_pickle=False, **_to_arrays(tree_sizes(trees)))
    writer.close_all()
    for name, trees in sets.items():
        if trees_digest(_watched(open_trees(directory, name, ""), advance)) != trees_digest(trees):
            raise ValueError(f"{directory}: the set {name!r} is not read back as it was written; is the disk full?")


def _watched(trees: Iterable[TokenTree], advance: Callable[[int], None]) -> Iterator[TokenTree]:
    for tree in trees:
        advance(tree.prompt.size + sum(response.size for response in tree.responses))
        yield tree


def open_trees(directory: epath.PathLike, name: str, digest: str) -> StoredTrees:
    """Opens a set that `write_trees` wrote.

    Args:
        directory: where it lies.
        name: of the set.
        digest: `trees_digest` of it, "" if it is not known.

    Raises:
        ValueError: it is damaged, or not there.
    """
    import tensorflow_datasets as tfds

    try:
        rows = tfds.builder_from_directory(str(directory)).as_data_source(split=name)
        with (epath.Path(directory) / _sizes_file(name)).open("rb") as file, np.load(file) as arrays:
            sizes = list(_from_arrays(arrays))
    except (ValueError, RuntimeError, OSError, KeyError, AssertionError, zipfile.BadZipFile) as error:
        raise ValueError(f"{directory}: the set {name!r} cannot be read: {_damaged(error)}") from None
    if len(rows) != len(sizes):
        raise ValueError(
            f"{directory}: the set {name!r} has {len(rows):,} trees and the sizes of {len(sizes):,}; prepare the data "
            "again"
        )
    return StoredTrees(f"{directory}, set {name!r}", rows, sizes, digest)


def _damaged(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{line[:200]}; prepare the data again"


def _sizes_file(name: str) -> str:
    return f"{name}.sizes.npz"


def _features() -> Any:
    import tensorflow_datasets as tfds

    def array(dtype: Any) -> Any:
        return tfds.features.Tensor(shape=(None,), dtype=dtype)

    return tfds.features.FeaturesDict(
        {
            "id": np.int64,
            "prompt": array(np.int32),
            "responses": array(np.int32),  # one after another
            "sizes": array(np.int32),  # tokens of each response
            "scores": array(np.float32),
            "learned": array(np.uint8),  # of each token of `responses`, whether it is a target; empty: all are
        }
    )


def _to_row(tree: TokenTree) -> dict[str, Any]:
    learned = np.concatenate(tree.learned) if tree.learned else np.zeros(0)
    return {
        "id": tree.id,
        "prompt": tree.prompt,
        "responses": np.concatenate(tree.responses),
        "sizes": np.asarray([response.size for response in tree.responses], np.int32),
        "scores": np.asarray(tree.scores, np.float32),
        "learned": learned.astype(np.uint8),
    }


def _to_tree(row: Mapping[str, Any]) -> TokenTree:
    ends = np.cumsum(row["sizes"])[:-1]
    learned = tuple(np.split(row["learned"].astype(bool), ends)) if row["learned"].size else None
    responses = tuple(np.split(row["responses"], ends))
    return TokenTree(row["prompt"], responses, tuple(row["scores"].tolist()), int(row["id"]), learned=learned)


def _to_arrays(sizes: Sequence[TreeSize]) -> dict[str, np.ndarray]:
    def joined(values: Iterator[Sequence[Any]], dtype: Any) -> np.ndarray:
        return np.fromiter(itertools.chain.from_iterable(values), dtype)

    return {
        "prompt": np.asarray([size.prompt for size in sizes], np.int32),
        "count": np.asarray([len(size.responses) for size in sizes], np.int32),
        "responses": joined((size.responses for size in sizes), np.int32),
        "targets": joined((size.targets for size in sizes), np.int32),
        "scores": joined((size.scores for size in sizes), np.float32),
    }


def _from_arrays(arrays: Mapping[str, np.ndarray]) -> Iterator[TreeSize]:
    columns = [iter(arrays[name].tolist()) for name in ("responses", "targets", "scores")]
    for prompt, count in zip(arrays["prompt"].tolist(), arrays["count"].tolist(), strict=True):
        yield TreeSize(prompt, *(tuple(itertools.islice(column, count)) for column in columns))
