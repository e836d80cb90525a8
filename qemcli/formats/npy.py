"""NumPy's .npz (one array a tensor) and .npy (one array), never with pickled objects."""

from __future__ import annotations

import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy_format

from qemcli.checkpoints import FLOATS, Checkpoint, peek
from qemcli.errors import InputError

MAX_RATIO, MAX_FREE = 100, 1 << 28  # a member may be larger than this only if it packs less well
_ERRORS = (
    ValueError, OSError, EOFError, SyntaxError, RecursionError, MemoryError, KeyError, TypeError,
    NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error, tokenize.TokenError, Warning,
)  # fmt: skip


def sniff(path: Path) -> bool:
    """npy's magic, or a zip whose first member is an npy file."""
    head = peek(path)
    if head.startswith(b"PK\x03\x04"):
        length = int.from_bytes(head[26:28], "little")
        return head[30 : 30 + length].endswith(b".npy")
    return head.startswith(b"\x93NUMPY")


def open(path: Path) -> Checkpoint:
    """The checkpoint, headers only; raises InputError for objects and damaged files."""
    single = peek(path).startswith(b"\x93NUMPY")
    try:
        headers = {"array": _npy(path)} if single else _npz(path)
    except _ERRORS as error:
        raise _refusal(path, error) from None
    for name, (_, dtype) in headers.items():
        if dtype.hasobject:
            raise InputError(
                f"{path}: '{name}' holds pickled Python objects and is not opened",
                "save arrays of numbers",
            )
    return Checkpoint(
        path,
        "npy",
        {n: shape for n, (shape, _) in headers.items()},
        {n: dtype.name for n, (_, dtype) in headers.items()},
        {},
        lambda names: _read(path, single, names),
    )


def _refusal(path: Path, error: BaseException) -> InputError:
    said = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
    return InputError(f"{path}: cut short or damaged ({said})", "download or write it again")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # headers that need repair are old or hostile
        version = npy_format.read_magic(file)
        if version == (1, 0):
            shape, _, dtype = npy_format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, _, dtype = npy_format.read_array_header_2_0(file)
        else:
            raise ValueError(f"npy version {version}")
    if any(n < 0 or n >= 2**48 for n in shape):
        raise ValueError(f"the shape {shape}")
    return shape, dtype


def _fits(shape: tuple[int, ...], dtype: np.dtype, start: int, size: int) -> None:
    needed = dtype.itemsize
    for n in shape:
        needed *= n
    if not dtype.hasobject and start + needed != size:
        raise ValueError(f"needs {start + needed} bytes, has {size}")


def _npy(path: Path) -> tuple[tuple[int, ...], np.dtype]:
    with path.open("rb") as file:
        shape, dtype = _header(file)
        _fits(shape, dtype, file.tell(), path.stat().st_size)
    return shape, dtype


def _npz(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    found = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name in found:
                raise ValueError(f"'{name}' stands twice")
            large = member.file_size > MAX_FREE
            if large and member.file_size > MAX_RATIO * max(member.compress_size, 1):
                raise ValueError(f"'{name}' unpacks to {member.file_size} bytes: a zip bomb")
            with archive.open(member) as file:
                shape, dtype = _header(file)
                _fits(shape, dtype, file.tell(), member.file_size)
            found[name] = (shape, dtype)
    return found


def _read(path: Path, single: bool, names: Iterable[str]) -> dict[str, np.ndarray]:
    try:
        if single:
            return {n: _float(np.load(path, allow_pickle=False)) for n in names}
        with np.load(path, allow_pickle=False) as archive:
            return {n: _float(archive[n]) for n in names}
    except _ERRORS as error:
        raise _refusal(path, error) from None


def _float(array: np.ndarray) -> np.ndarray:
    if array.dtype.name not in FLOATS:
        raise ValueError(f"unsupported dtype {array.dtype}")
    return array if array.dtype.name == "float64" else array.astype(np.float32)
