"""safetensors, by a strict header reader of our own: duplicate keys, overlaps, holes and wrong
sizes are refused, and nothing but the header is read until weights are asked for.

    8 bytes little-endian N | N bytes JSON {name: {dtype, shape, data_offsets}} | data
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from qemcli.checkpoints import FLOATS, Checkpoint, identify, is_pickle, peek
from qemcli.errors import InputError

MAX_HEADER = 100_000_000  # bytes; the library's own limit
MAX_TENSORS = 500_000
_DTYPES = {  # name in the file -> (torch's name, bits)
    "F64": ("float64", 64), "F32": ("float32", 32), "F16": ("float16", 16),
    "BF16": ("bfloat16", 16), "F8_E4M3": ("float8_e4m3fn", 8), "F8_E5M2": ("float8_e5m2", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8), "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8), "F6_E2M3": ("float6_e2m3", 6),
    "F6_E3M2": ("float6_e3m2", 6), "F4": ("float4_e2m1", 4), "C64": ("complex64", 64),
    "BOOL": ("bool", 8), "I8": ("int8", 8), "I16": ("int16", 16), "I32": ("int32", 32),
    "I64": ("int64", 64), "U8": ("uint8", 8), "U16": ("uint16", 16), "U32": ("uint32", 32),
    "U64": ("uint64", 64),
}  # fmt: skip


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies: `begin` and `end` count bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A header that was checked: its tensors in file order, its metadata, the size it implies."""

    slots: dict[str, Slot]
    metadata: dict[str, str]
    total: int


class _Bad(ValueError):
    """What is wrong with a header."""


def sniff(path: Path) -> bool:
    """A length, then `{`; or the suffix, and nothing else that is known by its first bytes."""
    head = peek(path)
    length = int.from_bytes(head[:8], "little")
    if len(head) > 8 and head[8:9] == b"{" and length <= MAX_HEADER:
        return True
    if not path.name.endswith(".safetensors") or is_pickle(head):
        return False
    what, _ = identify(head)
    return what.startswith(("no format", "empty or cut"))


def open(path: Path) -> Checkpoint:
    """The checkpoint, header only; raises InputError that names what is wrong with it."""
    return of(path, read_header(path))


def of(path: Path, header: Header) -> Checkpoint:
    """The checkpoint of a header that was checked."""
    return Checkpoint(
        path,
        "safetensors",
        {n: s.shape for n, s in header.slots.items()},
        {n: s.dtype for n, s in header.slots.items()},
        header.metadata,
        lambda names: _read(path, header, names),
        ordered=False,
    )


def read_header(path: Path) -> Header:
    """Read and check the header of a file; InputError says "needs N bytes, has M" where cut."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        check_length(path, length, size)
        raw = file.read(length)
    return parse(raw, size, path)


def check_length(path: Path, length: int, size: int) -> None:
    """Refuse a header length that the file cannot hold, before anything is allocated for it."""
    if size < 8:
        _refuse(path, f"empty or cut short (needs at least 10 bytes, has {size})")
    if length > MAX_HEADER:
        _refuse(path, f"a header of {length} bytes is over the limit of {MAX_HEADER}")
    if 8 + length > size:
        _refuse(path, f"cut short in its header: needs {8 + length} bytes, has {size}")


def parse(raw: bytes, size: int, path: Path) -> Header:
    """Check the header bytes of a file of `size` bytes."""
    try:
        record = _json(raw)
        metadata = _metadata(record.pop("__metadata__", {}))
        if len(record) > MAX_TENSORS:
            raise _Bad(f"{len(record)} tensors are over the limit of {MAX_TENSORS}")
        slots = {name: _slot(name, entry, 8 + len(raw)) for name, entry in record.items()}
        total = _tile(slots, 8 + len(raw))
    except _Bad as error:
        _refuse(path, str(error))
    if total > size:
        _refuse(path, f"cut short: needs {total} bytes, has {size}")
    if total < size:
        _refuse(path, f"{size - total} bytes too many after its last tensor")
    return Header(slots, metadata, total)


def _refuse(path: Path, reason: str) -> NoReturn:
    raise InputError(f"{path}: {reason}", "download or write it again") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        name = next(n for n, _ in pairs if n in seen or seen.add(n))  # type: ignore[func-returns-value]
        raise _Bad(f"'{name[:80]}' stands twice in the header")
    return found


def _no_constant(text: str) -> NoReturn:
    raise _Bad(f"{text} in the header")


def _json(raw: bytes) -> dict[str, Any]:
    if raw[:1] != b"{":
        raise _Bad("its header does not begin with '{'")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Bad(f"its header is not UTF-8 (byte {error.start})") from None
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except _Bad:
        raise
    except (ValueError, RecursionError) as error:
        raise _Bad(f"its header is not JSON ({str(error)[:80]})") from None


def _metadata(found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or any(not isinstance(v, str) for v in found.values()):
        raise _Bad("its metadata are not strings")
    return found


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**48 for v in values)


def _slot(name: str, entry: Any, start: int) -> Slot:
    shown = name[:80]
    if "\0" in name:
        raise _Bad(f"a NUL byte in the tensor name {shown!r}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _Bad(f"tensor '{shown}' needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _Bad(f"tensor '{shown}' has the unknown dtype {str(dtype)[:20]!r}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or len(shape) > 64:
        raise _Bad(f"tensor '{shown}' has a shape or offsets that are no counts")
    known, bits = _DTYPES[dtype]
    needed = bits
    for n in shape:
        needed *= n
        if needed >= 2**63:
            raise _Bad(f"tensor '{shown}' is too large")
    begin, end = offsets
    if needed % 8 or end - begin != needed // 8:
        raise _Bad(f"tensor '{shown}' needs {needed / 8:g} bytes, its offsets say {end - begin}")
    return Slot(known, tuple(shape), start + begin, start + end)


def _tile(slots: dict[str, Slot], start: int) -> int:
    """The end of the data; raises where tensors overlap or leave a hole."""
    at = start
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].begin, item[1].end)):
        if slot.begin != at:
            kind = "overlaps the one before it" if slot.begin < at else "leaves a hole before it"
            raise _Bad(f"tensor '{name[:80]}' {kind}")
        at = slot.end
    return at


def _read(path: Path, header: Header, names: Iterable[str]) -> dict[str, np.ndarray]:
    found = {}
    with path.open("rb") as file:
        for name in names:
            slot = header.slots[name]
            file.seek(slot.begin)
            raw = file.read(slot.end - slot.begin)
            if len(raw) != slot.end - slot.begin:
                _refuse(path, f"changed while it was read: tensor '{name}' is cut short")
            found[name] = decode(raw, slot.dtype).reshape(slot.shape)
    return found


def decode(raw: bytes | np.ndarray, dtype: str) -> np.ndarray:
    """Little-endian bytes of a float dtype -> float32, or float64 for float64; one dimension."""
    if dtype not in FLOATS:
        raise InputError(f"unsupported dtype {dtype}")
    if dtype in ("float32", "float64", "float16"):
        stored = np.frombuffer(raw, np.dtype(dtype).newbyteorder("<"))
        return stored.astype(np.float32) if dtype == "float16" else stored
    if dtype == "bfloat16":  # the upper half of a float32
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype == "float8_e5m2":  # the upper half of a float16
        return (np.frombuffer(raw, np.uint8).astype(np.uint16) << 8).view(np.float16).astype("f4")
    return _e4m3()[np.frombuffer(raw, np.uint8)]


def _e4m3() -> np.ndarray:
    """The 256 values of float8 e4m3fn: 4 bits of exponent (bias 7), 3 of mantissa, no infinity."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    value = np.where(exponent > 0, normal, np.ldexp(mantissa / 8, -6))
    value[(code & 127) == 127] = np.nan
    return np.where(code < 128, value, -value).astype(np.float32)
