"""Data that were prepared once: a directory of token trees that a run reads by index, and what is known of them.

The directory is a TFDS data set (`data.stored`) with the tokenizer and a manifest beside it.
"""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from palign.config.load import to_plain
from palign.config.schema import DataConfig, RunConfig
from palign.data.sources import NAMED, open_source
from palign.data.stored import TreeSize, open_trees, tree_sizes, trees_digest, write_trees
from palign.data.tokenize import TokenTree
from palign.data.tokenizers import Tokenizer, load_tokenizer
from palign.train.metrics import Reporter, counted, say
from palign.train.paths import is_local

MANIFEST, TOKENIZER, SOURCES = "manifest.json", "tokenizer", "sources.npy"
FORMAT = "palign token trees 1"

# What decides the trees, besides where the data are, the tokenizer and, where a share is held out, the seed.
FIXED = (
    "eval_paths", "eval_fraction", "limit", "score_weights", "records", "bad_records", "control_text", "max_length",
    "max_prompt_length", "truncation",
)  # fmt: skip


class Tokenised(NamedTuple):
    """The examples of a run, before they are planned.

    Attributes:
        tokenizer: of all of them.
        trees: `train` and each held-out set -> its examples.
        sources: of each example of `train`, which source of a mixture it is from.
        read: what was counted when the sources were read.
        counts: set -> what was counted when it was tokenised.
    """

    tokenizer: Tokenizer
    trees: Mapping[str, Sequence[TokenTree]]
    sources: Sequence[int]
    read: Mapping[str, int]
    counts: Mapping[str, Mapping[str, int]]


def is_prepared(path: epath.PathLike) -> bool:
    """Whether a path is a directory of prepared data."""
    file = epath.Path(path) / MANIFEST
    return bool(str(path)) and file.is_file() and '"palign token trees' in file.read_text(encoding="utf-8")


def check_local(place: epath.Path, key: str) -> None:
    """Checks that a directory of prepared data is on this machine's disks.

    Raises:
        ValueError: it is in a bucket.
    """
    if not is_local(place):
        raise ValueError(f"{key}={place}: ArrayRecord files are read from a local disk; keep prepared data on one")


def read_manifest(place: epath.Path) -> dict[str, Any]:
    """Reads what is known of prepared data.

    Raises:
        ValueError: it is damaged, or of another version of palign's.
    """
    try:
        manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{place / MANIFEST}: damaged ({error}); prepare the data again") from None
    if manifest["format"] != FORMAT:
        raise ValueError(f"{place}: has the format {manifest['format']!r}, expected {FORMAT!r}; prepare the data again")
    return manifest


def write_tokenised(
    place: epath.Path, tokenised: Tokenised, config: RunConfig, sources: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Writes tokenised examples and their manifest; the tokenizer is there already.

    Args:
        place: the directory.
        tokenised: the examples.
        config: with which they were made.
        sources: `source_files`, as they were before they were read.

    Raises:
        ValueError: the sources have changed since.
    """
    if sources != source_files(config.data):
        raise ValueError(f"{', '.join(sources)}: changed while being read; prepare again when nobody writes there")
    with Reporter("writing and reading back", 2 * sum(map(len, tokenised.trees.values()))) as progress:
        done = itertools.count(1)
        write_trees(place, tokenised.trees, lambda tokens: progress.advance(next(done), tokens))
    with (place / SOURCES).open("wb") as file:
        np.save(file, np.asarray(tokenised.sources, np.int32))
    sets = {
        name: {
            "trees": len(trees),
            "digest": trees_digest(trees),
            "counts": dict(tokenised.counts[name]),
            "lengths": _histograms(tree_sizes(trees)),
        }
        for name, trees in tokenised.trees.items()
    }
    manifest = {
        "format": FORMAT,
        "palign": _version(),
        "path": config.data.path,
        "mixture": dict(config.data.mixture),
        "sources": sources,
        "settings": fixed_settings(config),
        "tokenizer": identity(tokenised.tokenizer),
        "read": dict(tokenised.read),
        "sets": sets,
    }
    (place / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def load_tokenised(config: RunConfig) -> tuple[RunConfig, Tokenised]:
    """Opens prepared data for a run.

    Args:
        config: of the run; its `data.path` is the directory.

    Returns:
        The config, with the mixture that was prepared, and the examples.

    Raises:
        ValueError: the data were prepared with other settings, or are damaged.
    """
    place = epath.Path(config.data.path)
    check_local(place, "config.data.path")
    manifest = read_manifest(place)
    check_settings(place, manifest["settings"], fixed_settings(config))
    sets = manifest["sets"]
    say(f"{place}: {counted(manifest['read'])}")
    for name, known in sets.items():
        say(f"{name}: {counted(known['counts'])}")
    if mixture := manifest["mixture"]:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path="", mixture=mixture))
    trees = {name: open_trees(place, name, known["digest"]) for name, known in sets.items()}
    with (place / SOURCES).open("rb") as file:
        sources = np.load(file)
    counts = {name: known["counts"] for name, known in sets.items()}
    return config, Tokenised(load_tokenizer(place / TOKENIZER), trees, sources, manifest["read"], counts)


def fixed_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that decide what the trees are, by key, as JSON gives them back."""
    data = to_plain(config.data)
    fixed = {f"data.{name}": data[name] for name in FIXED}
    if config.data.eval_fraction:
        fixed["data.seed"] = config.data.seed  # of the split
    if not (config.tokenizer.path or config.init_from):  # of a tokenizer that is trained
        fixed |= {f"tokenizer.{name}": getattr(config.tokenizer, name) for name in ("model_type", "vocab_size")}
    fixed["rollout.max_new_tokens"] = config.rollout.max_new_tokens if config.rollout.every else 0
    return json.loads(json.dumps(fixed))


def check_settings(place: epath.Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Checks that data were prepared with the settings that are asked for, as far as both have a say.

    Raises:
        ValueError: names the first that differs.
    """
    for key in sorted(before.keys() & now.keys()):
        if before[key] != now[key]:
            raise ValueError(
                f"config.{key} = {now[key]!r}: {place} was prepared with {before[key]!r}; use that, or prepare the "
                "data again in another directory"
            )


def check_tokenizer(place: epath.Path, before: Tokenizer, now: Tokenizer) -> None:
    """Checks that a run has the tokenizer that its data were prepared with.

    Raises:
        ValueError: it has another one, or another chat template.
    """
    known, given = identity(before), identity(now)
    what = {
        "model": ("tokenizer", "tokenizer.path"),
        "eos_ids": ("set of tokens that end a response", "tokenizer.path"),
        "chat_template": ("chat template", "tokenizer.chat_template"),
    }
    for name, (shown, key) in what.items():
        if known[name] != given[name]:
            raise ValueError(
                f"config.{key}: {place} was prepared with another {shown} than this run uses, its own "
                "or that of the model that it starts from; name the same, or prepare the data again"
            )


def source_files(data: DataConfig) -> dict[str, list[dict[str, Any]]]:
    """Path of each source -> name, bytes and SHA-256 of its files; none of a data set that has a name."""
    paths = dict.fromkeys(filter(None, [*(data.mixture or [data.path]), *data.eval_paths.values()]))
    named = {path for path in paths if path.partition(":")[0] in NAMED}
    return {path: [] if path in named else [_described(file) for file in open_source(path).files] for path in paths}


def _version() -> str:
    try:
        return importlib.metadata.version("palign-jax")
    except importlib.metadata.PackageNotFoundError:
        return "from source"


def _described(file: epath.Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()  # type: ignore[arg-type]
    return {"file": str(file), "bytes": file.stat().length, "sha256": digest}


def identity(tokenizer: Tokenizer) -> dict[str, Any]:
    """What of a tokenizer decides the trees, as hashes: model, chat template, the ids that end a response."""
    template = tokenizer.chat_template
    hashed = None if template is None else hashlib.sha256(template.encode()).hexdigest()
    return {"model": tokenizer.fingerprint(), "chat_template": hashed, "eos_ids": sorted(tokenizer.eos_ids)}


def _histograms(sizes: Sequence[TreeSize]) -> dict[str, dict[str, list[int]]]:
    """Of tokens of prompts, of responses and of whole trees."""
    lengths = {
        "prompt": [size.prompt for size in sizes],
        "response": [length for size in sizes for length in size.responses],
        "tree": [size.prompt + sum(size.responses) for size in sizes],
    }
    return {name: _histogram(values) for name, values in lengths.items()}


def _histogram(values: Sequence[int]) -> dict[str, list[int]]:
    """Counts of the values in [edge, next edge), with about 32 bins of one width."""
    width = -(-(max(values) + 1) // 32)
    counts = np.bincount(np.asarray(values) // width)
    return {"edges": [width * i for i in range(len(counts) + 1)], "counts": counts.tolist()}
