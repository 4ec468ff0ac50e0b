"""From a config file and command-line overrides to the frozen dataclasses of `palign.config.schema`.

A config file is Python with `get_config() -> ml_collections.ConfigDict`. Its top level describes a run; `stages`, if
there are any, are named differences from it, each becoming a run of its own.
"""

import ast
import contextlib
import copy
import dataclasses
import difflib
import importlib.util
import pathlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from palign.config.renamed import RENAMED, REVALUED
from palign.config.schema import ObjectiveConfig, Recipe, RunConfig

if TYPE_CHECKING:
    import ml_collections

T = TypeVar("T")

FREE_KEYS: dict[Any, str] = {ObjectiveConfig: "hyper"}  # classes with a field that takes every key which is not a field


def load_recipe(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a config file, applies `a.b=c` overrides, and resolves every stage.

    Args:
        path: of the config file; what stands behind a `:` is handed to its `get_config`.
        overrides: `key.key=value`; the value is a Python literal, else a string. Top-level keys hold for all stages,
            `stages.NAME.` for one.

    Returns:
        The stages; a file without `stages` is one, named after the file.

    Raises:
        ValueError: one line with the key, what was expected, and the nearest match.
    """
    return resolve_recipe(load_plain(path, overrides), name=pathlib.Path(path.partition(":")[0]).stem or "train")


def load_stage(path: str, overrides: Sequence[str], stage: str) -> RunConfig:
    """Reads one stage of what `load_recipe` reads; the last one if none is named."""
    stages = load_recipe(path, overrides).stages
    stage = stage or list(stages)[-1]
    if stage not in stages:
        raise ValueError(f"--stage={stage}: the config has {', '.join(stages)}")
    return stages[stage]


def load_plain(path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads a config file and applies `a.b=c` overrides, as `load_recipe`; without a path these are all there is."""
    config = _run_file(path).to_dict() if path else {}
    for override in overrides:
        _apply(config, override)
    return config


def ordered(**stages: Any) -> "ml_collections.ConfigDict":
    """Stages in the order written; a plain group of a ConfigDict is sorted by name."""
    import ml_collections  # here, since only config files need it

    return ml_collections.ConfigDict(stages, sort_keys=False)


def resolve_recipe(config: Mapping[str, Any], *, name: str = "train") -> Recipe:
    """Resolves nested plain values: a run, or a run with `stages`."""
    base = {key: value for key, value in config.items() if key != "stages"}
    stages = config.get("stages") or {name: {}}
    for stage in stages:
        if not stage.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"config.stages.{stage}: a stage's name is made of letters, digits, - and _")
    resolved = {}
    for stage, given in stages.items():
        with in_stage(stage, stages):
            resolved[stage] = resolve_run(_merge(base, given))
    return Recipe(stages=resolved)


@contextlib.contextmanager
def in_stage(name: str, stages: Mapping[str, Any]) -> Iterator[None]:
    """Names the stage in front of an error, where there are several."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"stage {name}: {error}" if len(stages) > 1 else str(error)) from None


def resolve_run(config: Mapping[str, Any]) -> RunConfig:
    """Resolves nested plain values into a `RunConfig`, checking every key, type and range."""
    return resolve_as(RunConfig, config)


def resolve_as(cls: type[T], config: Mapping[str, Any]) -> T:
    """Resolves nested plain values into a config dataclass, checking every key, type and range."""
    return _resolve(cls, config, "config")


def to_plain(config: Any) -> Any:
    """The nested plain values of a resolved config, such that `resolve_run` gives it back; JSON can hold them."""
    if dataclasses.is_dataclass(config):
        plain = {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return plain | plain.pop(FREE_KEYS.get(type(config), ""), {})
    if isinstance(config, Mapping):
        return {key: to_plain(value) for key, value in config.items()}
    return [to_plain(value) for value in config] if isinstance(config, tuple | list) else config


def _run_file(path: str) -> "ml_collections.ConfigDict":
    path, _, argument = path.partition(":")
    file = pathlib.Path(path)
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.py")], n=1)
        raise ValueError(f"--config={path}: no such file{_did_you_mean(near)}")
    spec = importlib.util.spec_from_file_location(f"palign_config_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever is wrong with it, it is the user's file
        raise ValueError(f"--config={path}: {type(error).__name__}: {error}; --debug shows where") from error
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path}: expected a function get_config() -> ml_collections.ConfigDict")
    return module.get_config(argument) if argument else module.get_config()


def _apply(config: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise ValueError(f"--config.{override}: expected --config.key=value")
    *parents, last = key.split(".")
    if parents[:1] == ["stages"]:  # a slip would otherwise be one more stage
        stage, stages = (*parents, last)[1], config.get("stages") or {}
        if stage not in stages:
            near = difflib.get_close_matches(stage, list(stages), n=1)
            hint = _did_you_mean(near) or "; there are " + (", ".join(stages) or "none")
            raise ValueError(f"--config.{key}: no stage {stage!r}{hint}")
    for depth, parent in enumerate(parents):
        config = config.setdefault(parent, {})
        if not isinstance(config, dict):
            raise ValueError(f"--config.{key}: config.{'.'.join(parents[: depth + 1])} is a value, it has no keys")
    try:
        config[last] = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        # Words are strings; what reads as a number must not silently be one.
        config[last] = float(text) if text.lower().lstrip("+-") in ("nan", "inf", "infinity") else text


def _merge(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(base))
    for key, value in given.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def _resolve(cls: type, given: Any, key: str) -> Any:
    if not isinstance(given, Mapping):
        raise ValueError(f"{key} = {given!r}: expected a group of keys ({', '.join(_fields(cls))})")
    hints, free = typing.get_type_hints(cls), FREE_KEYS.get(cls)
    values: dict[str, Any] = {free: {}} if free else {}
    for name, value in given.items():
        if name in hints and name != free:
            values[name] = _convert(hints[name], value, f"{key}.{name}")
        elif name in RENAMED:
            raise ValueError(f"{key}.{name}: no such setting; {RENAMED[name]}")
        elif free:
            values[free][name] = _convert(float, value, f"{key}.{name}")
        else:
            raise ValueError(f"{key}.{name}: no such setting{_advice(cls, name)}")
    return cls(**values)


def _advice(cls: type, name: str) -> str:
    """What to write in place of an unknown setting: it stands in another section, or one is spelt alike."""
    sections = {
        section: hint for section, hint in typing.get_type_hints(RunConfig).items() if dataclasses.is_dataclass(hint)
    }
    if places := [f"config.{section}.{name}" for section, hint in sections.items() if name in _fields(hint)]:
        return f"; it is {' or '.join(places)}"
    if near := difflib.get_close_matches(name, _fields(cls), n=1):
        return _did_you_mean(near)
    own = "; a method's own settings, such as beta, stand in config.objective" if cls is RunConfig else ""
    return f"; there are {', '.join(_fields(cls))}{own}"


def _convert(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        cls = typing.cast(type, hint)
        return value if isinstance(value, cls) else _resolve(cls, value, key)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _convert(arguments[0], value, key)
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else (value,)
        return tuple(_convert(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(items))
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {name: _convert(arguments[1], item, f"{key}.{name}") for name, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (hint is not bool and isinstance(value, bool)) or not isinstance(value, origin or hint):
        expected = "a number" if hint is float else REVALUED.get(key, getattr(hint, "__name__", str(hint)))
        raise ValueError(f"{key} = {value!r}: expected {expected}")
    return value


def _fields(cls: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.name != FREE_KEYS.get(cls)]


def _did_you_mean(near: list[str]) -> str:
    return f" (did you mean {near[0]!r}?)" if near else ""
