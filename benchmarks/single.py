"""The result of a question that is no race: one JSON file with the same header, and Markdown tables."""

import argparse
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from typing import Any

from benchmarks import driver

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def write(
    name: str, flags: argparse.Namespace, cores: Sequence[int], before: Sequence[float], tables: str, **measured: Any
) -> None:
    """Prints the tables and writes `NAME.json`.

    Args:
        name: of the question.
        flags: what it was called with; `flags.out` is the folder.
        cores: that it was pinned to.
        before: the machine's load averages when it began.
        tables: Markdown.
        measured: the figures.
    """
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    result = driver.describe(name, flags, cores, before) | {
        "versions": versions | {"python": platform.python_version()},
        **measured,
    }
    print(f"`{result['command']}`\n\n{_describe(result)}\n\n{tables}")
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def _describe(result: dict[str, Any]) -> str:
    machine, cores = result["machine"], ", ".join(map(str, result["cores"]))
    before, after = (" ".join(f"{x:.1f}" for x in result[key]) for key in ("load_before", "load_after"))
    packages = ", ".join(f"{name} {version}" for name, version in sorted(result["versions"].items()))
    return (
        f"{machine['processor']}, core {cores} of {machine['cores']}, {machine['memory'] / 2**30:.0f} GiB; load "
        f"{before} before, {after} after; palign {result['commit']}; {packages}; {result['time']}"
    )
