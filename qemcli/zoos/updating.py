"""What an index that is there still says rightly: the rows of files that have not changed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qemcli.zoos.layouts.indexed import read_meta
from qemcli.zoos.merging import ROWS
from qemcli.zoos.scan import Entry
from qemcli.zoos.tables import Labels

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class Told:
    """The table that an index has its labels from: where it lies, its size and time then, the
    columns that it alone gives, and whether it gave values to others too (`mixed`)."""

    file: str
    stamp: tuple[int, int]
    columns: tuple[str, ...]
    mixed: bool

    @classmethod
    def of(
        cls, labels: Labels, folder: Path, schemas: Sequence[pyarrow.Schema], told: Told | None
    ) -> Told:
        """Of the labels of an index in this folder, whose parts have these columns; `told`: of the
        same labels, where some parts have them already."""
        given = set(told.columns) if told else set()
        own = {name for schema in schemas for name in schema.names} - given
        columns = tuple(name for name in map(str, labels.table.columns) if name not in own)
        mixed = bool(told and told.mixed) or len(columns) < len(labels.table.columns)
        return cls(os.path.relpath(labels.file, folder), _stamp(labels.file), columns, mixed)

    def holds(self, folder: Path, table: Path | None) -> bool:
        """True where the table is as it was and no other takes its place."""
        file = folder / self.file
        if table is not None and table.resolve() != file.resolve():
            return False
        return file.is_file() and _stamp(file) == self.stamp

    def record(self) -> dict[str, Any]:
        """As it stands in the index."""
        return asdict(self)


def _stamp(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True)
class Kept:
    """The rows of an index that is there whose files have not changed, read when they are taken;
    `told`: the table of labels whose values they still have."""

    file: Path
    rows: np.ndarray
    schema: pyarrow.Schema
    spaces: dict[str, str]
    told: Told | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def tables(self) -> Iterator[pyarrow.Table]:
        """The rows, a part of the file at a time."""
        import pyarrow
        from pyarrow import parquet

        with parquet.ParquetFile(self.file) as opened:
            start = 0
            for batch in opened.iter_batches(ROWS, columns=self.schema.names):
                stop = start + batch.num_rows
                a, b = np.searchsorted(self.rows, (start, stop))
                yield pyarrow.table(batch).take(self.rows[a:b] - start)
                start = stop


def unchanged(
    file: Path, entries: list[Entry], source: dict[str, Any], table: Path | None = None
) -> tuple[Kept | None, list[Entry]]:
    """(rows of the index that is there for files that have not changed, the other files); all files
    where the index is of another source.

    Labels go with the table that they came from, where that is gone, has changed or gives way to
    `table`: their columns are left out, and where it gave values to the files' own columns too,
    all files are read again.
    """
    import pyarrow
    from pyarrow import parquet

    if not file.is_file():
        return None, entries
    meta = read_meta(file)
    if meta.get("source") != source:
        return None, entries
    told = _told(meta)
    dropped: tuple[str, ...] = ("uid",)
    if told is not None and not told.holds(file.parent, table):
        if told.mixed:
            return None, entries
        dropped, told = (*dropped, *told.columns), None
    kept, left, at = [], [], 0
    for row, old in enumerate(_files_of(file)):
        while at < len(entries) and entries[at].file < old.file:  # both are in order
            left.append(entries[at])
            at += 1
        if at < len(entries) and entries[at] == old:
            kept.append(row)
            at += 1
    schema = parquet.read_schema(file).remove_metadata()
    schema = pyarrow.schema([column for column in schema if column.name not in dropped])
    rows = np.array(kept, dtype=int)
    return Kept(file, rows, schema, meta["spaces"], told), left + entries[at:]


def table_of(index: Path) -> Path | None:
    """The table that the index which is there has its labels from, where both are still there."""
    told = _told(read_meta(index)) if index.is_file() else None
    file = index.parent / told.file if told else None
    return file if file is not None and file.is_file() else None


def _told(meta: dict[str, Any]) -> Told | None:
    """What the index says of its labels, where it does."""
    found = meta.get("labels")
    if found is None:
        return None
    stamp, columns = tuple(found["stamp"]), tuple(found["columns"])
    return Told(found["file"], (stamp[0], stamp[1]), columns, found["mixed"])


def _files_of(index: Path) -> Iterator[Entry]:
    """What an index says of its files, row by row."""
    from pyarrow import parquet

    with parquet.ParquetFile(index) as opened:
        for batch in opened.iter_batches(ROWS, columns=["file", "size", "mtime"]):
            yield from map(Entry, *(column.to_pylist() for column in batch.columns))
