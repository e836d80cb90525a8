"""A table of labels beside a zoo, or exported from a tracker: joined to checkpoints by their paths,
or by the run that they belong to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from qemcli.errors import UsageError
from qemcli.zoos.exports import flat, renamed

if TYPE_CHECKING:
    import pandas

NAMES = ("labels.csv", "labels.parquet", "labels.jsonl")
KEYS = ("checkpoint", "path", "file", "ckpt_file", "checkpoint_path", "filename")
RUNS = (
    "run_id", "Run ID", "run", "ID", "id", "run_name", "Name", "name", "tags.mlflow.runName",
    "trial_id",
)  # fmt: skip
STEPS = ("step", "_step", "epoch", "ckpt_epoch", "iteration", "training_iteration", "global_step")
SCORES = ("test_accuracy", "val_accuracy", "train_accuracy", "test_loss", "label")
LISTED = 100  # names of each kind that a report holds
# Columns that the weights themselves decide: a table cannot.
OWN = (
    "uid", "arch", "shard", "row", "parameters", "sha256", "coverage", "format", "size", "mtime",
    "finite", "ties",
)  # fmt: skip


@dataclass(frozen=True)
class Labels:
    """The table with the checkpoints' own names as its index, and how many rows met."""

    table: pandas.DataFrame
    report: dict[str, Any]
    file: Path

    def fill(self, index: pandas.DataFrame) -> pandas.DataFrame:
        """The index with the table's columns; a value that the checkpoint itself states gives
        way."""
        found = self.table.reindex(index["checkpoint"])
        found.index = index.index
        for name in found.columns:
            values = found[name].combine_first(index[name]) if name in index else found[name]
            index = index.assign(**{name: values})
        return index


def read(root: Path, names: list[str], file: Path | None = None) -> Labels | None:
    """The labels of checkpoints with these names: `file`, else labels.csv, .parquet or .jsonl in
    `root`; None without one.

    Rows are met by a column of paths, else of run ids, which are parts of the paths; hyper-
    parameters get the prefix `config.`. Raises UsageError for a table without either, with a path
    twice, or with a path that fits two checkpoints.
    """
    file = file or beside(root)
    if file is None:
        return None
    table = flat(_table(file))
    by, met = _join(file, table, names, root)
    rows = [row for row in met if row is not None]
    joined = [name for name, row in zip(names, met, strict=True) if row is not None]
    unused = sorted(set(range(len(table))) - set(rows))
    key = table[by].astype(str)
    report = {
        "file": file.name,
        "by": by,
        "joined": len(joined),
        "without_label": len(names) - len(joined),
        "without_checkpoint": len(unused),
        **_few("checkpoints_without_label", [n for n, r in zip(names, met, strict=True)
                                             if r is None]),
        **_few("rows_without_checkpoint", key.iloc[unused].tolist()),
    }  # fmt: skip
    kept = [c for c in table.columns if c not in KEYS and c not in OWN and c != by]
    table = table[kept].iloc[rows]
    table.columns = renamed(kept)
    report["labels"] = [name for name in table.columns if name in SCORES]
    report["columns"] = [str(name) for name in kept[:LISTED]]
    table.index = joined
    return Labels(table, report, file)


def beside(root: Path) -> Path | None:
    """The table of labels that lies in a folder of checkpoints, where one does."""
    return next((root / name for name in NAMES if (root / name).is_file()), None)


def _few(what: str, names: list[str]) -> dict[str, list[str]]:
    return {what: names[:LISTED]} if names else {}


def _table(file: Path) -> pandas.DataFrame:
    import pandas
    import pyarrow

    try:
        if file.suffix in (".csv", ".tsv", ".gz"):
            return pandas.read_csv(file, sep="\t" if ".tsv" in file.name else ",")
        if file.suffix == ".parquet":
            return pandas.read_parquet(file)
        if file.suffix == ".json":
            return pandas.read_json(file)
        return pandas.read_json(file, lines=True)
    except (ValueError, OSError, EOFError, AttributeError, pyarrow.ArrowException) as error:
        said = str(error).splitlines()[0][:100]
        raise UsageError(f"{file}: not a readable table ({said})") from None


def _join(
    file: Path, table: pandas.DataFrame, names: list[str], root: Path
) -> tuple[str, list[int | None]]:
    """(column, row of the table for every checkpoint or None) by paths, else by runs."""
    paths = [k for k in KEYS if k in table]
    runs = [k for k in RUNS if k in table]
    if not paths and not runs:
        raise UsageError(
            f"{file}: no column of paths or runs",
            f"name one of {', '.join(KEYS)}, or {', '.join(RUNS[:3])}",
        )
    best: tuple[str, list[int | None]] | None = None
    for by, met in ((k, _by_path) for k in paths):
        found = met(file, names, table[by].astype(str).tolist(), root)
        best = best or (by, found)
        if any(row is not None for row in found):
            return by, found
    for by in runs:
        found = _by_run(file, names, table, by)
        best = best or (by, found)
        if any(row is not None for row in found):
            return by, found
    return best or (runs[0], [None] * len(names))


def _by_path(file: Path, names: list[str], paths: list[str], root: Path) -> list[int | None]:
    """A path means the checkpoint of that name below the root, or the only one of that name
    without folders or without suffix."""
    aliases: dict[str, str | None] = {}
    for name in names:
        pure = PurePosixPath(name)
        for alias in {str(pure.with_suffix("")), pure.name, pure.stem}:
            aliases[alias] = None if alias in aliases else name
    rows: dict[str, int] = {}
    exact = set(names)
    for i, path in enumerate(paths):
        found = _meant(path, exact, aliases, root)
        if found is None and aliases.get(path.removeprefix("./"), "") is None:
            raise UsageError(f"{file}: '{path}' fits two checkpoints", "give paths from the folder")
        if found in rows:
            raise UsageError(f"{file}: '{found}' stands twice")
        if found is not None:
            rows[found] = i
    return [rows.get(name) for name in names]


def _meant(path: str, exact: set[str], aliases: Mapping[str, str | None], root: Path) -> str | None:
    """The path as it stands, or what follows the root's own name in it."""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    starts = [0, *(i + 1 for i, part in enumerate(parts) if part == root.resolve().name)]
    for start in starts:
        tail = "/".join(parts[start:])
        found = tail if tail in exact else aliases.get(tail)
        if found is not None:
            return found
    return None


def _by_run(file: Path, names: list[str], table: pandas.DataFrame, by: str) -> list[int | None]:
    """A run's row is that of all checkpoints with its id in their paths; where a run has several
    rows, of those whose number is the row's step."""
    ids = table[by].astype(str).tolist()
    twice = next((run for run, count in Counter(ids).items() if count > 1), None)
    column = next((c for c in STEPS if c in table), None) if twice is not None else None
    if twice is not None and column is None:
        raise UsageError(
            f"{file}: the run '{twice}' stands twice, and no column says the step",
            f"name it one of {', '.join(STEPS[:3])}",
        )
    steps = _whole(table[column].tolist()) if column else [None] * len(ids)
    rows = {key: i for i, key in enumerate(zip(ids, steps, strict=True))}
    known = set(ids)
    return [_row(name, known, rows, column is not None) for name in names]


def _whole(values: Sequence[Any]) -> list[int | None]:
    """Steps as integers; None for what is no number, as `best`."""
    texts = [str(value).removesuffix(".0") for value in values]
    return [int(text) if re.fullmatch(r"\d{1,15}", text) else None for text in texts]


def _row(
    name: str, known: set[str], rows: Mapping[tuple[str, int | None], int], stepped: bool
) -> int | None:
    """The row of the checkpoint: the last part of its path that is a run's id decides."""
    parts = PurePosixPath(name).parts
    for i in range(len(parts) - 1, -1, -1):
        for word in _words(parts[i]):
            if word in known:
                step = _number(parts[i:], word) if stepped else None
                return rows.get((word, step))
    return None


def _words(part: str) -> list[str]:
    """A part of a path as a run's id: itself, without suffix, and what stands last or first in
    run-20250102_030405-abc123 or abc123_50."""
    stem = PurePosixPath(part).stem
    return list(dict.fromkeys([part, stem, stem.rpartition("-")[2], stem.partition("_")[0]]))


def _number(parts: Sequence[str], run: str) -> int | None:
    """The number that a path below its run ends with: the step of the checkpoint."""
    for part in reversed(parts):
        found = re.findall(r"\d+", PurePosixPath(part.replace(run, "")).stem)
        if found:
            return int(found[-1])
    return None
