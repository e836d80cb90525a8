"""The header of a safetensors file, checked more strictly than the library does: duplicate keys,
overlaps, holes, wrong sizes and bombs are refused. Nothing but the header's bytes is asked for, so
it is read over HTTP ranges as well as from a disk.

    8 bytes little-endian N | N bytes JSON {name: {dtype, shape, data_offsets}} | data
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from qemcli.errors import InputError

MAX_HEADER = 100_000_000  # bytes; the library's own limit
MAX_TENSORS = 500_000
MAX_PARTS = 16 * MAX_TENSORS  # commas and brackets: what JSON takes in memory grows with them
_METADATA = b'{"__metadata__":'
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


def read_header(path: Path) -> Header:
    """Read and check the header of a file; InputError says "needs N bytes, has M" where cut."""
    with path.open("rb") as file:

        def read(start: int, count: int) -> bytes:
            file.seek(start)
            return file.read(count)

        return header_of(read, path.stat().st_size, path)


def header_of(
    read: Callable[[int, int], bytes], size: int, where: str | Path, first: int = 8
) -> Header:
    """Read and check the header of what `read(start, count)` gives, `size` bytes in all.

    `first` bytes are asked for at once: where every call is a request, 100 kB hold most headers.
    Raises InputError, which begins with `where`: what is wrong, "needs N bytes, has M" where cut.
    """
    head = read(0, min(first, size))
    length = int.from_bytes(head[:8], "little")
    check_length(where, length, size)
    raw = head[8 : 8 + length]
    if len(raw) < length:
        raw += read(8 + len(raw), length - len(raw))
    if len(raw) != length:
        _refuse(where, f"changed while it was read: {len(raw)} of {length} bytes of its header")
    return parse(raw, size, where)


def check_length(where: str | Path, length: int, size: int) -> None:
    """Refuse a header length that the file cannot hold, before anything is allocated for it."""
    if size < 8:
        _refuse(where, f"empty or cut short (needs at least 10 bytes, has {size})")
    if length > MAX_HEADER:
        _refuse(where, f"a header of {length} bytes is over the limit of {MAX_HEADER}")
    if 8 + length > size:
        _refuse(where, f"cut short in its header: needs {8 + length} bytes, has {size}")


def parse(raw: bytes, size: int, where: str | Path) -> Header:
    """Check the header bytes of a file of `size` bytes."""
    try:
        record = _json(raw)
        metadata = _metadata(record.pop("__metadata__", {}))
        if len(record) > MAX_TENSORS:
            raise _Bad(f"{len(record)} tensors are over the limit of {MAX_TENSORS}")
        slots = {name: _slot(name, entry, 8 + len(raw)) for name, entry in record.items()}
        total = _tile(slots, 8 + len(raw))
    except _Bad as error:
        _refuse(where, str(error))
    if total > size:
        _refuse(where, f"cut short: needs {total} bytes, has {size}")
    if total < size:
        _refuse(where, f"{size - total} bytes too many after its last tensor")
    return Header(slots, metadata, total)


def split(raw: bytes) -> tuple[dict[str, str], str | bytes]:
    """(metadata, what follows them) of a header that begins with them, as the library writes it;
    ({}, the header) of any other. Of headers that end alike only the first has to be parsed."""
    if not raw.startswith(_METADATA):
        return {}, raw
    try:
        text = raw.decode("utf-8")
        found, end = _STRICT.raw_decode(text, len(_METADATA))
        return _metadata(found), text[end:]
    except (ValueError, RecursionError):
        return {}, raw  # `parse` says what is wrong with it


def _refuse(where: str | Path, reason: str) -> NoReturn:
    raise InputError(f"{where}: {reason}", "download or write it again") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        name = Counter(n for n, _ in pairs).most_common(1)[0][0]
        raise _Bad(f"'{name[:80]}' stands twice in the header")
    return found


def _no_constant(text: str) -> NoReturn:
    raise _Bad(f"{text} in the header")


_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _json(raw: bytes) -> dict[str, Any]:
    if raw[:1] != b"{":
        raise _Bad("its header does not begin with '{'")
    parts = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if parts > MAX_PARTS:
        raise _Bad(f"a header of {parts} parts is over the limit of {MAX_PARTS}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Bad(f"its header is not UTF-8 (byte {error.start})") from None
    try:
        return _STRICT.decode(text)
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
