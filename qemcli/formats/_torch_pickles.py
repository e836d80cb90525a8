"""Where the tensors of a torch.save file lie, found without torch and without running anything.

zip:    */data.pkl, */byteorder, */data/<key>     members stored, so that tensors can be mapped
legacy: magic, protocol, machine, object, [keys] as pickles, then for each key: count (8 bytes),
        data
"""

from __future__ import annotations

import io
import mmap
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from struct import error as struct_error
from typing import Any, NoReturn

import numpy as np

from qemcli.errors import InputError
from qemcli.formats._pickle_machine import Bad, Foreign
from qemcli.formats._pickles import Pickled, read
from qemcli.formats._torch_tensors import SIZES, Beyond, Storage, Storages, Stored, call, no_call
from qemcli.formats.safetensors import decode

MAX_PICKLE = 64 << 20  # bytes
SMALL = 8 << 20  # bytes; a larger file is mapped into memory and not read
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
LEGACY = 5  # pickles of a legacy file: magic, protocol, machine, object, keys
# What zipfile and struct raise for archives that are cut, damaged or of a kind not read here.
BROKEN = (zipfile.BadZipFile, ValueError, NotImplementedError, struct_error, EOFError, LookupError)


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
    except Beyond:
        _vet(path, zipped)
        raise
    return Located(found.value, found.calls)


def _vet(path: Path, zipped: bool) -> None:
    """InputError where a pickle in it, read to its end, is none that anybody should read."""
    at = 0
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if zipped:
                read(_member(file, _pickle_of(_members(path))), 0, Foreign, _outside)
                return
            for _ in range(LEGACY):
                at = read(data, at, Foreign, _outside).end
    except Bad as error:
        _damaged(path, str(error))


def _outside(pid: Any) -> Any:
    return None


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
    size = SIZES[tensor.dtype]
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
    first = _pickle_of(members)
    root = first.filename.removesuffix("data.pkl")
    with path.open("rb") as file:
        order = members.get(f"{root}byteorder")
        if order and _member(file, order) != b"little":
            raise Beyond("its numbers are big-endian")
        data = _member(file, first)

    def storage(key: str, dtype: str, count: int) -> Storage:
        member = members.get(f"{root}data/{key}")
        found = Storage(dtype, count)
        if member is None or member.file_size < found.size:
            raise Bad(f"storage '{key[:40]}' is missing or too short")
        found.member, found.crc = member.header_offset, member.CRC
        if member.file_size != found.size:
            found.crc = 0  # a checksum of more than we read
        return found

    return read(data, 0, call, Storages(storage).get)


def _pickle_of(members: Mapping[str, zipfile.ZipInfo]) -> zipfile.ZipInfo:
    pickles = [m for name, m in members.items() if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1 or pickles[0].header_offset != 0:
        raise Bad(f"{len(pickles)} data.pkl, of which one should come first")
    if pickles[0].file_size > MAX_PICKLE:
        raise Bad(f"a pickle of {pickles[0].file_size} bytes is over the limit of {MAX_PICKLE}")
    return pickles[0]


def _members(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The members by name; InputError for a zip that is none of torch's."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (*BROKEN, OSError):
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


def _legacy(path: Path) -> Pickled:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        storages = Storages(lambda key, dtype, count: Storage(dtype, count))
        at = 0
        for expected in (MAGIC, PROTOCOL):
            plain = read(data, at, no_call, storages.get)
            at = plain.end
            if plain.value != expected:
                raise Beyond("an older torch file")
        machine = read(data, at, no_call, storages.get)
        if not isinstance(machine.value, dict) or machine.value.get("little_endian") is not True:
            raise Beyond("its numbers are big-endian")
        held = read(data, machine.end, call, storages.get)
        keys = read(data, held.end, no_call, storages.get)
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
