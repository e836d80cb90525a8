"""Where the weights of a zoo's rows lie: in shards of one tensor, in one file a checkpoint, or in
a matrix.

A source reads rows of an index: `source(space, table) -> ((n, D) float32, {row: reason})`.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from qemcli.checkpoints import FETCH, open_checkpoint
from qemcli.errors import InputError, QemError
from qemcli.formats import safetensors
from qemcli.formats._alike import Alike
from qemcli.hub.fetching import fetch_files, look
from qemcli.hub.reference import Reference
from qemcli.recognition import infer
from qemcli.spaces import Chain, Transformer, WeightSpace
from qemcli.zoos.members import Member, tree

if TYPE_CHECKING:
    import pandas

_PARTS = (".safetensors", ".json")  # what a checkpoint in a directory is read from
AGAIN = "index the zoo again"
ROWS = 256  # of a mapped array at a time: what they hold stays in the cache
MEMBER = ("file", "size", "offset", "packed")  # the columns that say where a member lies
Source: TypeAlias = "Callable[[WeightSpace, pandas.DataFrame], tuple[np.ndarray, dict[int, str]]]"


def arch_id(space: WeightSpace) -> str:
    """Twelve hex digits that name an architecture: sha256 over its ordered (name, shape) list."""
    listed = [[name, list(shape)] for name, shape in space.shapes.items()]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:12]


def arch_key(space: WeightSpace) -> str:
    """The arch id, and four digits more where the network is run in another way than its tensors
    suggest (another w0, stride, ...): two such spaces are not one architecture."""
    if not isinstance(space, Chain):
        stated = json.dumps(space.record(), sort_keys=True)
        return f"{arch_id(space)}-{hashlib.sha256(stated.encode()).hexdigest()[:4]}"
    try:
        usual = infer(space.shapes, {}, space.activation)
    except QemError:
        usual = None
    known = space.forward.known
    if isinstance(usual, Chain) and replace(usual.forward, known=known) == space.forward:
        return arch_id(space)
    stated = json.dumps(asdict(space.forward), sort_keys=True)
    return f"{arch_id(space)}-{hashlib.sha256(stated.encode()).hexdigest()[:4]}"


def open_shard(path: Path) -> tuple[np.ndarray, dict[str, str]]:
    """A shard's (n, D) float32 rows, memory-mapped, and its header's metadata."""
    if not path.is_file():
        raise InputError(f"{path}: the zoo's shard is missing", "fetch or build the zoo again")
    header = safetensors.read_header(path)
    slot = header.slots.get("weights")
    if slot is None or slot.dtype != "float32" or len(slot.shape) != 2:
        raise InputError(f"{path}: a shard holds one float32 tensor 'weights' [n, D]")
    if 0 in slot.shape:
        return np.empty(slot.shape, np.float32), header.metadata
    return np.memmap(path, "<f4", "r", slot.begin, slot.shape), header.metadata


def let_go(array: np.ndarray) -> None:
    """Give back the pages of a mapped file: what was read does not count as this process's memory,
    and stays in the system's cache."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and not array.flags.writeable and hasattr(base, "madvise"):
        base.madvise(mmap.MADV_DONTNEED)


def inside(root: Path, relative: str) -> Path:
    """root/relative; raises InputError where an index points out of its own folder."""
    path = Path(relative)
    if path.is_absolute() or ".." in path.parts:
        raise InputError(f"{root}: its index points out of the zoo ('{relative}')")
    return root / path


def shards(root: Path) -> Source:
    """Rows that lie in shards, by the columns `shard` and `row`; those of a shard that cannot be
    read any more are named."""
    opened = lru_cache(maxsize=64)(lambda path: open_shard(path)[0])

    def read(space: WeightSpace, table: pandas.DataFrame) -> tuple[np.ndarray, dict[int, str]]:
        out = np.full((len(table), space.size), np.nan, np.float32)
        bad: dict[int, str] = {}
        names, rows = table["shard"].to_numpy(dtype=object), table["row"].to_numpy()
        if not all(isinstance(name, str) for name in names) or rows.dtype.kind not in "iu":
            raise InputError(f"{root}: its index has no shard and row of every network", AGAIN)
        for name in dict.fromkeys(names):
            at, path = np.flatnonzero(names == name), inside(root, name)
            try:
                matrix = opened(path)
                out[at] = _rows(path, matrix, rows[at], space.size)
            except QemError as error:
                bad |= dict.fromkeys(at.tolist(), error.message.replace(f"{path}", name, 1))
            else:
                let_go(matrix)
        return out, bad

    return read


def _rows(path: Path, matrix: np.ndarray, rows: np.ndarray, size: int) -> np.ndarray:
    if matrix.shape[1] != size or rows.max() >= len(matrix) or rows.min() < 0:
        raise InputError(
            f"{path}: {matrix.shape} rows and parameters are not those of the index", AGAIN
        )
    return matrix[rows]


def files(root: Path, activation: str | None = None) -> Source:
    """Rows that are files, by the column `file`; those that cannot be read any more are named."""

    def read(space: WeightSpace, table: pandas.DataFrame) -> tuple[np.ndarray, dict[int, str]]:
        out = np.full((len(table), space.size), np.nan, np.float32)
        bad: dict[int, str] = {}
        for i, name in enumerate(table["file"]):
            try:
                out[i] = _row(inside(root, name), space)
            except QemError as error:
                bad[i] = error.message.removeprefix(f"{root / name}: ")
        return out, bad

    return read


def _row(path: Path, space: WeightSpace) -> np.ndarray:
    checkpoint = open_checkpoint(path)
    if not checkpoint.holds(space):
        raise InputError(f"{path}: its tensors are not those of the index", AGAIN)
    return checkpoint.row(space)


def hub(text: str) -> Source:
    """Rows that are files of a repository at one commit, by the column `file`: fetched and checked
    when they are read, and no others."""
    ref = Reference.parse(text)

    def read(space: WeightSpace, table: pandas.DataFrame) -> tuple[np.ndarray, dict[int, str]]:
        copy, wanted = look(ref), set(table["file"])
        inside_of = {
            f: {str(parent) for parent in PurePosixPath(f.path).parents} for f in copy.tree.files
        }
        chosen = [
            f
            for f, parents in inside_of.items()
            if f.path in wanted or (parents & wanted and f.path.endswith(_PARTS))
        ]
        return files(fetch_files(copy, chosen))(space, table)

    return read


def members(root: Path) -> Source:
    """Rows that are torch files below a folder or in an archive, by the columns `file`, `size`,
    `offset` and `packed`; those that cannot be read any more are named."""
    readers: dict[int | None, Alike] = {}

    def read(space: WeightSpace, table: pandas.DataFrame) -> tuple[np.ndarray, dict[int, str]]:
        out = np.full((len(table), space.size), np.nan, np.float32)
        bad: dict[int, str] = {}
        found = tree(root)
        if found is None:
            raise InputError(f"{root}: the archive of this zoo is no tar and no zip", FETCH)
        heads = space.heads[0][0] * space.heads[0][1] if isinstance(space, Transformer) else None
        reader = readers.setdefault(heads, Alike(heads))
        columns = zip(*(table[c].tolist() for c in MEMBER), strict=True)
        for i, (name, size, offset, packed) in enumerate(columns):
            try:
                kind, row = reader.read(found.read(Member(name, size, offset, packed)))
                if kind.space.shapes != space.shapes:
                    raise InputError("its tensors are not those of the zoo's other networks")
                out[i] = row
            except QemError as error:
                bad[i] = error.message
        return out, bad

    return read


def matrix(weights: np.ndarray, order: np.ndarray) -> Source:
    """Rows of one (n, D) array, by the column `row`; `order` (D,) carries them to the space's
    order."""
    straight = bool((np.diff(order) == 1).all())

    def read(space: WeightSpace, table: pandas.DataFrame) -> tuple[np.ndarray, dict[int, str]]:
        rows = table["row"].to_numpy()
        out = np.empty((len(rows), len(order)), np.float32)
        follow = len(rows) > 1 and (np.diff(rows) == 1).all()
        for start in range(0, len(rows), ROWS):
            at = rows[start : start + ROWS]
            some = weights[at[0] : at[-1] + 1] if follow else weights[at]
            into = out[start : start + ROWS]
            if straight and len(order) == some.shape[1]:
                into[...] = some
            elif some.dtype == np.float32:
                np.take(some, order, axis=1, out=into, mode="clip")  # half as fast without clip
            else:
                into[...] = np.take(some, order, axis=1)
        let_go(weights)
        return out, {}

    return read
