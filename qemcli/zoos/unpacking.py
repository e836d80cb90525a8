"""Compressed tars (.tar.gz, .tar.xz, .tar.bz2) have no places that can be read alone: they are
unpacked once, as one plain tar in the user's cache, and read there; nothing is extracted.

The cache is $QEM_CACHE, else qem/ in $XDG_CACHE_HOME or ~/.cache; an archive that has changed is
unpacked again, and what was not used for longest goes when the whole is larger than KEPT.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from qemcli.checkpoints import peek
from qemcli.errors import InputError
from qemcli.writing import beside

_OPEN: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"\xfd7zXZ": lzma.open,
    b"BZh": bz2.open,
}
MAX_RATIO, MAX_FREE = 200, 256 << 20  # an archive may unpack to more only if it packs less well
BLOCK = 1 << 20
MAX_LOOK = 512 << 20  # bytes unpacked for a look at the first names
KEPT = 64 << 30  # bytes of unpacked archives that the cache may hold, the one in use apart
LARGEST_HEAD = 1 << 13  # bytes of a name or of what else a tar says of a member before it
AGAIN = "download it again"
_BROKEN = (OSError, EOFError, lzma.LZMAError, zlib.error, tarfile.TarError, ValueError)


class Head(tarfile.TarInfo):
    """A member's header, for tarfile to make: one that claims to be longer than any name is refused
    before it is read."""

    _LONG = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
             tarfile.GNUTYPE_LONGLINK)  # fmt: skip

    def _proc_member(self, archive: Any) -> Any:  # the way that tarfile leaves for subclasses
        if self.type in self._LONG and self.size > LARGEST_HEAD:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        ordinary: Any = super()
        return ordinary._proc_member(archive)


def packed(path: Path) -> bool:
    """True for a gzip, xz or bzip2 file with a tar inside."""
    return _opener(path) is not None and _tar_inside(path, *_stamp(path))


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _opener(path: Path) -> Callable[..., Any] | None:
    head = peek(path, 8)
    return next((made for magic, made in _OPEN.items() if head.startswith(magic)), None)


@lru_cache(maxsize=64)
def _tar_inside(path: Path, size: int, mtime: int) -> bool:
    try:
        with _stream(path) as stream:
            return stream.read(512)[257:262] == b"ustar"
    except _BROKEN:
        return False


@contextmanager
def _stream(path: Path) -> Iterator[IO[bytes]]:
    opener = _opener(path)
    if opener is None:
        raise InputError(f"{path}: not compressed")
    with opener(path, "rb") as stream:
        yield stream


def first_names(path: Path, count: int) -> list[str]:
    """The names of the first files, by reading no more than their part of the archive."""
    names: list[str] = []
    try:
        with _stream(path) as stream:
            bounded: Any = _Bounded(stream)  # of a file tarfile only reads
            with tarfile.open(fileobj=bounded, mode="r|", tarinfo=Head) as archive:
                while len(names) < count and (info := archive.next()) is not None:
                    if not info.isdir():
                        names.append(info.name.removeprefix("./"))
                    if info.size > MAX_FREE:
                        break  # what comes after it is behind too much to unpack for a look
    except _BROKEN:
        return names  # who reads the archive says what is wrong with it
    return names


class _Bounded:
    """A stream that ends after MAX_LOOK bytes: a header may claim to be as long as it likes, and
    tarfile reads it whole."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.left = stream, MAX_LOOK

    def read(self, size: int, /) -> bytes:
        """The next bytes, none beyond the bound."""
        data = self.stream.read(min(size, self.left))
        self.left -= len(data)
        return data


def unpacked(path: Path) -> Path:
    """The plain tar in the cache, written beside and renamed where it is not there yet.

    Raises InputError where the archive is damaged or a bomb; OSError where the disk is full.
    """
    stamp = f"{path.resolve()}\n{_stamp(path)}"
    name = hashlib.sha256(os.fsencode(stamp)).hexdigest()[:24]
    target = cache() / "archives" / f"{name}.tar"
    if target.is_file():
        with suppress(OSError):  # a cache that is read-only
            os.utime(target)  # the time of its last use
        return target

    def write(plain: Path) -> None:
        with plain.open("wb") as out:
            for block in _blocks(path):
                out.write(block)

    beside(target, write)
    _bound(target)
    return target


def _bound(newest: Path) -> None:
    """Remove what was not used for longest, until the rest and the newest are within KEPT."""
    with suppress(OSError):  # another process is at it
        found = [(f.stat(), f) for f in newest.parent.glob("*.tar") if f != newest]
        left = KEPT - newest.stat().st_size
        for status, file in sorted(found, key=lambda item: -item[0].st_mtime_ns):
            left -= status.st_size
            if left < 0:
                file.unlink()


def cache() -> Path:
    """The folder that qem may fill: what lies there can be made again."""
    stated = os.environ.get("QEM_CACHE")
    if stated:
        return Path(stated)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qem"


def _blocks(path: Path) -> Iterator[bytes]:
    """What the archive unpacks to; InputError where it is damaged or grows beyond all measure."""
    size, made = path.stat().st_size, 0
    with _stream(path) as stream:
        while True:
            try:
                block = stream.read(BLOCK)
            except _BROKEN as error:
                raise InputError(f"{path}: cut short or damaged ({error})", AGAIN) from None
            if not block:
                return
            made += len(block)
            if made > max(MAX_FREE, MAX_RATIO * size):
                raise InputError(f"{path}: unpacks to more than {made} bytes: a bomb", AGAIN)
            yield block
