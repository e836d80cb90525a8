"""One chunk of a zoo, from bytes to a small Arrow file: files with the same header are read
together, so that their statistics are one computation."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
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
from qemcli.zoos.scan import Entry, Reader, described, labels
from qemcli.zoos.statistics import describe

if TYPE_CHECKING:
    import pyarrow

    from qemcli.zoos.zoo import Zoo

KEY = b"qem.part"
SMALL = 8 << 20  # bytes; a larger file is read tensor by tensor
BLOCK = 128  # rows of one computation: more do not fit a core's cache
HEADERS = 4096  # headers remembered at a time


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
        spaces = {arch: s.to_json() for arch, s in loader.reader.spaces().items()}
        _save(file, list(batch.tables()), batch.failures, spaces)


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
    space."""

    space: WeightSpace
    spans: tuple[tuple[int, int], ...]


@dataclass
class Group:
    """Checkpoints of one layout: what is known of each, its file, and its data section or row."""

    known: list[dict[str, Any]] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    data: list[Any] = field(default_factory=list)

    def columns(self) -> dict[str, Any]:
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

    groups: dict[int, tuple[Layout, Group]] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)

    def add(self, layout: Layout, known: dict[str, Any], entry: Entry, data: Any) -> None:
        """`known` are index columns; files with the same header share one dict."""
        group = self.groups.setdefault(id(layout), (layout, Group()))[1]
        group.known.append(known)
        group.entries.append(entry)
        group.data.append(data)

    def tables(self) -> Iterator[pyarrow.Table]:
        """One table a layout, statistics included."""
        import pyarrow

        for layout, group in self.groups.values():
            blocks = [group.data[i : i + BLOCK] for i in range(0, len(group.data), BLOCK)]
            found = [describe(layout.space, _flat(layout, block)) for block in blocks]
            described = {n: _column(np.concatenate([f[n] for f in found])) for n in found[0]}
            yield pyarrow.table({**group.columns(), **described})


def _flat(layout: Layout, data: list[Any]) -> np.ndarray:
    """(n, D) float32 of n data sections, or of n rows."""
    if not layout.spans:
        return np.stack(data)
    stored = np.frombuffer(b"".join(data), "<f4").reshape(len(data), -1)
    return np.concatenate([stored[:, a:b] for a, b in layout.spans], axis=1)


@dataclass
class Loader:
    """Reads checkpoints into a batch; a safetensors header that was met before is not parsed
    again."""

    reader: Reader
    met: dict[tuple[bytes, int], tuple[Layout, dict[str, Any]]] = field(default_factory=dict)
    layouts: dict[Any, Layout] = field(default_factory=dict)

    def add(self, batch: Batch, entry: Entry) -> None:
        """Read one file whole; raises a QemError where it is no checkpoint."""
        path = f"{self.reader.root}/{entry.file}"
        data = _bytes(path, entry) if entry.size <= SMALL else b""
        length = int.from_bytes(data[:8], "little")
        if data[8:9] != b"{" or 8 + length > len(data):
            return self._add_slowly(batch, entry)
        key = (data[8 : 8 + length], len(data))
        if key not in self.met:
            self._learn(key, Path(path))
        layout, known = self.met[key]
        if layout.spans:
            batch.add(layout, known, entry, data[8 + length :])
        else:
            batch.add(layout, known, entry, safetensors.open(Path(path)).row(layout.space))

    def _add_slowly(self, batch: Batch, entry: Entry) -> None:
        checkpoint, space = self.reader.open(entry)
        layout = self.layouts.setdefault(("rows", id(space)), Layout(space, ()))
        known = described(entry.size, checkpoint, space, self.reader)
        batch.add(layout, {**known, **labels(checkpoint.metadata)}, entry, checkpoint.row(space))

    def _learn(self, key: tuple[bytes, int], path: Path) -> None:
        header = safetensors.parse(*key, path)
        checkpoint = safetensors.of(path, header)
        space = self.reader.space(checkpoint)
        slots = tuple(header.slots.items())
        spans = _spans(space, header, 8 + len(key[0]), checkpoint)
        layout = self.layouts.setdefault((id(space), slots), Layout(space, spans))
        if len(self.met) >= HEADERS:
            self.met.clear()
        known = described(key[1], checkpoint, space, self.reader)
        self.met[key] = (layout, {**known, **labels(checkpoint.metadata)})


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
) -> tuple[tuple[int, int], ...]:
    """Where each tensor of the space lies, counted in float32; empty where they cannot be taken
    as they are."""
    slots = [header.slots[name] for name in space.names]
    turned = turns(checkpoint.shapes)
    odd = any(s.dtype != "float32" or (s.begin - start) % 4 for s in slots)
    if odd or turned or (header.total - start) % 4:
        return ()
    return tuple(((s.begin - start) // 4, (s.end - start) // 4) for s in slots)


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
