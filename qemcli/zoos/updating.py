"""What an index that is there still says rightly: the rows of files that have not changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qemcli.zoos.layouts.indexed import read_meta
from qemcli.zoos.merging import ROWS
from qemcli.zoos.scan import Entry

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class Kept:
    """The rows of an index that is there whose files have not changed, read when they are taken."""

    file: Path
    rows: np.ndarray
    schema: pyarrow.Schema
    spaces: dict[str, str]

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
    file: Path, entries: list[Entry], source: dict[str, Any]
) -> tuple[Kept | None, list[Entry]]:
    """(rows of the index that is there for files that have not changed, the other files); all files
    where the index is of another source."""
    import pyarrow
    from pyarrow import parquet

    if not file.is_file():
        return None, entries
    meta = read_meta(file)
    if meta.get("source") != source:
        return None, entries
    kept, left, at = [], [], 0
    for row, old in enumerate(_files_of(file)):
        while at < len(entries) and entries[at].file < old.file:  # both are in order
            left.append(entries[at])
            at += 1
        if at < len(entries) and entries[at] == old:
            kept.append(row)
            at += 1
    schema = parquet.read_schema(file).remove_metadata()
    schema = pyarrow.schema([column for column in schema if column.name != "uid"])
    return Kept(file, np.array(kept, dtype=int), schema, meta["spaces"]), left + entries[at:]


def _files_of(index: Path) -> Iterator[Entry]:
    """What an index says of its files, row by row."""
    from pyarrow import parquet

    with parquet.ParquetFile(index) as opened:
        for batch in opened.iter_batches(ROWS, columns=["file", "size", "mtime"]):
            yield from map(Entry, *(column.to_pylist() for column in batch.columns))
