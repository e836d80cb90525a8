"""One writer a folder: a lock that the system lets go of when its process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qemcli.errors import EnvironmentFailure

LOCK = ".qem.lock"
_HALF = re.compile(r"\..+\.\d+\.tmp")  # what `writing.beside` writes to before it renames


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process, made where it is not there; left without a trace of that.

    Raises EnvironmentFailure where another process holds it.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = _locked(folder)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(lock)
        if made:
            with suppress(OSError):  # it holds something by now
                folder.rmdir()


def _locked(folder: Path) -> int:
    """The descriptor of the lock, of the file that bears its name now: the last holder may have
    removed the one that we opened."""
    path = folder / LOCK
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
        except BlockingIOError:
            os.close(lock)
            raise _busy(folder) from None
        except FileNotFoundError:
            pass
        except OSError:  # a file system without locks: better than not to write at all
            return lock
        os.close(lock)


def _busy(folder: Path) -> EnvironmentFailure:
    said = f"{folder}: another qem is writing there"
    return EnvironmentFailure(said, "wait for it, or give another --out")


def refuse_busy(folder: Path) -> None:
    """EnvironmentFailure while a process writes there; nothing is held or made."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _busy(folder) from None
    except OSError:
        return
    finally:
        os.close(lock)


def sweep(folder: Path) -> None:
    """Remove what a writer that was killed has left half written below `folder`."""
    for below, _, names in os.walk(folder):
        for name in filter(_HALF.fullmatch, names):
            Path(below, name).unlink(missing_ok=True)
