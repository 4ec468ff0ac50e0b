"""Preparing data once: everything that a run does with its data before it plans them, kept in a directory.

By a command, in a directory that the user names; or by the run itself, in one of `config.data.cache`.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from etils import epath

import palign.data
from palign.config.schema import RunConfig
from palign.data.tokenizers import load_tokenizer, read_chat_template
from palign.sharding.processes import is_main
from palign.train.lock import run_lock
from palign.train.metrics import say
from palign.train.once import (
    TOKENIZER,
    check_local,
    check_settings,
    fixed_settings,
    identity,
    is_prepared,
    read_manifest,
    source_files,
    write_tokenised,
)
from palign.train.prepare import Prepared, plan_all, prepare, tokenise
from palign.train.sources import CONFIG, find_source
from palign.train.staging import staged


def prepare_once(config: RunConfig, output: epath.PathLike) -> dict[str, Any]:
    """Validates, splits and tokenises the data of a run and writes them to a directory that runs read by index.

    That they can be planned is checked too; the rows are not kept, for they depend on more settings and are made in
    seconds. The directory is there when all is written, and not before. Given again, a command
    that is done does nothing.

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
        tokenised = tokenise(config, stage / TOKENIZER, inherited)
        plan_all(config, tokenised)
        write_tokenised(stage, tokenised, config, sources)
    return read_manifest(place)


def prepare_cached(config: RunConfig, workdir: epath.Path, inherited: epath.Path | None) -> Prepared:
    """Returns what `prepare` does, with the examples kept in `config.data.cache` where that is set.

    What is kept is found by all that decides it: the files' content, the settings, tokenizer and chat template, and
    palign's own code. Of runs that begin at once, one tokenises and the others wait.

    Args:
        config: see `prepare`.
        workdir: see `prepare`.
        inherited: see `prepare`.

    Raises:
        ValueError: as `prepare`; or data that cannot be kept.
    """
    data = config.data
    if not data.cache:
        return prepare(config, workdir, inherited)
    cache = epath.Path(data.cache)
    check_local(cache, "config.data.cache")
    if is_prepared(data.path):
        raise ValueError(f"config.data.cache = {data.cache!r} has no effect on data that are prepared; remove it")
    inherited = workdir if (workdir / CONFIG).is_file() else inherited
    sources = source_files(data)
    place = cache / f"{pathlib.Path(data.path).stem or 'mixture'}-{_key(config, inherited, sources)}"
    with run_lock(cache, wait=True):
        if not is_prepared(place):
            with staged(place, "config.data.cache") as stage:
                tokenised = tokenise(config, stage / TOKENIZER, inherited)
                if is_main():
                    write_tokenised(stage, tokenised, config, sources)
    kept = dataclasses.replace(data, path=str(place), mixture={}, cache="")
    return prepare(dataclasses.replace(config, data=kept), workdir, inherited)


def _key(config: RunConfig, inherited: epath.Path | None, sources: dict[str, list[dict[str, Any]]]) -> str:
    """Sixteen hex digits of all that decides the examples."""
    if named := [path for path, files in sources.items() if not files]:
        raise ValueError(
            f"config.data.cache: {named[0]} has a name and no files here, so nobody sees whether it has changed; "
            "prepare it once (palign.cli.prepare) and train on that, or leave config.data.cache out"
        )
    tokenizer, place = None, config.tokenizer.path or inherited
    if place and (config.tokenizer.path or config.init_from or config.sources):  # else it is trained on these data
        tokenizer = load_tokenizer(place)
        if config.tokenizer.chat_template:
            tokenizer.chat_template = read_chat_template(config.tokenizer.chat_template)
    code = hashlib.sha256()
    for file in sorted(pathlib.Path(palign.data.__path__[0]).glob("*.py")):
        code.update(file.read_bytes())
    decides = {
        "sources": sources,
        "mixture": dict(config.data.mixture),
        "settings": fixed_settings(config),
        "tokenizer": None if tokenizer is None else identity(tokenizer),
        "code": code.hexdigest(),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


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
