"""What the pickle of a torch.save file stands for: storages, the tensors that are views of them,
and which calls make plain data.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from qemcli.formats._pickle_machine import UNKNOWN, Bad, Foreign, Named

_DTYPES = {  # storage type -> (torch's name, bytes)
    "DoubleStorage": ("float64", 8), "FloatStorage": ("float32", 4), "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2), "LongStorage": ("int64", 8), "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2), "CharStorage": ("int8", 1), "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1), "ComplexFloatStorage": ("complex64", 8),
    "ComplexDoubleStorage": ("complex128", 16), "UntypedStorage": ("uint8", 1),
}  # fmt: skip
SIZES = dict(_DTYPES.values()) | {
    "uint16": 2, "uint32": 4, "uint64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1, "complex32": 4,
}  # fmt: skip
# What a call of these makes is data and stays a note; a call of anything else could do anything.
INERT = frozenset(
    {
        "_codecs.encode", "builtins.set", "builtins.frozenset", "builtins.bytearray",
        "builtins.complex", "builtins.slice", "builtins.range", "copyreg._reconstructor",
        "datetime.date", "datetime.datetime", "datetime.time", "datetime.timedelta",
        "decimal.Decimal", "fractions.Fraction", "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct", "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar", "numpy.dtype", "pathlib.Path", "pathlib.PosixPath",
        "pathlib.PurePath", "pathlib.PurePosixPath", "pathlib.PureWindowsPath",
        "pathlib.WindowsPath", "torch.device", "uuid.UUID",
    }
)  # fmt: skip
_DICTS = ("collections.OrderedDict", "collections.defaultdict", "collections.Counter")


class Beyond(Exception):
    """A sound file of a kind that only torch reads."""


@dataclass(eq=False)
class Storage:
    """Bytes of the file: `count` numbers of `dtype` from byte `begin` on, which is found when it is
    needed; `crc` is 0 where the file states none."""

    dtype: str
    count: int
    begin: int = -1
    crc: int = 0
    member: int = -1  # offset of a zip's local header

    @property
    def size(self) -> int:
        return self.count * SIZES[self.dtype]


@dataclass(eq=False)
class Stored:
    """A tensor: a strided view of a storage, in elements of its own dtype."""

    storage: Storage
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Bytes, were it contiguous."""
        return math.prod(self.shape) * SIZES[self.dtype]

    @property
    def reach(self) -> int:
        """Elements from its first to its last one in the storage, both counted."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))


@dataclass
class Storages:
    """Persistent ids, each key one storage."""

    make: Any
    known: dict[str, Storage] = field(default_factory=dict)

    def get(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and pid[:1] == ("module",) and len(pid) > 1:
            return pid[1]  # legacy: a class with its source text
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise Bad("a persistent id that is no storage")
        kind, key, count = pid[1], pid[2], pid[4]
        if len(pid) == 6 and pid[5] is not None:
            raise Beyond("a view of a storage")
        name = kind.name.rpartition(".")[2] if isinstance(kind, Named) else ""
        if name not in _DTYPES:
            raise Beyond(f"the storage type {name[:40]}")
        if not isinstance(key, str) or type(count) is not int or not 0 <= count < 2**48:
            raise Bad("a storage without key or count")
        dtype = _DTYPES[name][0]
        if key not in self.known:
            self.known[key] = self.make(key, dtype, count)
        found = self.known[key]
        if (found.dtype, found.count) != (dtype, count):
            raise Beyond("one storage under two types")
        return found


def no_call(name: str, args: tuple[Any, ...]) -> Any:
    raise Bad(f"a call of {name[:80]} where torch writes plain numbers")


def call(name: str, args: tuple[Any, ...]) -> Any:
    """What a call stands for: a tensor, a dict, a plain value; UNKNOWN where it could run code."""
    short = name.rpartition(".")[2]
    if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
        return _tensor(*args[:4])
    if name == "torch._utils._rebuild_tensor_v3":
        storage, offset, shape, stride, *_, dtype = args[:7]
        return _tensor(storage, offset, shape, stride, dtype)
    if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        return args[0]
    if name.startswith(("torch._utils._rebuild", "torch._tensor._rebuild")):
        raise Beyond(short)
    if name in _DICTS:
        return _dict(args)
    if name == "torch.Size":
        return tuple(args[0])
    if name in INERT:
        return _note(name, short, args)
    return UNKNOWN


def _dict(args: tuple[Any, ...]) -> Any:
    """A dict of the pairs that it is made from, if any: the rest is set afterwards."""
    pairs = args[0] if args and isinstance(args[0], list) else []
    return {k: v for k, v in pairs if isinstance(k, str | int)}


def _note(name: str, short: str, args: tuple[Any, ...]) -> Any:
    if name == "_codecs.encode" and isinstance(args[0], str):
        return args[0].encode("latin-1")
    if short == "scalar" and len(args) == 2:
        return _scalar(*args)
    words = [str(a) for a in args if isinstance(a, str | int)]
    if name == "torch.device":
        return ":".join(words)
    if name.startswith("pathlib."):
        return str(PurePosixPath(*words))
    return Foreign(name, args)


def _scalar(dtype: Any, raw: Any) -> Any:
    """A NumPy number, as Python's."""
    code = dtype.args[0] if isinstance(dtype, Foreign) and dtype.args else None
    if isinstance(code, str) and re.fullmatch(r"[fiub][1248]", code) and isinstance(raw, bytes):
        kind = np.dtype(code).newbyteorder("<")
        if len(raw) == kind.itemsize:
            return np.frombuffer(raw, kind)[0].item()
    return Foreign("numpy.scalar")


def _counts(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(v) is int and 0 <= v < 2**48 for v in values)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, dtype: Any = None) -> Stored:
    if not isinstance(storage, Storage) or not _counts((offset,)):
        raise Bad("a tensor without storage")
    if not _counts(shape) or not _counts(stride) or len(shape) != len(stride) or len(shape) > 32:
        raise Bad("a tensor whose shape or strides are no counts")
    name = storage.dtype if dtype is None else _name(dtype)
    if name not in SIZES:
        raise Beyond(f"the dtype {name[:40]}")
    found = Stored(storage, name, shape, stride, offset)
    if found.reach and (offset + found.reach) * SIZES[name] > storage.size:
        raise Bad("a tensor that reaches beyond its storage")
    return found


def _name(dtype: Any) -> str:
    return dtype.name.removeprefix("torch.") if isinstance(dtype, Named) else "unknown"
