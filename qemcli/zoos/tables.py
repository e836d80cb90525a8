"""A table of labels beside a folder of checkpoints, joined by the checkpoints' paths."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

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


def join(index: pandas.DataFrame, root: Path) -> tuple[pandas.DataFrame, dict[str, Any] | None]:
    """(index with the table's columns, how many rows met) of labels.* in `root`; None where there
    is no table.

    Hyper-parameters get the prefix `config.`. Raises UsageError for a table without a column of
    paths, with a path twice, or with a path that fits two checkpoints.
    """
    file = next((root / name for name in NAMES if (root / name).is_file()), None)
    if file is None or not len(index):
        return index, None
    table = _read(file)
    key = next((k for k in KEYS if k in table), None)
    if key is None:
        raise UsageError(f"{file}: no column of paths", f"name one of {', '.join(KEYS)}")
    at = _positions(file, index, table[key].astype(str).tolist())
    hit = at >= 0
    for column in [c for c in table.columns if c not in KEYS and c not in OWN]:
        name = column if column in PLAIN or column.startswith("config.") else f"config.{column}"
        index = index.assign(**{name: _filled(index, name, table[column][hit], at[hit])})
    joined = int(hit.sum())
    return index, {
        "file": file.name,
        "joined": joined,
        "without_label": len(index) - joined,
        "without_checkpoint": len(table) - joined,
    }


def _read(file: Path) -> pandas.DataFrame:
    import pandas
    import pyarrow

    readers = {
        ".csv": pandas.read_csv,
        ".parquet": pandas.read_parquet,
        ".jsonl": lambda f: pandas.read_json(f, lines=True),
    }
    try:
        return readers[file.suffix](file)
    except (ValueError, OSError, pyarrow.ArrowException) as error:
        said = str(error).splitlines()[0][:100]
        raise UsageError(f"{file}: not a readable table ({said})") from None


def _positions(file: Path, index: pandas.DataFrame, paths: list[str]) -> np.ndarray:
    """(rows of the table,) position in the index that each names, -1 for none."""
    known: dict[str, int] = {}
    for position, name in enumerate(index["checkpoint"]):
        pure = PurePosixPath(name)
        for alias in {name, str(pure.with_suffix("")), pure.name, pure.stem}:
            known[alias] = -2 if alias in known and alias != name else position
    exact = {name: i for i, name in enumerate(index["checkpoint"])}
    found = np.array(
        [exact.get(p, known.get(p, -1)) for p in (x.removeprefix("./") for x in paths)], dtype=int
    )
    for path, position in zip(paths, found, strict=True):
        if position == -2:
            raise UsageError(f"{file}: '{path}' fits two checkpoints", "give paths from the folder")
    hits = found[found >= 0]
    if len(set(hits.tolist())) != len(hits):
        twice = next(
            p for p, at in zip(paths, found, strict=True) if (found == at).sum() > 1 <= at + 1
        )
        raise UsageError(f"{file}: '{twice}' stands twice")
    return found


def _filled(index: pandas.DataFrame, name: str, values: Any, at: np.ndarray) -> pandas.Series:
    """The column with the table's values where it has some."""
    import pandas

    placed = pandas.Series(values.to_numpy(), index=at).reindex(range(len(index)))
    placed.index = index.index
    return placed.combine_first(index[name]) if name in index else placed
