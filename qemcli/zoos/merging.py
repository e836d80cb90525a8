"""The parts of an index become one parquet file, a part at a time: memory does not grow with the
zoo."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemcli.writing import beside
from qemcli.zoos.tables import Labels

if TYPE_CHECKING:
    import pyarrow

ROWS = 16_384  # of a row group
FIRST = (
    "uid", "checkpoint", "arch", "shard", "row", "file", "run", "step", "final", "split",
    "activation", "finite", "parameters", "coverage", "ties",
)  # fmt: skip


def aligned(tables: Iterable[pyarrow.Table]) -> list[pyarrow.Table]:
    """The tables with the same columns of the same types, absent values null."""
    listed = list(tables)
    schema = unified([table.schema for table in listed])
    return [fitted(table, schema) for table in listed]


def unified(schemas: list[pyarrow.Schema]) -> pyarrow.Schema:
    """All columns, in the order of the index; numbers of several kinds become float64, anything
    else of several kinds strings."""
    import pyarrow

    kinds: dict[str, set[Any]] = {}
    for schema in schemas:
        for column in schema:
            kinds.setdefault(column.name, set()).add(column.type)
    return pyarrow.schema([(name, _common(kinds[name])) for name in _sorted(kinds)])


def _sorted(names: Collection[str]) -> list[str]:
    rank = {name: i for i, name in enumerate(FIRST)}
    statistics = [n for n in names if n.startswith("stat.")]  # last, in the network's order
    others = [n for n in names if not n.startswith("stat.")]
    return sorted(others, key=lambda n: (rank.get(n, len(FIRST)), n)) + statistics


def _common(kinds: set[Any]) -> Any:
    import pyarrow
    from pyarrow import types

    known = [kind for kind in kinds if not types.is_null(kind)]
    if len(known) < 2:
        return known[0] if known else pyarrow.null()
    if all(types.is_integer(kind) for kind in known):
        return pyarrow.int64()
    if all(types.is_integer(kind) or types.is_floating(kind) for kind in known):
        return pyarrow.float64()
    return pyarrow.string()


def fitted(table: pyarrow.Table, schema: pyarrow.Schema) -> pyarrow.Table:
    """The table with exactly the columns of the schema."""
    import pyarrow

    columns = []
    known = set(table.column_names)
    for column in schema:
        if column.name in known:
            found = table[column.name]
            same = found.type == column.type
            columns.append(found if same else found.cast(column.type, safe=False))
        else:
            columns.append(pyarrow.nulls(table.num_rows, column.type))
    return pyarrow.table(columns, schema=schema)


@dataclass
class Merge:
    """Writes index.parquet and counts what goes through."""

    count: int = 0
    finite: int = 0
    labelled: int = 0
    archs: dict[str, int] = field(default_factory=dict)
    activations: dict[str, int] = field(default_factory=dict)

    def write(
        self,
        target: Path,
        parts: Iterable[pyarrow.Table],
        schemas: list[pyarrow.Schema],
        labels: Labels | None,
        stated: dict[bytes, str],
    ) -> None:
        """Write the rows of all parts, numbered from 0; beside the target and renamed."""
        import pyarrow
        from pyarrow import parquet

        names = unified(schemas)
        schema = unified([pyarrow.schema([("uid", pyarrow.int64())]), names, *_extra(labels)])
        schema = schema.with_metadata(stated)

        def write(path: Path) -> None:
            with parquet.ParquetWriter(
                path, schema, compression="zstd", use_dictionary=_repeated(schema)
            ) as writer:
                for group in _grouped(self._numbered(parts, names, labels), schema):
                    writer.write_table(group)

        beside(target, write)

    def _numbered(
        self, parts: Iterable[pyarrow.Table], schema: pyarrow.Schema, labels: Labels | None
    ) -> Iterator[pyarrow.Table]:
        import pyarrow

        for part in parts:
            if not part.num_rows:
                continue
            table = fitted(part, schema)
            if labels is not None:
                frame = labels.fill(table.to_pandas())
                table = pyarrow.Table.from_pandas(frame, preserve_index=False)
            numbers = pyarrow.array(range(self.count, self.count + table.num_rows))
            self._counted(table)
            yield table.add_column(0, "uid", numbers)

    def _counted(self, table: pyarrow.Table) -> None:
        from pyarrow import compute

        self.count += table.num_rows
        self.finite += compute.sum(table["finite"]).as_py() or 0
        for name, into in (("arch", self.archs), ("activation", self.activations)):
            if name in table.column_names:
                for pair in table[name].value_counts().to_pylist():
                    key = pair["values"] or "unknown"
                    into[key] = into.get(key, 0) + pair["counts"]
        label = next((n for n in ("test_accuracy", "label") if n in table.column_names), None)
        if label:
            self.labelled += table.num_rows - table[label].null_count


def interleaved(
    first: Iterable[pyarrow.Table], then: Iterable[pyarrow.Table]
) -> Iterator[pyarrow.Table]:
    """Two streams of tables, each in the order of its checkpoints, as one: what is held at a time
    are two tables, however long the streams are."""
    import pyarrow

    streams = [(table for table in tables if table.num_rows) for tables in (first, then)]
    held: list[Any] = [next(stream, None) for stream in streams]
    while None not in held:
        cut = min(table["checkpoint"][-1].as_py() for table in held)
        parts = []
        for i, table in enumerate(held):
            until = _until(table, cut)
            parts.append(table.slice(0, until))
            rest = table.slice(until)
            held[i] = rest if rest.num_rows else next(streams[i], None)
        yield pyarrow.concat_tables(aligned(parts)).sort_by("checkpoint")
    for table, stream in zip(held, streams, strict=True):
        if table is not None:
            yield table
        yield from stream


def _until(table: pyarrow.Table, name: str) -> int:
    """How many rows have a checkpoint up to this name."""
    from pyarrow import compute

    return compute.sum(compute.less_equal(table["checkpoint"], name)).as_py() or 0


def _grouped(tables: Iterable[pyarrow.Table], schema: pyarrow.Schema) -> Iterator[pyarrow.Table]:
    """Tables of about ROWS rows, with the columns of the schema."""
    import pyarrow

    waiting: list[pyarrow.Table] = []
    for table in tables:
        waiting.append(fitted(table, schema))
        if sum(t.num_rows for t in waiting) >= ROWS:
            yield pyarrow.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pyarrow.concat_tables(waiting)


def _repeated(schema: pyarrow.Schema) -> list[str]:
    """The columns where a dictionary saves space: words that come again."""
    unique = ("checkpoint", "file", "sha256")
    strings = [c.name for c in schema if str(c.type) in ("string", "large_string")]
    return [name for name in strings if name not in unique]


def _extra(labels: Labels | None) -> list[pyarrow.Schema]:
    import pyarrow

    if labels is None:
        return []
    return [pyarrow.Schema.from_pandas(labels.table, preserve_index=False)]


def read_part(file: Path) -> tuple[pyarrow.Schema, dict[str, Any]]:
    """(columns, {"failures", "spaces"}) of a part, from its footer alone."""
    from pyarrow import ipc

    from qemcli.zoos.chunks import KEY

    with ipc.open_file(file) as part:
        schema = part.schema
    return schema.remove_metadata(), json.loads(schema.metadata[KEY])


def read_rows(file: Path) -> pyarrow.Table:
    """The rows of a part."""
    from pyarrow import ipc

    with ipc.open_file(file) as part:
        return part.read_all().replace_schema_metadata(None)
