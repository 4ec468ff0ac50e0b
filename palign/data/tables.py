"""Rows of Parquet, Arrow and ArrayRecord files, and of TFDS and Hugging Face data sets."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from palign.data.records import printable
from palign.data.strict_json import Row


def read_parquet(path: epath.Path) -> Iterator[Row]:
    """Yields the rows of a Parquet file.

    Raises:
        ValueError: it is not one, or damaged.
    """
    import pyarrow.parquet

    with path.open("rb") as file:
        yield from _rows(path, lambda: pyarrow.parquet.ParquetFile(file).iter_batches())


def read_saved(directory: epath.Path) -> Iterator[Row]:
    """Yields the rows of a directory that `datasets.Dataset.save_to_disk` wrote.

    Raises:
        ValueError: its files are not those that it lists, or damaged.
    """
    import pyarrow.ipc

    try:
        names = [file["filename"] for file in json.loads((directory / "state.json").read_text())["_data_files"]]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{directory}/state.json: lists no data files; save the data set again") from None
    for name in names:
        path = directory / str(name)
        if path.name != name or not path.is_file():
            raise ValueError(f"{directory}/state.json: lists {str(name)[:60]!r}, which is no file beside it")
        with path.open("rb") as file:
            yield from _rows(path, lambda file=file: pyarrow.ipc.open_stream(file))  # type: ignore[misc]


def read_array_record(path: epath.Path) -> Iterator[bytes]:
    """Yields the records of a local ArrayRecord file, each one JSON object.

    Raises:
        ValueError: it is damaged, or lies elsewhere.
    """
    if "://" in str(path):
        raise ValueError(f"{path}: ArrayRecord files are read from a local disk; copy it there")
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    try:
        for _ in range(reader.num_records()):
            yield reader.read()
        reader.close()  # says what went wrong, even when it was opened
    except (RuntimeError, IndexError) as error:
        raise ValueError(
            f"{path}: no ArrayRecord file, or damaged ({_first_line(error)}); make or fetch it again"
        ) from None


def read_tfds(name: str) -> Iterator[Row]:
    """Yields the examples of `tfds:NAME[:VERSION]/SPLIT`, prepared before as ArrayRecord.

    Args:
        name: NAME is known to TFDS, whose data lie where TFDS_DATA_DIR says, or the directory of a prepared data set.

    Raises:
        ValueError: there is no such data set or split, or it is of another file format.
    """
    place, split = _place_and_split(name, "tfds:NAME[:VERSION]/SPLIT")
    import tensorflow_datasets as tfds

    try:
        prepared = (epath.Path(place) / "dataset_info.json").is_file()
        builder = tfds.builder_from_directory(place) if prepared else tfds.builder(place)
        if not builder.info.splits:
            raise ValueError(
                f"has not been prepared in {builder.data_path}; run tfds.builder({place!r}, file_format='array_record')"
                ".download_and_prepare() once, or set TFDS_DATA_DIR"
            )
        if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
            kind = builder.info.file_format.value
            raise ValueError(f"was prepared as {kind}; prepare it with file_format='array_record' in another directory")
        examples = builder.as_data_source(split=split)
    except (ValueError, RuntimeError, OSError, AssertionError) as error:  # of TFDS, on many lines
        raise ValueError(f"{name}: {_first_line(error)}") from None
    return (_plain(builder.info.features, examples[i]) for i in range(len(examples)))


def read_hugging_face(name: str) -> Iterator[Row]:
    """Yields the rows of `hf:NAME[:CONFIG]/SPLIT`, fetched by the package `datasets`.

    Raises:
        ValueError: that package is missing, or could not load it.
    """
    place, split = _place_and_split(name, "hf:NAME[:CONFIG]/SPLIT")
    try:
        import datasets
    except ImportError:
        advice = "pip install datasets, or save it as Parquet elsewhere and name that file"
        raise ValueError(f"{name}: needs a package that is not here: {advice}") from None
    repository, _, config = place.partition(":")
    try:
        found = datasets.load_dataset(repository, config or None, split=split)
    except Exception as error:  # its own, the Hub's and the network's have no common class
        raise ValueError(f"{name}: {type(error).__name__}: {_first_line(error)}") from None
    return iter(found)


def _place_and_split(name: str, form: str) -> tuple[str, str]:
    place, _, split = name.partition(":")[2].rpartition("/")
    if not place or not split:
        raise ValueError(f"{name}: expected {form}, such as {name.partition(':')[0]}:my_pairs/train[:90%]")
    return place, split


def _rows(path: epath.Path, batches: Any) -> Iterator[Row]:
    """The rows of an Arrow reader, which is opened here so that its errors are caught."""
    import pyarrow

    try:
        for batch in batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if getattr(error, "errno", None):  # the disk's, not the file's
            raise
        raise ValueError(
            f"{path}: damaged, or of another kind ({_first_line(error)}); make or fetch it again"
        ) from None


def _plain(feature: Any, value: Any) -> Any:
    """A value of TFDS as JSON would hold it: text for bytes, and objects in lists for lists in an object."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.FeaturesDict):
        return {name: _plain(feature[name], item) for name, item in value.items()}
    if isinstance(feature, tfds.features.Sequence):
        if isinstance(feature.feature, tfds.features.FeaturesDict):
            value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
        return [_plain(feature.feature, item) for item in value]
    # What is no UTF-8 becomes half surrogates, which records refuse with their place.
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else np.asarray(value).tolist()


def _first_line(error: Exception) -> str:
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0][:300])
