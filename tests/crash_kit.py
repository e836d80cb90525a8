"""Commands that die, or whose disk fails, at the n-th change of the disk.

The command runs in a forked child, where an audit hook counts what changes names below a folder:
files opened to write, renames, removals, folders made and removed.
"""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

DEADLINE = 60  # seconds
REMOVALS = {"os.remove", "os.rmdir"}  # work on a full disk too
CHANGES = {"os.rename", "os.mkdir", "os.truncate", *REMOVALS}
DONE = 99  # the child reached its end before the event came


def _changes(event: str, args: tuple, folder: str) -> bool:
    paths = [os.fsdecode(a) for a in args[:2] if isinstance(a, str | bytes | os.PathLike)]
    if not any(path.startswith(folder) for path in paths):
        return False
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    return event in CHANGES or (event == "open" and bool((args[2] or 0) & writing))


def _child(work: Callable[[], object], prepare: Callable[[], None]) -> tuple[int, str]:
    """(exit status as waitpid gives it, stderr) of `work` in a forked child."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        said = io.StringIO()
        code = DONE
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.alarm(DEADLINE)
            with redirect_stdout(io.StringIO()), redirect_stderr(said):
                prepare()
                work()
        except SystemExit as left:
            code = int(left.code or 0)
        except BaseException as error:
            said.write(f"Traceback: {error!r}")
            code = 1
        finally:
            os.write(writer, said.getvalue().encode()[:60_000])
            os._exit(code)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said_there = pipe.read().decode()
    return os.waitpid(child, 0)[1], said_there


def _hook(folder: Path, event: int, strike: Callable[[], None]) -> Callable[[], None]:
    count = [0]

    def audit(name: str, args: tuple) -> None:
        if (name in CHANGES or name == "open") and _changes(name, args, str(folder)):
            count[0] += 1
            if count[0] >= event and name not in REMOVALS:
                strike()

    return lambda: sys.addaudithook(audit)


def killed_at(work: Callable[[], object], folder: Path, event: int) -> bool:
    """Run `work`, kill -9 before the n-th change below `folder`; False where it ended before."""
    strike = _hook(folder, event, lambda: os.kill(os.getpid(), signal.SIGKILL))
    status, said = _child(work, strike)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        return True
    assert os.WEXITSTATUS(status) in (0, DONE), said
    return False


def failed_at(
    work: Callable[[], object], folder: Path, event: int, code: int = errno.ENOSPC
) -> tuple[int, str]:
    """(exit code, stderr) of `work` on a disk that is full from the n-th change below `folder` on,
    removals aside; DONE: it returned."""

    def strike() -> None:
        raise OSError(code, os.strerror(code))

    status, said = _child(work, _hook(folder, event, strike))
    assert os.WIFEXITED(status), (status, said)
    return os.WEXITSTATUS(status), said


def limited(work: Callable[[], object], size: int) -> tuple[int, str]:
    """(exit code, stderr) of `work` where no file may grow beyond `size` bytes."""
    status, said = _child(
        work, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    )
    assert os.WIFEXITED(status), (status, said)
    return os.WEXITSTATUS(status), said


def qem(*words: object) -> Callable[[], None]:
    """The command line as `work`: leaves with its exit code."""

    def work() -> None:
        from qemcli.cli import main

        sys.argv = ["qem", *map(str, words)]
        main()

    return work


def die(number: int) -> None:
    """A job of a worker: the second one kills it."""
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}
