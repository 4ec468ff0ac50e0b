"""How a command ends when something is wrong: an exit code and one line."""

import errno
import os
import sys
import traceback

USER_ERROR, INTERNAL_ERROR, STORAGE_ERROR, PREEMPTED, NOT_FINITE = 2, 70, 74, 75, 77
TOGETHER = {"PreemptedError": PREEMPTED, "TrainingDivergedError": NOT_FINITE}  # in all processes at the same step
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
MENDABLE = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)


def fail(error: Exception, debug: bool) -> int:
    """Prints one line for an error and returns its exit code; one of several processes exits with it at once.

    To return would not do: the interpreter would wait for the other processes, and they for this one.
    """
    code, together = code_of(error), "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()
    line = str(error)
    if code == INTERNAL_ERROR:
        line = f"{type(error).__name__}: {error} (a fault of palign's: --debug shows where)"
        if together and type(error).__name__ == "JaxRuntimeError":  # a collective that was not answered
            line = f"lost another process, whose log says why: {error}"
    say_why(line, debug)
    if together:
        if code in TOGETHER.values():
            sys.modules["jax"].distributed.shutdown()  # waits for the others
        os._exit(code)
    return code


def code_of(error: Exception) -> int:
    """The exit code of an error; the table is in docs/training.md."""
    if getattr(error, "errno", None) in STORAGE or os.strerror(errno.ENOSPC) in str(error):  # tensorstore has a text
        return STORAGE_ERROR
    return USER_ERROR if isinstance(error, MENDABLE) else TOGETHER.get(type(error).__name__, INTERNAL_ERROR)


def say_why(message: str, debug: bool) -> None:
    """Prints one line, after the traceback where that is asked for."""
    if debug:
        traceback.print_exc()
    print(f"palign: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
