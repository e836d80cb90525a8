"""The parts of an index become one parquet file, a part at a time: memory does not grow with the
zoo."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemcli.zoos.tables import Labels

if TYPE_CHECKING:
    import pyarrow

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


def _sorted(names: Iterable[str]) -> list[str]:
    rank = {name: i for i, name in enumerate(FIRST)}
    listed = list(names)  # stable: as met, statistics last
    return sorted(listed, key=lambda n: (n.startswith("stat."), rank.get(n, len(FIRST))))


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
    for column in schema:
        if column.name in table.column_names:
            columns.append(table[column.name].cast(column.type, safe=False))
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
        beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with parquet.ParquetWriter(beside, schema, compression="zstd") as writer:
                for table in self._numbered(parts, names, labels):
                    writer.write_table(fitted(table, schema))
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)

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
        if "test_accuracy" in table.column_names:
            self.labelled += table.num_rows - table["test_accuracy"].null_count


def _extra(labels: Labels | None) -> list[pyarrow.Schema]:
    import pyarrow

    if labels is None:
        return []
    return [pyarrow.Schema.from_pandas(labels.table, preserve_index=False)]


def read_part(file: Path) -> tuple[pyarrow.Schema, dict[str, Any]]:
    """(columns, {"failures", "spaces"}) of a part, from its footer alone."""
    from pyarrow import parquet

    from qemcli.zoos.chunks import KEY

    schema = parquet.read_schema(file)
    return schema.remove_metadata(), json.loads(schema.metadata[KEY])
