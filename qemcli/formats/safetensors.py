"""safetensors, by the strict header reader beside this file: nothing but the header is read until
weights are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from qemcli.checkpoints import FLOATS, Checkpoint, identify, is_pickle, peek
from qemcli.errors import InputError
from qemcli.formats._safetensors_header import MAX_HEADER, Header, parse, read_header, split

__all__ = ["Header", "decode", "of", "open", "parse", "read_header", "sniff", "split"]


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


def _read(path: Path, header: Header, names: Iterable[str]) -> dict[str, np.ndarray]:
    found = {}
    with path.open("rb") as file:
        for name in names:
            slot = header.slots[name]
            file.seek(slot.begin)
            raw = file.read(slot.end - slot.begin)
            if len(raw) != slot.end - slot.begin:
                raise InputError(
                    f"{path}: changed while it was read: tensor '{name}' is cut short",
                    "download or write it again",
                )
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
