"""The files of a Hugging Face model, read with suspicion: JSON, and the headers of safetensors.

Everything is told from headers and the index, before a weight is read. What is wrong is one line with the file's name.
Nothing is unpickled, no code of the model's is run, and no file outside of its directory is opened.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
HEADER_LIMIT = 100_000_000  # bytes, the format's own limit
WIDTHS = {"F32": 4, "BF16": 2, "F16": 2}  # bytes
# A tensor that old files have and nobody reads.
UNREAD = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class Tensor(NamedTuple):
    """Where a tensor is."""

    file: epath.Path
    shape: tuple[int, ...]
    dtype: str  # F32, BF16, F16


def read_json(file: epath.Path, limit: int = HEADER_LIMIT) -> dict[str, Any]:
    """Reads a JSON object strictly.

    Raises:
        ValueError: no such file, too long, or not one JSON object with every key once.
    """
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file")
    if (size := epath.Path(file).stat().length) > limit:
        raise ValueError(f"{file}: {size:,} bytes; expected at most {limit:,}")
    return _parse(file.read_bytes(), str(file))


def _parse(text: bytes, name: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in names if names.count(key) > 1)!r} stands there twice")
        return found

    def number(constant: str) -> float:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=once, parse_constant=number)
    except RecursionError:
        raise ValueError(f"{name}: not JSON that palign reads: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{name}: not JSON that palign reads: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name}: expected a JSON object, found a {type(found).__name__}")
    return found


def inside(directory: epath.Path, name: str) -> epath.Path:
    """A file of a model's directory.

    The cache of `huggingface_hub` holds links from `snapshots/REVISION/` to `blobs/` beside it; those are followed.

    Raises:
        ValueError: the name leads out of the directory.
    """
    file = directory / name
    root = os.path.realpath(directory)
    if os.path.basename(os.path.dirname(root)) == "snapshots":
        root = os.path.dirname(os.path.dirname(root))
    plain = re.fullmatch(r"[\w][\w.\-]*", name) is not None
    if not plain or ("://" not in str(directory) and not os.path.realpath(file).startswith(root + os.sep)):
        raise ValueError(f"{directory}: {name!r} does not name a file in it")
    return file


def find_tensors(directory: epath.Path) -> dict[str, Tensor]:
    """Lists the tensors of a model, from `model.safetensors`, or the files that its index names.

    Raises:
        ValueError: no such files, pickles, or headers and index that contradict the files or one another.
    """
    index, single = directory / INDEX, directory / WEIGHTS
    if index.is_file() and single.is_file():
        raise ValueError(f"{directory}: holds both {WEIGHTS} and {INDEX}; remove the one that is not this model's")
    if single.is_file():
        return read_header(inside(directory, WEIGHTS))
    if not index.is_file():
        why = f"expected {WEIGHTS}, or {INDEX} and the files that it names"
        if pickles := sorted(f.name for f in directory.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".pkl")):
            why = f"palign opens no pickles ({pickles[0]}); load it with transformers and save it again"
        raise ValueError(f"{directory}: no safetensors of a model here; {why}")
    return _read_index(directory, inside(directory, INDEX))


def _read_index(directory: epath.Path, index: epath.Path) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise ValueError(f"{index}: expected weight_map, from names of tensors to names of files")
    files = {name: inside(directory, name) for name in sorted(set(places.values()))}
    for name, file in files.items():
        if file.suffix != ".safetensors":
            raise ValueError(f"{index}: weight_map names {name!r}; expected files *.safetensors")
        if not file.is_file():
            raise ValueError(f"{index}: weight_map names {name!r}, which is not there; fetch the model again")
    found: dict[str, Tensor] = {}
    for name, file in files.items():
        for tensor, entry in read_header(file).items():
            if places.get(tensor) != name:
                raise ValueError(f"{file}: holds {tensor!r}, which {INDEX} places in {places.get(tensor, 'no file')!r}")
            found[tensor] = entry
    if missing := sorted(places.keys() - found.keys()):
        raise ValueError(f"{index}: {missing[0]!r} is not in {places[missing[0]]!r}, where the index places it")
    return found


def read_header(file: epath.Path) -> dict[str, Tensor]:
    """Reads and checks the header of a safetensors file.

    Raises:
        ValueError: not a header, or one that does not describe every byte of the file once.
    """
    size = epath.Path(file).stat().length
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise ValueError(f"{file}: {size:,} bytes cannot hold a header of {length:,}; fetch the file again")
        header = _parse(opened.read(length), f"{file}: header")
    header.pop("__metadata__", None)
    entries = {name: _check_entry(file, name, entry) for name, entry in header.items()}
    end = 0
    for (start, stop), name in sorted((offsets, name) for name, (offsets, _) in entries.items()):
        if start != end:
            raise ValueError(f"{file}: {name!r} begins at byte {start:,}, the tensor before it ends at {end:,}")
        end = stop
    if end != size - 8 - length:
        raise ValueError(
            f"{file}: the header describes {end:,} bytes of tensors, the file has {size - 8 - length:,}; fetch it again"
        )
    return {name: tensor for name, (_, tensor) in entries.items()}


def _check_entry(file: epath.Path, name: str, entry: Any) -> tuple[tuple[int, int], Tensor]:
    """Offsets and tensor of one entry of a header."""

    def are_sizes(value: Any) -> bool:
        return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**60 for n in value)

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} == entry.keys():
        raise ValueError(f"{file}: {name!r}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not are_sizes(shape) or len(shape) > 8 or not are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{file}: {name!r}: shape {str(shape)[:80]} and data_offsets {str(offsets)[:80]} cannot be")
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        raise ValueError(
            f"{file}: {name!r} is {str(dtype)[:20]}; palign reads {', '.join(WIDTHS)}: save the model unquantised"
        )
    if offsets[1] - offsets[0] != math.prod(shape) * WIDTHS[dtype]:
        raise ValueError(
            f"{file}: {name!r}: {shape} {dtype} are not the {offsets[1] - offsets[0]:,} bytes of its place"
        )
    return (offsets[0], offsets[1]), Tensor(file, tuple(shape), dtype)


def check_tensors(directory: epath.Path, found: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Checks that a model has the tensors that its architecture has.

    Args:
        directory: of the model, for the message.
        found: by name.
        wanted: shapes by name.

    Raises:
        ValueError: one is missing, too many or of another shape.
    """
    extra = sorted(name for name in found.keys() - wanted.keys() if not UNREAD.fullmatch(name))
    for names, what in ((sorted(wanted.keys() - found.keys()), "is missing"), (extra, f"is none of what {CONFIG} has")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(f"{directory}: the tensor {names[0]!r}{more} {what}")
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise ValueError(f"{directory}: {name!r} has shape {found[name].shape}, by {CONFIG} it has {shape}")
