"""The door: run the command tree and turn what goes wrong into one line and the right exit code."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
import tempfile
import traceback
from contextlib import suppress
from importlib import import_module
from types import FrameType
from typing import NoReturn

from qemcli.errors import QemError

ENVIRONMENT = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}


def _say(message: str, hint: str | None = None) -> None:
    from qemcli.cli._out import complain

    complain(message, hint)


class Terminated(KeyboardInterrupt):
    """SIGTERM, so that it unwinds as Ctrl-C does: workers end, what is written stays whole."""


def _terminated(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _again(arguments: list[str]) -> str | None:
    """How to go on after an interruption: the same command, with --resume where it has that."""
    from qemcli.cli._tree import modules

    module = modules().get(arguments[0]) if arguments else None
    if module is None:
        return None
    options = import_module(module).app.registered_commands[0].callback.__annotations__
    more = ["--resume"] if "resume" in options and "--resume" not in arguments else []
    return f"what was finished is kept; go on with: {shlex.join(['qem', *arguments, *more])}"


def _crash(error: BaseException) -> int:
    """A bug of ours: the traceback goes to a file, the user gets one line."""
    hint = "please report it"
    with suppress(OSError):  # the disk may be full
        with tempfile.NamedTemporaryFile(
            "w", prefix="qem-crash-", suffix=".txt", delete=False
        ) as file:
            file.write(f"arguments: {sys.argv[1:]}\n")
            traceback.print_exception(error, file=file)
        hint = f"please report it with {file.name}"
    _say(f"a bug in qem ({type(error).__name__})", hint)
    return 70


def _silence() -> None:
    """stdout is gone: let the interpreter's last flush go nowhere instead of complaining."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _code(error: BaseException) -> int:
    """The exit code of what a command raised, after saying it."""
    if isinstance(error, QemError):
        _say(error.message, error.hint)
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        _silence()
        return 0
    if isinstance(error, KeyboardInterrupt):
        terminated = isinstance(error, Terminated)
        _say("terminated" if terminated else "interrupted", _again(sys.argv[1:]))
        return 143 if terminated else 130
    if isinstance(error, MemoryError):
        _say("out of memory", "try a smaller --batch-size or --limit")
        return 5
    if isinstance(error, OSError) and error.errno in ENVIRONMENT:
        _say(f"{error.strerror}: {error.filename or 'writing the output'}")
        return 5
    return _crash(error)


def _stopped(left: SystemExit) -> KeyboardInterrupt | None:
    """The Ctrl-C or SIGTERM that Typer has made an exit of, where it came while Typer itself was
    at work: it knows one code for both, and says nothing."""
    error: BaseException | None = left
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def main() -> NoReturn:
    """The `qem` command."""
    # Read by OpenMP when torch is first imported: spinning threads cost 17x and more on a busy
    # machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    signal.signal(signal.SIGTERM, _terminated)
    try:  # the import takes a moment, in which the user may stop it
        from qemcli.cli._tree import Cut, app
    except KeyboardInterrupt as stopped:
        sys.exit(_code(stopped))

    try:
        app(prog_name="qem")
    except SystemExit as left:
        interruption = _stopped(left)
        if interruption is None:
            raise
        sys.exit(_code(interruption))
    except Cut as cut:
        sys.exit(_code(cut.cause))
    except BaseException as error:
        sys.exit(_code(error))
    sys.exit(0)
