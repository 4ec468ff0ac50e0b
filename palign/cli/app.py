"""What every command shares: one line per error, exit codes, and a compilation cache."""

import argparse
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from palign.cli.exits import USER_ERROR as USER_ERROR
from palign.cli.exits import fail, say_why

INTERRUPTED = 130


def run(command: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None) -> int:
    """Runs a command and turns what goes wrong into one line and an exit code; `--debug` shows the traceback.

    Args:
        command: takes the arguments, raises `ValueError` for what the user can mend.
        arguments: without the program's name; those of the process by default.

    Returns:
        0, or 2 (config, data, checkpoint, tokenizer), 70 (a fault of palign's), 74 (storage full or read-only), 75
        (preempted, saved: give the command again), 77 (loss or gradient not finite), 130.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    own = given.index("--") if "--" in given else len(given)  # what stands behind -- is another command's
    debug = "--debug" in given[:own]
    try:
        command([argument for argument in given[:own] if argument != "--debug"] + given[own:])
        return 0
    except KeyboardInterrupt:
        say_why("interrupted; the same command goes on from the last checkpoint", debug)
        return INTERRUPTED
    except Exception as error:
        return fail(error, debug)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the options")


def parser(name: str, doc: str) -> argparse.ArgumentParser:
    """A parser described by the first line of the command's docstring; a slip is a `ValueError`."""
    return _Parser(prog=name, description=doc.splitlines()[0], allow_abbrev=False)


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that several processes can run together."""
    group = parser.add_argument_group("several processes, where the environment does not say (docs/processes.md)")
    group.add_argument("--coordinator", default="", metavar="HOST:PORT", help="of process 0")
    group.add_argument("--processes", type=int, help="how many; 1: this one alone, whatever the environment says")
    group.add_argument("--process", type=int, help="which of them this is, from 0")


def begin(given: argparse.Namespace) -> None:
    """Joins the other processes, if there are any, and turns the compilation cache on."""
    from palign.sharding.processes import initialize

    if line := initialize(given.coordinator, given.processes, given.process):
        print(line, file=sys.stderr, flush=True)
    use_compilation_cache()


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, unless JAX_COMPILATION_CACHE_DIR says where or XDG_CACHE_HOME moves it."""
    import jax

    # Read back from the cache (jax 0.10), a program of several CPU devices dead-locks in its collectives.
    several_cpus = jax.default_backend() == "cpu" and jax.device_count() > 1
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR") and not several_cpus:
        home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "palign" / "xla"))
