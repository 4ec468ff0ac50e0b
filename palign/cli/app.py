"""What every command shares: one line per error, exit codes, and a compilation cache."""

import argparse
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

USER_ERROR, INTERNAL_ERROR, NOT_FINITE = 2, 70, 77


def run(command: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None) -> int:
    """Runs a command and turns what goes wrong into one line and an exit code; `--debug` shows the traceback.

    Args:
        command: takes the arguments, raises `ValueError` for what the user can mend.
        arguments: without the program's name; those of the process by default.

    Returns:
        0, or 2 (config, data, checkpoint, tokenizer), 70 (a fault of palign's), 77 (loss or gradient not finite), 130.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        command([argument for argument in given if argument != "--debug"])
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from the last checkpoint", 130, debug)
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError) as error:
        return _fail(str(error), USER_ERROR, debug)
    except Exception as error:
        if type(error).__name__ == "TrainingDivergedError":
            return _fail(str(error), NOT_FINITE, debug)
        message = f"{type(error).__name__}: {error} (a fault of palign's: --debug shows where)"
        return _fail(message, INTERNAL_ERROR, debug)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the options")


def parser(name: str, doc: str) -> argparse.ArgumentParser:
    """A parser described by the first line of the command's docstring; a slip is a `ValueError`."""
    return _Parser(prog=name, description=doc.splitlines()[0], allow_abbrev=False)


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, unless JAX_COMPILATION_CACHE_DIR says where or XDG_CACHE_HOME moves it."""
    import jax

    # Read back from the cache (jax 0.10), a program of several CPU devices dead-locks in its collectives.
    several_cpus = jax.default_backend() == "cpu" and jax.device_count() > 1
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR") and not several_cpus:
        home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "palign" / "xla"))


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"palign: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code
