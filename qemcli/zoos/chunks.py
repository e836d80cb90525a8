"""One chunk of a zoo, from bytes to a small Arrow file: files with the same header are read
together, so that their statistics are one computation."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qemcli.checkpoints import Checkpoint
from qemcli.errors import InputError, QemError
from qemcli.formats import safetensors
from qemcli.recognition import turns
from qemcli.spaces import WeightSpace
from qemcli.writing import beside
from qemcli.zoos.scan import STATED, Entry, Reader, described, labels
from qemcli.zoos.statistics import describe, fitting

if TYPE_CHECKING:
    import pyarrow

    from qemcli.zoos.zoo import Zoo

KEY = b"qem.part"
SMALL = 8 << 20  # bytes; a larger file is read tensor by tensor
HEADERS = 64 << 20  # characters of lists of tensors that are remembered


@dataclass(frozen=True)
class FileChunk:
    """Some files of a folder."""

    root: str
    entries: tuple[Entry, ...]
    activation: str | None
    heads: int | None = None

    def __len__(self) -> int:
        return len(self.entries)

    def key(self) -> str:
        """What the part is made from: equal keys, equal parts."""
        files = "\n".join([f"{e.file}\t{e.size}\t{e.mtime}" for e in self.entries])
        return f"{self.root}\n{self.activation}\n{self.heads}\n{files}"

    def write(self, file: Path, force: bool = False) -> None:
        """Write the part file, beside and renamed; a whole one that is there stays."""
        if not force and _whole(file):
            return
        loader = _loader(self.root, self.activation, self.heads)
        batch = Batch()
        for entry in self.entries:
            try:
                loader.add(batch, entry)
            except QemError as error:
                path = f"{Path(self.root, entry.file)}: "
                reason = error.message.removeprefix(path)
                batch.failures.append({"checkpoint": entry.file, "reason": reason})
        spaces: dict[str, str] = {}  # of this chunk alone, whatever the process has met before
        for group in batch.groups.values():
            arch = loader.reader.arch(group.space)
            if arch not in spaces:
                spaces[arch] = group.space.unstated().to_json()
        tables = [group.table() for group in batch.groups.values()]
        _save(file, tables, batch.failures, spaces)


@dataclass(frozen=True)
class RowChunk:
    """Some rows of a zoo that has an index; `stamp` is the time of what they were read from."""

    path: str
    start: int
    stop: int
    stamp: int

    def __len__(self) -> int:
        return self.stop - self.start

    def key(self) -> str:
        """As FileChunk.key."""
        return repr(self)

    def write(self, file: Path, force: bool = False) -> None:
        """As FileChunk.write."""
        if not force and _whole(file):
            return
        import pyarrow

        zoo = replace(_zoo(self.path).take(slice(self.start, self.stop)), failures=[])
        tables = []
        for space, flat, positions in zoo.load():
            found = {"place": positions, **describe(space, flat.numpy())}
            known = zoo.index.iloc[positions].drop(columns=["uid", *found], errors="ignore")
            table = pyarrow.Table.from_pandas(known, preserve_index=False)
            for name, values in found.items():
                table = table.append_column(name, _column(values))
            tables.append(table)
        spaces = {arch: space.to_json() for arch, space in zoo.spaces.items()}
        _save(file, tables, list(zoo.failures), spaces, "place")


@lru_cache(maxsize=2)
def _zoo(path: str) -> Zoo:
    from qemcli.zoos.zoo import Zoo

    return Zoo.open(path)


@lru_cache(maxsize=2)
def _loader(root: str, activation: str | None, heads: int | None) -> Loader:
    return Loader(Reader(Path(root), activation, heads))


@dataclass(frozen=True)
class Layout:
    """How the data of files with the same tensors lie: `spans` of float32 in the order of the
    space; None where they cannot be taken as they are."""

    space: WeightSpace
    spans: tuple[slice, ...] | None


class Group:
    """Checkpoints of one layout: what is known of each, its file, and statistics, computed a block
    of rows at a time."""

    def __init__(self, space: WeightSpace) -> None:
        self.space = space
        self.known: list[dict[str, Any]] = []
        self.entries: list[Entry] = []
        self.described: list[dict[str, np.ndarray]] = []
        self.block = np.empty((fitting(space.size), space.size), np.float32)
        self.filled = 0

    def add(self, known: dict[str, Any], entry: Entry, parts: list[np.ndarray]) -> None:
        """`parts`, one after the other, are the weights in the order of the space."""
        np.concatenate(parts, out=self.block[self.filled])
        self.known.append(known)
        self.entries.append(entry)
        self.filled += 1
        if self.filled == len(self.block):
            self._describe()

    def _describe(self) -> None:
        if self.filled:
            self.described.append(describe(self.space, self.block[: self.filled]))
            self.filled = 0

    def table(self) -> pyarrow.Table:
        """The index rows."""
        import pyarrow

        self._describe()
        found = self.described
        described = {n: _column(np.concatenate([f[n] for f in found])) for n in found[0]}
        return pyarrow.table({**self._columns(), **described})

    def _columns(self) -> dict[str, Any]:
        """The index columns that need no weights."""
        import pyarrow

        count, first = len(self.known), self.known[0]
        alike = all(known is first for known in self.known)
        names = dict.fromkeys(first if alike else (n for known in self.known for n in known))
        files = pyarrow.array([entry.file for entry in self.entries])
        found: dict[str, Any] = {"checkpoint": files, "file": files}
        for name in names:
            found[name] = (
                pyarrow.repeat(first[name], count)
                if alike and first[name] is not None
                else _column([known.get(name) for known in self.known])
            )
        return {**found, "mtime": pyarrow.array([entry.mtime for entry in self.entries])}


@dataclass
class Batch:
    """What was read of a chunk so far."""

    groups: dict[int, Group] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)

    def add(
        self, layout: Layout, known: dict[str, Any], entry: Entry, parts: list[np.ndarray]
    ) -> None:
        """`known` are index columns; files with the same header share one dict."""
        group = self.groups.get(id(layout))
        if group is None:
            group = self.groups[id(layout)] = Group(layout.space)
        group.add(known, entry, parts)


@dataclass
class Loader:
    """Reads checkpoints into a batch; a list of tensors that was met before is not parsed again,
    whatever the metadata in front of it say."""

    reader: Reader
    met: dict[Any, tuple[Layout, dict[str, Any]]] = field(default_factory=dict)
    layouts: dict[Any, Layout] = field(default_factory=dict)
    held: int = 0

    def add(self, batch: Batch, entry: Entry) -> None:
        """Read one file whole; raises a QemError where it is no checkpoint."""
        path = f"{self.reader.root}/{entry.file}"
        data = _bytes(path, entry) if entry.size <= SMALL else b""
        start = 8 + int.from_bytes(data[:8], "little")
        if data[8:9] != b"{" or start > len(data):
            return self._add_slowly(batch, entry)
        metadata, tensors = safetensors.split(data[8:start])
        told = tuple(metadata.get(name) for name in STATED) if metadata else ()
        key = (tensors, len(data) - start, told)
        if key not in self.met:
            self._learn(key, data[8:start], len(data), Path(path))
        layout, known = self.met[key]
        if metadata:
            known = {**known, "size": entry.size, **labels(metadata)}
        if layout.spans is None:
            parts = [safetensors.open(Path(path)).row(layout.space)]
        else:
            stored = np.frombuffer(data, "<f4", offset=start)
            parts = [stored[span] for span in layout.spans]
        batch.add(layout, known, entry, parts)

    def _add_slowly(self, batch: Batch, entry: Entry) -> None:
        checkpoint, space = self.reader.open(entry)
        layout = self.layouts.setdefault(("rows", id(space)), Layout(space, None))
        known = described(entry.size, checkpoint, space, self.reader)
        row = checkpoint.row(space)
        batch.add(layout, {**known, **labels(checkpoint.metadata)}, entry, [row])

    def _learn(self, key: Any, raw: bytes, size: int, path: Path) -> None:
        header = safetensors.parse(raw, size, path)
        checkpoint = safetensors.of(path, header)
        space = self.reader.space(checkpoint)
        slots = tuple((n, s.dtype, s.begin - 8 - len(raw)) for n, s in header.slots.items())
        spans = _spans(space, header, 8 + len(raw), checkpoint)
        layout = self.layouts.setdefault((id(space), slots), Layout(space, spans))
        self.held += len(key[0])
        if self.held > HEADERS:
            self.met.clear()
            self.held = len(key[0])
        self.met[key] = (layout, described(size, checkpoint, space, self.reader))


def _bytes(path: str, entry: Entry) -> bytes:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    try:
        data = os.read(file, entry.size + 1)
    except IsADirectoryError:
        return b""  # a checkpoint of several files
    finally:
        os.close(file)
    if len(data) != entry.size:
        raise InputError(f"{path}: changed while it was read")
    return data


def _spans(
    space: WeightSpace, header: safetensors.Header, start: int, checkpoint: Checkpoint
) -> tuple[slice, ...] | None:
    """Where each tensor of the space lies, counted in float32; None where they cannot be taken as
    they are."""
    if checkpoint.folds(space):
        return None
    slots = [header.slots[name] for name in space.names]
    odd = any(s.dtype != "float32" or (s.begin - start) % 4 for s in slots)
    if odd or turns(checkpoint.shapes) or (header.total - start) % 4 or not slots:
        return None
    return tuple(slice((s.begin - start) // 4, (s.end - start) // 4) for s in slots)


def _column(values: Any) -> Any:
    """An Arrow array; strings where the values are of several kinds; statistics in single
    precision."""
    import pyarrow

    if isinstance(values, np.ndarray):
        return pyarrow.array(values.astype(np.float32) if values.dtype == float else values)
    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowException, OverflowError, TypeError):
        return pyarrow.array([None if v is None else str(v) for v in values])


def _whole(file: Path) -> bool:
    from pyarrow import ArrowException, ipc

    try:
        with ipc.open_file(file) as part:
            return KEY in (part.schema.metadata or {})
    except (OSError, ArrowException):
        return False


def _save(
    file: Path,
    tables: list[pyarrow.Table],
    failures: list[dict[str, str]],
    spaces: dict[str, str],
    order: str = "checkpoint",
) -> None:
    import pyarrow
    from pyarrow import ipc

    from qemcli.zoos.merging import aligned

    table = pyarrow.concat_tables(aligned(tables)) if tables else pyarrow.table({"checkpoint": []})
    if len(tables) > 1:
        table = table.sort_by(order)
    if order == "place" and tables:
        table = table.drop_columns([order])
    table = table.replace_schema_metadata(
        {KEY: json.dumps({"failures": failures, "spaces": spaces})}
    )

    def write(path: Path) -> None:
        with ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)

    beside(file, write)
