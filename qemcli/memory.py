"""How much memory a piece of work needs, beyond what the process held before it."""

from __future__ import annotations

import ctypes
import ctypes.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SELF = Path("/proc/self")


class Peak:
    """The largest resident set while some work was done, less the one before it.

    Attributes:
        megabytes: in 2^20 bytes, once the work is done; None where the kernel does not say (it is
            Linux that does).
    """

    megabytes: float | None = None


@contextmanager
def watched() -> Iterator[Peak]:
    """Watch the work in this block: `with watched() as peak: ...; peak.megabytes`.

    Memory that was freed before is handed back first, so that what earlier work left does not hide
    what this one takes; then the kernel's high-water mark is set back to the present (proc(5),
    clear_refs and VmHWM). What the process shares with files counts as its own.
    """
    peak = Peak()
    _trim()
    before = _said("VmRSS") if _set_back() else None
    try:
        yield peak
    finally:
        highest = _said("VmHWM") if before is not None else None
        if before is not None and highest is not None:
            peak.megabytes = max(0.0, highest - before)


def _set_back() -> bool:
    try:
        SELF.joinpath("clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _said(name: str) -> float | None:
    """A line of the kernel's status, which counts in kB, in 2^20 bytes."""
    try:
        found = re.search(rf"^{name}:\s*(\d+) kB", SELF.joinpath("status").read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) / 1024 if found else None


def _trim() -> None:
    """Hand memory that was freed back to the system, where the C library can."""
    name = ctypes.util.find_library("c")
    trim = getattr(ctypes.CDLL(name), "malloc_trim", None) if name else None
    if trim is not None:
        trim(0)
