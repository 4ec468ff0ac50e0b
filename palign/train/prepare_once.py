"""Preparing data once: everything that a run does with its data before it plans them, kept in a directory."""

from typing import Any

from etils import epath

from palign.config.schema import RunConfig
from palign.train.metrics import say
from palign.train.once import (
    TOKENIZER,
    check_local,
    check_settings,
    fixed_settings,
    is_prepared,
    read_manifest,
    source_files,
    write_tokenised,
)
from palign.train.prepare import tokenise
from palign.train.sources import find_source
from palign.train.staging import staged


def prepare_once(config: RunConfig, output: epath.PathLike) -> dict[str, Any]:
    """Validates, splits and tokenises the data of a run and writes them to a directory that runs read by index.

    The directory is there when all is written, and not before. Given again, a command that is done does nothing.

    Args:
        config: of the run.
        output: the directory.

    Returns:
        The manifest.

    Raises:
        ValueError: bad data, or the directory holds something else.
    """
    place = epath.Path(output)
    check_local(place, "--output")
    if is_prepared(config.data.path):
        raise ValueError(f"config.data.path = {config.data.path!r}: is prepared already; train on it")
    if is_prepared(place):
        manifest = read_manifest(place)
        _check_same(place, manifest, config)
        say(f"{place}: is prepared already, and its sources have not changed")
        return manifest
    inherited = inherited_tokenizer(config, place)
    sources = source_files(config.data)
    with staged(place, "--output") as stage:
        write_tokenised(stage, tokenise(config, stage / TOKENIZER, inherited), config, sources)
    return read_manifest(place)


def inherited_tokenizer(config: RunConfig, workdir: epath.Path) -> epath.Path | None:
    """Where the model that a run starts from has its tokenizer, if the config names none."""
    if config.tokenizer.path or not config.init_from:
        return None
    try:
        return find_source(config.init_from, "init_from", workdir).workdir
    except ValueError as error:
        raise ValueError(f"{error}; or set config.tokenizer.path") from None


def _check_same(place: epath.Path, manifest: dict[str, Any], config: RunConfig) -> None:
    check_settings(place, manifest["settings"], fixed_settings(config))
    where = {"data.path": manifest["path"], "data.mixture": manifest["mixture"]}
    check_settings(place, where, {"data.path": config.data.path, "data.mixture": dict(config.data.mixture)})
    now = source_files(config.data)
    for path, files in manifest["sources"].items():
        if files != now[path]:
            raise ValueError(f"{place}: {path} has changed since it was prepared; name another --output, or remove it")
