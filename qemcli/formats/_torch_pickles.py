"""Where the tensors of a torch.save file lie, found without torch and without running anything.

zip:    */data.pkl, */byteorder, */data/<key>     members stored, so that tensors can be mapped
legacy: magic, protocol, machine, object, [keys] as pickles, then for each key: count (8 bytes),
        data
"""

from __future__ import annotations

import io
import math
import mmap
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from struct import error as struct_error
from typing import Any, NoReturn

import numpy as np

from qemcli.errors import InputError
from qemcli.formats._pickles import UNKNOWN, Bad, Foreign, Named, Pickled, read
from qemcli.formats.safetensors import decode

MAX_PICKLE = 64 << 20  # bytes
SMALL = 8 << 20  # bytes; a larger file is mapped into memory and not read
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_DTYPES = {  # storage type -> (torch's name, bytes)
    "DoubleStorage": ("float64", 8), "FloatStorage": ("float32", 4), "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2), "LongStorage": ("int64", 8), "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2), "CharStorage": ("int8", 1), "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1), "ComplexFloatStorage": ("complex64", 8),
    "ComplexDoubleStorage": ("complex128", 16), "UntypedStorage": ("uint8", 1),
}  # fmt: skip
_SIZES = dict(_DTYPES.values()) | {
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
_BROKEN = (zipfile.BadZipFile, OSError, ValueError, EOFError, struct_error, NotImplementedError)


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
        return self.count * _SIZES[self.dtype]


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
        return math.prod(self.shape) * _SIZES[self.dtype]

    @property
    def reach(self) -> int:
        """Elements from its first to its last one in the storage, both counted."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))


@dataclass(frozen=True)
class Located:
    """What a torch file holds: dicts, lists, numbers, with a Stored for every tensor and a Foreign
    for every object of another class; and what loading it would have called."""

    tree: Any
    calls: tuple[str, ...]


def located(path: Path) -> Located:
    """The content of a torch file, tensors located and not read.

    Raises InputError where it is cut short or damaged, Beyond where torch may know better.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        found = _zipped(path) if zipped else _legacy(path)
    except Bad as error:
        _damaged(path, str(error))
    return Located(found.value, found.calls)


def arrays(path: Path, tensors: Mapping[str, Stored]) -> dict[str, np.ndarray]:
    """name -> float32 or float64 array; InputError where bytes are missing, or, in a file that is
    read whole, do not have their checksum. A large file is mapped: its pages are read on use."""
    data = _bytes(path)
    checked: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        storage = tensor.storage
        if id(storage) not in checked:
            _check(path, data, storage)
            checked.add(id(storage))
        try:
            found[name] = _array(data, tensor)
        except InputError as error:
            raise InputError(f"{path}: tensor '{name}': {error.message}") from None
    return found


def _array(data: bytes | mmap.mmap, tensor: Stored) -> np.ndarray:
    size = _SIZES[tensor.dtype]
    begin = tensor.storage.begin + tensor.offset * size
    raw = memoryview(data)[begin : begin + tensor.reach * size]
    flat = decode(np.frombuffer(raw, np.uint8), tensor.dtype)
    strides = [s * flat.itemsize for s in tensor.stride]
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)


def _bytes(path: Path) -> bytes | mmap.mmap:
    with path.open("rb") as file:
        if path.stat().st_size <= SMALL:
            return file.read()
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _check(path: Path, data: bytes | mmap.mmap, storage: Storage) -> None:
    """Find where the storage begins, and that its bytes are there and are those that were saved."""
    if storage.begin < 0:
        storage.begin = _data_start(data, storage.member)
    end = storage.begin + storage.size
    if end > len(data):
        _damaged(path, f"needs {end} bytes, has {len(data)}")
    whole = isinstance(data, bytes)  # to check a mapped file is to read it
    if whole and storage.crc and zlib.crc32(memoryview(data)[storage.begin : end]) != storage.crc:
        _damaged(path, "checksum")


def _data_start(data: bytes | mmap.mmap, at: int) -> int:
    head = data[at : at + 30]
    if len(head) < 30 or head[:4] != b"PK\x03\x04" or head[8:10] != b"\0\0":
        raise InputError("a zip that has changed since it was opened", "open it again")
    return at + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")


def _damaged(path: Path, why: str) -> NoReturn:
    first = why.splitlines()[0][:100] if why else "unreadable"
    raise InputError(
        f"{path}: a torch file that is cut short or damaged ({first})", "download or write it again"
    ) from None


def _zipped(path: Path) -> Pickled:
    members = _members(path)
    pickles = [m for name, m in members.items() if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1 or pickles[0].header_offset != 0:
        raise Bad(f"{len(pickles)} data.pkl, of which one should come first")
    if pickles[0].file_size > MAX_PICKLE:
        raise Bad(f"a pickle of {pickles[0].file_size} bytes is over the limit of {MAX_PICKLE}")
    root = pickles[0].filename.removesuffix("data.pkl")
    with path.open("rb") as file:
        order = members.get(f"{root}byteorder")
        if order and _member(file, order) != b"little":
            raise Beyond("its numbers are big-endian")
        data = _member(file, pickles[0])

    def storage(key: str, dtype: str, count: int) -> Storage:
        member = members.get(f"{root}data/{key}")
        found = Storage(dtype, count)
        if member is None or member.file_size < found.size:
            raise Bad(f"storage '{key[:40]}' is missing or too short")
        found.member, found.crc = member.header_offset, member.CRC
        if member.file_size != found.size:
            found.crc = 0  # a checksum of more than we read
        return found

    return read(data, 0, _call, _Storages(storage).get)


def _members(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The members by name; InputError for a zip that is none of torch's."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except _BROKEN:
        _damaged(path, f"has {size} bytes")
    if any(m.compress_type != zipfile.ZIP_STORED or m.flag_bits & 1 for m in infos):
        raise InputError(
            f"{path}: a zip with compressed members, which torch.save does not write",
            "load and save it again with torch.save",
        )
    found = {m.filename: m for m in infos}
    if len(found) != len(infos):
        raise Bad("a member stands twice")
    if any(m.header_offset + 30 + m.file_size > size for m in infos):
        raise Bad(f"a member needs more than the {size} bytes of the file")
    return found


def _member(file: io.BufferedIOBase, member: zipfile.ZipInfo) -> bytes:
    file.seek(member.header_offset)
    head = file.read(30)
    file.seek(_data_start(head, 0) + member.header_offset)
    data = file.read(member.file_size)
    if len(data) != member.file_size or (member.CRC and zlib.crc32(data) != member.CRC):
        raise Bad("checksum")
    return data


@dataclass
class _Storages:
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


def _legacy(path: Path) -> Pickled:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        storages = _Storages(lambda key, dtype, count: Storage(dtype, count))
        at = 0
        for expected in (MAGIC, PROTOCOL):
            plain = read(data, at, _no_call, storages.get)
            at = plain.end
            if plain.value != expected:
                raise Beyond("an older torch file")
        machine = read(data, at, _no_call, storages.get)
        if not isinstance(machine.value, dict) or machine.value.get("little_endian") is not True:
            raise Beyond("its numbers are big-endian")
        held = read(data, machine.end, _call, storages.get)
        keys = read(data, held.end, _no_call, storages.get)
        _place(data, keys, storages.known)
        return held


def _place(data: mmap.mmap, keys: Pickled, storages: dict[str, Storage]) -> None:
    """Say of every storage where it begins: they follow one another in the order of the keys."""
    at = keys.end
    if not isinstance(keys.value, list) or set(keys.value) != set(storages):
        raise Bad("its storages are not those of its tensors")
    for key in keys.value:
        storage = storages[key]
        count = int.from_bytes(data[at : at + 8], "little")
        storage.begin, end = at + 8, at + 8 + storage.size
        if count != storage.count or end > len(data):
            raise Bad(f"needs {end} bytes, has {len(data)}")
        at = end


def _no_call(name: str, args: tuple[Any, ...]) -> Any:
    raise Bad(f"a call of {name[:80]} where torch writes plain numbers")


def _call(name: str, args: tuple[Any, ...]) -> Any:
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
    if name not in _SIZES:
        raise Beyond(f"the dtype {name[:40]}")
    found = Stored(storage, name, shape, stride, offset)
    if found.reach and (offset + found.reach) * _SIZES[name] > storage.size:
        raise Bad("a tensor that reaches beyond its storage")
    return found


def _name(dtype: Any) -> str:
    return dtype.name.removeprefix("torch.") if isinstance(dtype, Named) else "unknown"
