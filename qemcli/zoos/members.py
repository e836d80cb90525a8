"""Trees of files: a folder, a tar or a zip, listed and read in place; nothing is ever extracted.

An archive is hostile input: names that point out of it, links, devices and members that claim to
be large are failures, named one by one; the rest is read.
"""

from __future__ import annotations

import io
import itertools
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from qemcli.checkpoints import peek
from qemcli.errors import InputError
from qemcli.formats._torch_pickles import BROKEN
from qemcli.zoos import unpacking

LARGEST = 16 << 20  # bytes of a member: an INR has some thousand numbers
AFTER = " ..."  # behind a member's name: what may have come after it, and is lost
DEEPEST = 100  # folders in folders: below, nobody keeps checkpoints
TOO_DEEP = f"more than {DEEPEST} folders deep: not looked into"
RATIO = 200  # a larger member may not unpack to more than so many times its bytes
HEAD = 1 << 16  # bytes searched for the first names of a zip whose directory is lost
AGAIN = "download it again"
_ENCRYPTED, _STORED, _DEFLATED = 1, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


class Member(NamedTuple):
    """A file of a tree: name below the root, bytes, where it lies in the archive (-1 in a folder)
    and the bytes that it takes there; `reason` where it cannot be read."""

    name: str
    size: int
    offset: int = -1
    packed: int = -1
    reason: str | None = None


def repository(root: Path) -> Path:
    """The Hub's cache links from snapshots/ to blobs/ beside it: that is one tree."""
    parents = root.resolve().parents
    return next((p.parent for p in [root.resolve(), *parents] if p.name == "snapshots"), root)


class Folder:
    """The files below a folder; a link that leaves it is not followed."""

    def __init__(self, path: Path, largest: int = LARGEST) -> None:
        self.path, self.largest = path, largest
        self.inside = os.path.realpath(repository(path))

    def members(self) -> Iterator[Member]:
        """Every file, in the order of the names."""
        return self._below(str(self.path), "")

    def _below(self, folder: str, prefix: str) -> Iterator[Member]:
        with os.scandir(folder) as listed:
            items = sorted(listed, key=lambda item: item.name)
        for item in items:
            name = prefix + item.name
            if item.is_dir(follow_symlinks=False):
                if name.count("/") < DEEPEST:
                    yield from self._below(item.path, f"{name}/")
                else:
                    yield Member(name, 0, reason=TOO_DEEP)
                continue
            follow = item.is_symlink() and self._holds(os.path.realpath(item.path))
            status = item.stat(follow_symlinks=follow)
            regular = stat.S_ISREG(status.st_mode)
            reason = _reason(name, status.st_size, regular, self.largest)
            yield Member(name, status.st_size, reason=reason)

    def _holds(self, target: str) -> bool:
        return os.path.commonpath([target, self.inside]) == self.inside and os.path.isfile(target)

    def read(self, member: Member) -> bytes:
        """The file's bytes; InputError where it has changed since it was listed."""
        if _outside(member.name):
            raise InputError("its name points out of the folder")
        try:
            with open(self.path / member.name, "rb") as file:
                data = file.read(member.size + 1)
        except OSError as error:
            raise InputError(str(error.strerror)) from None
        if len(data) != member.size:
            raise InputError("it has changed since it was listed", "index the zoo again")
        return data


class Tar:
    """An uncompressed tar; a member's `offset` is that of its data."""

    def __init__(self, path: Path, largest: int = LARGEST) -> None:
        self.path, self.largest = path, largest

    def members(self) -> Iterator[Member]:
        """Every file, in the order of the archive; a cut is a last member with its `reason`."""
        size, last = self.path.stat().st_size, Member(self.path.name, 0)
        try:
            with tarfile.open(self.path, "r:", tarinfo=unpacking.Head) as archive:
                kept: Any = archive
                while (info := archive.next()) is not None:
                    kept.members.clear()  # else a million headers stay in memory
                    last = _of_tar(info, size, self.largest)
                    if not info.isdir():
                        yield last
        except (tarfile.TarError, *BROKEN, OSError) as error:
            if last.reason is None:  # else it is where the cut lies, and was named
                reason = f"the archive is cut short or damaged after it ({error})"
                yield Member(f"{last.name}{AFTER}", 0, reason=reason)

    def read(self, member: Member) -> bytes:
        """The member's bytes; InputError where the archive has become shorter."""
        return _slice(self.path, member.offset, member.size, self.largest)

    def begin(self, member: Member) -> int:
        """Where the member's bytes lie in the archive."""
        return member.offset


class Zip:
    """A zip, stored or deflated; a member's `offset` is that of its local header."""

    def __init__(self, path: Path, largest: int = LARGEST) -> None:
        self.path, self.largest = path, largest

    def members(self) -> Iterator[Member]:
        """Every file of the directory at the archive's end; InputError where that is missing."""
        infos = _directory(str(self.path), *_stamp(self.path))
        if infos is None:
            raise InputError(
                f"{self.path}: a zip archive that is cut short or damaged: the directory at its "
                f"end is missing ({self.path.stat().st_size} bytes)",
                AGAIN,
            )
        return (_of_zip(info, self.largest) for info in infos if not info.is_dir())

    def read(self, member: Member) -> bytes:
        """The member's bytes, never more than it claims; InputError where they are damaged."""
        begin, method, crc = self._local(member)
        data = _slice(self.path, begin, member.packed, self.largest)
        if method == _DEFLATED:
            unpacker = zlib.decompressobj(-15)
            try:
                data = unpacker.decompress(data, member.size + 1)
            except zlib.error as error:
                raise InputError(f"its bytes in the archive are damaged ({error})", AGAIN) from None
        if len(data) != member.size or (crc and crc != zlib.crc32(data)):
            raise InputError("its bytes in the archive are damaged (checksum)", AGAIN)
        return data

    def begin(self, member: Member) -> int:
        """Where the member's bytes lie in the archive; InputError where they are compressed."""
        begin, method, _ = self._local(member)
        if method != _STORED:
            raise InputError(f"{self.path}: '{member.name}' is compressed", "extract the archive")
        return begin

    def _local(self, member: Member) -> tuple[int, int, int]:
        """(begin of the data, method, checksum) by the member's local header."""
        head = _slice(self.path, member.offset, 30, self.largest)
        magic, _, _, method, _, _, crc, _, _, name, extra = struct.unpack("<4s5H3I2H", head)
        if magic != b"PK\x03\x04" or method not in (_STORED, _DEFLATED):
            raise InputError("the archive has changed since it was listed", "index the zoo again")
        return member.offset + 30 + name + extra, method, crc


Tree: TypeAlias = Folder | Tar | Zip


def tree(path: Path, largest: int = LARGEST) -> Tree | None:
    """What lies at `path`, by its first bytes; None for a file that is no archive. A compressed
    tar is unpacked once, see unpacking.py; members above `largest` bytes are not read."""
    if path.is_dir():
        return Folder(path, largest)
    head = peek(path)
    if head[257:262] == b"ustar":
        return Tar(path, largest)
    if unpacking.packed(path):
        return Tar(unpacking.unpacked(path), largest)
    return Zip(path, largest) if head[:4] in (b"PK\x03\x04", b"PK\x05\x06") else None


def first_names(path: Path, count: int = 256) -> list[str]:
    """The names of the first files, to tell a layout by; those at the head of a broken zip too."""
    if not path.is_dir() and unpacking.packed(path):
        return unpacking.first_names(path, count)
    found = tree(path)
    if found is None:
        return []
    if isinstance(found, Zip) and _directory(str(path), *_stamp(path)) is None:
        return _local_names(path)[:count]
    return [member.name for member in itertools.islice(found.members(), count)]


def _local_names(path: Path) -> list[str]:
    """The names in the local headers at the head of a zip."""
    head, names, at = peek(path, HEAD), [], 0
    while (at := head.find(b"PK\x03\x04", at)) >= 0 and at + 30 <= len(head):
        length = int.from_bytes(head[at + 26 : at + 28], "little")
        names.append(head[at + 30 : at + 30 + length].decode("utf-8", "replace"))
        at += 30
    return names


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=2)
def _directory(path: str, size: int, mtime: int) -> list[zipfile.ZipInfo] | None:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except (*BROKEN, OSError):
        return None


def _outside(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    return name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]


def _reason(name: str, size: int, regular: bool, largest: int) -> str | None:
    """Why such a member is not read, or None."""
    if _outside(name) or "\0" in name:
        return "its name points out of the archive"
    if not regular:
        return "not a regular file (a link, pipe or device), which is not followed"
    if size > largest:
        return f"claims {size} bytes: too large (at most {largest} are read)"
    return None


def _of_tar(info: tarfile.TarInfo, total: int, largest: int) -> Member:
    name = info.name.removeprefix("./")
    reason = _reason(name, info.size, info.isreg() and not info.issparse(), largest)
    if reason is None and info.offset_data + info.size > total:
        reason = "the archive is cut short within it"
    return Member(name, info.size, info.offset_data, info.size, reason)


def _of_zip(info: zipfile.ZipInfo, largest: int) -> Member:
    kind = info.external_attr >> 16
    regular = not stat.S_IFMT(kind) or stat.S_ISREG(kind)
    reason = _reason(info.filename, info.file_size, regular, largest)
    if reason is None and info.flag_bits & _ENCRYPTED:
        reason = "it is encrypted"
    if reason is None and info.compress_type not in (_STORED, _DEFLATED):
        reason = f"compressed by a method that qem does not read ({info.compress_type})"
    if reason is None and info.compress_size > largest:
        reason = f"takes {info.compress_size} bytes: too large"
    if reason is None and info.file_size > max(LARGEST, RATIO * info.compress_size):
        reason = f"unpacks to {info.file_size} bytes from {info.compress_size}: a zip bomb"
    return Member(info.filename, info.file_size, info.header_offset, info.compress_size, reason)


def _slice(path: Path, offset: int, size: int, largest: int) -> bytes:
    """Bytes of a file; InputError where it has fewer."""
    if not 0 <= size <= largest or offset < 0:
        raise InputError("its place in the archive is not sound", "index the zoo again")
    try:
        with io.FileIO(path) as file:
            data = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise InputError(str(error.strerror)) from None
    if len(data) != size:
        raise InputError("the archive is cut short within it", AGAIN)
    return data
