"""A table of labels beside a folder of checkpoints, joined by the checkpoints' paths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from qemcli.errors import UsageError
from qemcli.zoos.scan import LABELS

if TYPE_CHECKING:
    import pandas

NAMES = ("labels.csv", "labels.parquet", "labels.jsonl")
KEYS = ("checkpoint", "path", "file")
# Columns that the weights themselves decide: a table cannot.
OWN = (
    "uid", "arch", "shard", "row", "parameters", "sha256", "coverage", "format", "size", "mtime",
    "finite", "ties",
)  # fmt: skip
PLAIN = (*LABELS, "activation")


@dataclass(frozen=True)
class Labels:
    """The table with the checkpoints' own names as its index, and how many rows met."""

    table: pandas.DataFrame
    report: dict[str, Any]

    def fill(self, index: pandas.DataFrame) -> pandas.DataFrame:
        """The index with the table's columns; a value that the checkpoint itself states gives
        way."""
        found = self.table.reindex(index["checkpoint"])
        found.index = index.index
        for name in found.columns:
            values = found[name].combine_first(index[name]) if name in index else found[name]
            index = index.assign(**{name: values})
        return index


def read(root: Path, names: list[str]) -> Labels | None:
    """labels.csv, .parquet or .jsonl in `root`, for checkpoints of these names; None without one.

    Hyper-parameters get the prefix `config.`. Raises UsageError for a table without a column of
    paths, with a path twice, or with a path that fits two checkpoints.
    """
    file = next((root / name for name in NAMES if (root / name).is_file()), None)
    if file is None:
        return None
    table = _table(file)
    key = next((k for k in KEYS if k in table), None)
    if key is None:
        raise UsageError(f"{file}: no column of paths", f"name one of {', '.join(KEYS)}")
    met = _met(file, names, [path.removeprefix("./") for path in table[key].astype(str)])
    table = table[[c for c in table.columns if c not in KEYS and c not in OWN]]
    plain = {c: c if c in PLAIN or c.startswith("config.") else f"config.{c}" for c in table}
    hit = [name is not None for name in met]
    table = table.rename(columns=plain)[hit]
    table.index = [name for name in met if name is not None]
    report = {
        "file": file.name,
        "joined": len(table),
        "without_label": len(names) - len(table),
        "without_checkpoint": len(met) - len(table),
    }
    return Labels(table, report)


def _table(file: Path) -> pandas.DataFrame:
    import pandas
    import pyarrow

    try:
        if file.suffix == ".csv":
            return pandas.read_csv(file)
        if file.suffix == ".parquet":
            return pandas.read_parquet(file)
        return pandas.read_json(file, lines=True)
    except (ValueError, OSError, pyarrow.ArrowException) as error:
        said = str(error).splitlines()[0][:100]
        raise UsageError(f"{file}: not a readable table ({said})") from None


def _met(file: Path, names: list[str], paths: list[str]) -> list[str | None]:
    """The checkpoint that each path means: its own name, or that without folders or suffix where
    only one has it."""
    aliases: dict[str, str | None] = {}
    for name in names:
        pure = PurePosixPath(name)
        for alias in {str(pure.with_suffix("")), pure.name, pure.stem}:
            aliases[alias] = None if alias in aliases else name
    exact, met = set(names), []
    for path in paths:
        if path not in exact and aliases.get(path, "") is None:
            raise UsageError(f"{file}: '{path}' fits two checkpoints", "give paths from the folder")
        met.append(path if path in exact else aliases.get(path))
    seen: set[str] = set()
    for found in met:
        if found is not None and found in seen:
            raise UsageError(f"{file}: '{found}' stands twice")
        seen.add(found or "")
    return met
