"""Many small torch.save files from their bytes: those with the same pickle are parsed once.

What a pickle says of a file depends on nothing but the pickle. The first file of a kind is opened
by the ordinary door (weights_only=True and nothing else); then once more with its storages holding
their own positions 0, 1, 2, ... , which tells where each number of the weight space lies in all
files of that kind. The others are a checksum and one gather: about ten times as fast.
"""

from __future__ import annotations

import io
import re
import tempfile
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qemcli.checkpoints import open_checkpoint
from qemcli.errors import InputError, QemError
from qemcli.formats._torch_pickles import BROKEN
from qemcli.spaces import WeightSpace

EXACT = 1 << 24  # integers that float32 holds
KINDS = 4096  # pickles remembered at a time
_STORAGE = re.compile(r"[^/]+/data/(\d+)")


@dataclass(frozen=True)
class Kind:
    """What files with one pickle share: weight space, metadata, and where the numbers lie (None:
    each file takes the ordinary door)."""

    space: WeightSpace
    metadata: dict[str, Any]
    order: np.ndarray | None = None


@dataclass(frozen=True)
class _Parts:
    """A torch file taken apart: its pickle, its storages, and the names they have in the zip."""

    pickle: bytes
    storages: tuple[bytes, ...]
    names: tuple[str, ...]

    @property
    def key(self) -> Any:
        return self.pickle, self.names, tuple(map(len, self.storages))

    def numbers(self) -> np.ndarray:
        """Everything in the storages, one after the other, as float32."""
        return np.frombuffer(b"".join(self.storages), "<f4")

    def numbered(self) -> bytes | None:
        """The same file with position i in place of number i; None where float32 cannot hold it."""
        if any(len(s) % 4 for s in self.storages) or sum(map(len, self.storages)) > 4 * EXACT:
            return None
        left = np.arange(len(self.numbers()), dtype="<f4").tobytes()
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("archive/data.pkl", self.pickle)
            for name, storage in zip(self.names, self.storages, strict=True):
                archive.writestr(f"archive/data/{name}", left[: len(storage)])
                left = left[len(storage) :]
            archive.writestr("archive/version", b"3\n")
        return out.getvalue()


@dataclass
class Alike:
    """Reads checkpoints from bytes and remembers every kind it has met; `heads` is what the files
    of transformers do not say."""

    heads: int | None = None
    met: dict[Any, Kind] = field(default_factory=dict)

    def read(self, data: bytes) -> tuple[Kind, np.ndarray]:
        """(kind, (D,) float32 in the order of its space); InputError where it is no checkpoint."""
        parts = _parts(data)
        if parts is None:
            return _opened(data, self.heads)
        kind = self.met.get(parts.key)
        if kind is None:
            if len(self.met) >= KINDS:
                self.met.clear()
            kind = self.met.setdefault(parts.key, _learn(data, parts, self.heads))
        if kind.order is None:
            return _opened(data, self.heads)
        return kind, parts.numbers()[kind.order]


def _learn(data: bytes, parts: _Parts, heads: int | None) -> Kind:
    kind, row = _opened(data, heads)
    numbered = parts.numbered()
    if numbered is None:
        return kind
    try:
        order = _opened(numbered, heads)[1].astype(np.int64)
        found = parts.numbers()[order]
    except (QemError, IndexError, ValueError):
        return kind
    same = found.tobytes() == row.tobytes()
    return Kind(kind.space, kind.metadata, order) if same else kind


def _opened(data: bytes, heads: int | None) -> tuple[Kind, np.ndarray]:
    """By the ordinary door, which reads files: a temporary one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint")
        path.write_bytes(data)
        try:
            checkpoint = open_checkpoint(path)
            space = checkpoint.space(heads=heads)
            return Kind(space, dict(checkpoint.metadata)), checkpoint.row(space)
        except QemError as error:
            raise type(error)(error.message.removeprefix(f"{path}: "), error.hint) from None


def _parts(data: bytes) -> _Parts | None:
    """The file taken apart; None where it is not plain enough for that. InputError where a
    checksum says that it is damaged, which torch.load does not look at."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
    except BROKEN:
        return None
    held = {info.filename: _bytes(data, info) for info in infos}
    pickles = [name for name in held if name.endswith("/data.pkl")]
    whole = len(held) == len(infos) and None not in held.values()
    if not whole or len(pickles) != 1:
        return None
    root = pickles[0].removesuffix("data.pkl")
    if held.get(f"{root}byteorder", b"little") != b"little":
        return None
    found = [m[1] for name in held if (m := _STORAGE.fullmatch(name))]
    names = tuple(sorted(found, key=int))
    storages = tuple(held.get(f"{root}data/{name}") or b"" for name in names)
    return _Parts(held[pickles[0]] or b"", storages, names)


def _bytes(data: bytes, info: zipfile.ZipInfo) -> bytes | None:
    at = info.header_offset
    if info.compress_type != zipfile.ZIP_STORED or data[at : at + 4] != b"PK\x03\x04":
        return None
    lengths = data[at + 26 : at + 30]
    start = at + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    found = data[start : start + info.file_size]
    if len(found) != info.file_size:
        return None
    if info.CRC and zlib.crc32(found) != info.CRC:  # 0: torch was told to leave them out
        raise InputError("a torch file that is damaged (checksum)", "download or write it again")
    return found
