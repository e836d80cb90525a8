"""Runs one pickle in a process that can do little else: a script of its own, never imported by qem.

    python -I -B _sandbox.py SECONDS MEGABYTES < the pickle > plain data, as torch.save writes it

Before anything of the pickle is run the kernel forbids this process, where it can (Landlock, a
network of its own), to write, to make, to remove, to execute and to connect; then memory, time,
files and processes are bounded, and Python itself refuses every audited event that reading needs
not. What comes out are dicts, lists, numbers and dense tensors, which are read as hostile data.
"""

from __future__ import annotations

import ctypes
import io
import os
import pickle
import resource
import sys
from typing import Any

# What unpickling may do, by the names of Python's audit events; `open` to read alone.
HARMLESS = (
    "import", "exec", "compile", "marshal.", "code.__new__", "function.__new__", "object.__",
    "pickle.find_class", "sys._getframe", "os.listdir", "os.scandir", "builtins.id", "array.",
    "sys.excepthook", "sys.unraisablehook", "cpython.",
)  # fmt: skip
MAX_DEPTH, MAX_ENTRIES = 32, 500_000
# Landlock: execute, write, make, remove, rename, cut (bits 0, 1, 4 to 14 of linux/landlock.h).
_ACTS, _CONNECTS, _SIGNALS = 0b111_1111_1111_0011, 0b11, 0b11


class Stopped(Exception):
    """The pickle wanted to do what it may not."""


def confine() -> list[str]:
    """Give up what the kernel lets a process give up; what of it the kernel does not know."""
    libc = ctypes.CDLL(None, use_errno=True)
    missing = []
    if not hasattr(libc, "unshare") or libc.unshare(0x4000_0000 | 0x1000_0000):
        missing.append("a network of its own")  # CLONE_NEWNET, CLONE_NEWUSER
    version = libc.syscall(444, None, 0, 1) if sys.platform == "linux" else -1
    known = 15 if version >= 3 else 14 if version == 2 else 13
    fields = [_ACTS & (1 << known) - 1, _CONNECTS, _SIGNALS]
    count = 3 if version >= 6 else 2 if version >= 4 else 1
    asked = (ctypes.c_uint64 * count)(*fields[:count])
    rules = libc.syscall(444, asked, ctypes.sizeof(asked), 0) if version > 0 else -1
    bound = rules >= 0 and libc.prctl(38, 1, 0, 0, 0) == 0 and libc.syscall(446, rules, 0) == 0
    return missing if bound else [*missing, "Landlock"]


def bound(seconds: int, megabytes: int) -> None:
    """Bounds on memory, processor time, files and processes, from here on."""
    pages = 0
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
    memory = pages * resource.getpagesize() + (megabytes << 20)
    spent = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds, spent + seconds + 5))
    for what, most in (
        (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, megabytes << 20),
        (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(what, (most, most))


def watch(event: str, args: tuple[Any, ...]) -> None:
    """The audit hook: what is not known to be harmless is not done."""
    if event == "open":
        _, mode, flags = args
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        if not (flags or 0) & writing and not set(mode or "") & set("wax+"):
            return
    elif event.startswith(HARMLESS):
        return
    said = next((str(a)[:60] for a in args if isinstance(a, str | bytes)), "")
    raise Stopped(f"it wanted {event}({said})")


class Absent:
    """An object of a class that is not installed here: what was put into it, and nothing it did."""

    def __init__(self, *args: Any, **named: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__dict__.setdefault("items", {})[key] = value

    def append(self, value: Any) -> None:
        """As pickles fill lists."""
        self.__dict__.setdefault("values", []).append(value)


class Unpickler(pickle.Unpickler):
    """Python's own, with Absent for the classes that are not installed."""

    def find_class(self, module: str, name: str) -> Any:
        """The class or function of that name."""
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            return type(name.rpartition(".")[2] or "Absent", (Absent,), {"__module__": module})


class Plain:
    """Objects as dicts, lists, numbers and dense tensors."""

    def __init__(self, torch: Any, numpy: Any) -> None:
        self.torch, self.numpy, self.left = torch, numpy, MAX_ENTRIES

    def of(self, value: Any, depth: int = 0) -> Any:
        """The value, None where it is nothing of the kind."""
        self.left -= 1
        if self.left < 0 or depth > MAX_DEPTH:
            return None
        if isinstance(value, self.numpy.ndarray | self.numpy.generic):
            return self._array(value)
        if isinstance(value, self.torch.Tensor):
            dense = value.layout == self.torch.strided and not value.is_quantized
            return value.detach().cpu().clone() if dense else None
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, list | tuple):
            return [self.of(v, depth + 1) for v in value]
        held = value if isinstance(value, dict) else getattr(value, "__dict__", {})
        names = ("_parameters", "_buffers", "_modules")
        if all(isinstance(held.get(name), dict) for name in names):
            held = {k: v for name in names for k, v in held[name].items() if v is not None}
        return {str(k): self.of(v, depth + 1) for k, v in held.items()}

    def _array(self, value: Any) -> Any:
        if value.ndim == 0 and value.dtype.kind in "biuf":
            return value.item()
        if value.dtype.kind not in "biuf" or value.dtype.itemsize > 8:
            return None
        return self.torch.from_numpy(self.numpy.array(value, order="C"))


def main() -> None:
    """Read stdin, write stdout; a line on stderr and 1 where it was stopped."""
    missing = confine()
    seconds, megabytes = int(sys.argv[1]), int(sys.argv[2])
    import numpy
    import torch

    whole = sys.stdin.buffer.read()
    torch.save({"warm": torch.zeros(1)}, io.BytesIO())  # whatever this imports is imported now
    bound(seconds, megabytes)
    sys.addaudithook(watch)
    try:
        saved = whole[:4] == b"PK\x03\x04" or b"\xfc\x9cF\xf9 j\xa8P\x19" in whole[:40]
        if saved:
            this = sys.modules[__name__]
            found = torch.load(
                io.BytesIO(whole), map_location="cpu", weights_only=False, pickle_module=this
            )
        else:
            found = Unpickler(io.BytesIO(whole)).load()
        out = io.BytesIO()
        torch.save(Plain(torch, numpy).of(found), out)
        sys.stdout.buffer.write(out.getvalue())
        sys.stdout.buffer.flush()
    except MemoryError:
        sys.stderr.write("stopped: it wanted more memory than it may have\n")
        os._exit(1)
    except BaseException as error:  # whatever the pickle raises is its last word
        kind = "stopped" if isinstance(error, Stopped) else f"failed: {type(error).__name__}"
        sys.stderr.write(f"{kind}: {' '.join(str(error).split())[:200]}\n")
        os._exit(1)
    sys.stderr.write(f"missing: {', '.join(missing)}\n" if missing else "")
    os._exit(0)


def load(file: Any, **options: Any) -> Any:
    """As pickle.load, for torch.load's `pickle_module`."""
    return Unpickler(file, **options).load()


if __name__ == "__main__":
    main()
