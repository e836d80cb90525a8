"""Indexing: one parquet row a checkpoint, in chunks that are written as they are done.

A chunk is an Arrow file in OUT/.index.parts, named by what it was made from: a run that was cut
off finds its chunks again. At the end they become index.parquet, written beside and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemcli import __version__
from qemcli.errors import InputError, UsageError
from qemcli.processes import spread
from qemcli.zoos import tables
from qemcli.zoos.alone import alone
from qemcli.zoos.chunks import FileChunk, RowChunk
from qemcli.zoos.layouts.folder import nothing
from qemcli.zoos.layouts.indexed import INDEX, KEY, VERSION, origin
from qemcli.zoos.merging import Merge, interleaved, read_part, read_rows
from qemcli.zoos.resolve import locate
from qemcli.zoos.scan import Entry, listing
from qemcli.zoos.updating import Kept, Told, table_of, unchanged
from qemcli.zoos.zoo import Zoo, layout_of

if TYPE_CHECKING:
    import pyarrow

CHUNK_ROWS, CHUNK_BYTES = 1000, 64 << 20
PARTS = ".index.parts"
Chunk = FileChunk | RowChunk


@dataclass
class Plan:
    """What is to be done: chunks, the names of all checkpoints, what is known without reading."""

    root: Path
    folder: Path
    source: dict[str, Any]
    chunks: list[Chunk]
    total: int
    names: tuple[str, ...] = ()
    ignored: int = 0
    failures: tuple[dict[str, str], ...] = ()
    kept: Kept | None = None
    left_out: tuple[dict[str, Any], ...] = ()
    labels: Path | None = None

    def summary(self) -> dict[str, Any]:
        """What a dry run says."""
        return {
            "index": str(self.folder / INDEX),
            "checkpoints": self.total,
            "to_read": sum(len(chunk) for chunk in self.chunks),
            "ignored": self.ignored,
        }


def index(
    zoo: str | Path | Plan,
    workers: int = 1,
    advance: Callable[[int], None] = lambda n: None,
    strict: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Write OUT/index.parquet and return the summary, its `failed` list included.

    `zoo` is a plan, or what `planned` takes, with its options; `workers` 0 is one process a core.
    Raises InputError where nothing can be read, or with `strict` where anything cannot.
    """
    plan = zoo if isinstance(zoo, Plan) else planned(zoo, strict=strict, **options)
    with _alone(plan.folder) as parts:
        written = list(_written(plan, parts, workers, advance))
        summary = _merged(plan, written, strict)
        shutil.rmtree(parts, ignore_errors=True)
    return summary


def planned(
    zoo: str | Path,
    out: str | Path | None = None,
    update: bool = False,
    activation: str | None = None,
    strict: bool = False,
    heads: int | None = None,
    labels: str | Path | None = None,
) -> Plan:
    """What indexing a zoo into OUT (the zoo's own folder) will do; nothing is written.

    `update` takes the rows of files whose size and time are unchanged from the index that is
    there; `heads` is the transformers', where no config.json says it; `labels` is a table of them,
    else that in the zoo. Raises UsageError where OUT is no folder or the table is none, InputError
    where there is nothing to index.
    """
    path = locate(zoo)
    folder = Path(out) if out is not None else (path if path.is_dir() else path.parent)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder}: not a folder")
    if labels is not None and not Path(labels).is_file():
        raise UsageError(f"--labels {labels}: no such file")
    table = Path(labels) if labels is not None else table_of(folder / INDEX) if update else None
    plan = _plan(path, folder, update, activation, heads, table)
    if table is not None:
        plan.labels = table
        plan.names = plan.names or tuple(Zoo.open(path).index["checkpoint"])
    if strict:
        _stop(plan.failures)
    return plan


def _stop(failures: Sequence[dict[str, str]]) -> None:
    for item in failures[:1]:
        raise InputError(f"{item['checkpoint']}: {item['reason']}", "leave out --strict to go on")


@contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """The folder of parts, held by this process alone; an earlier run's chunks may be in it."""
    parts = folder / PARTS
    with alone(folder):
        for half in folder.glob(f".{INDEX}.*.tmp"):
            half.unlink(missing_ok=True)
        parts.mkdir(exist_ok=True)
        try:
            yield parts
        finally:
            with suppress(OSError):
                parts.rmdir()  # stays where finished chunks wait for the next run


def _plan(
    path: Path,
    folder: Path,
    update: bool,
    activation: str | None,
    heads: int | None,
    labels: Path | None,
) -> Plan:
    if layout_of(path) != "folder" and not _of_files(path):
        return _plan_rows(path, folder)
    root = path if path.is_dir() else path.parent
    found = listing(root)
    if not path.is_dir():
        found.entries = [e for e in found.entries if e.file == path.name]
        found.failures = [f for f in found.failures if f["checkpoint"] == path.name]
    if not found.entries:
        raise nothing(path, found.failures, found.ignored)
    source: dict[str, Any] = {
        "layout": "folder", "path": os.path.relpath(root, folder), "activation": activation
    }  # fmt: skip
    source |= {"heads": heads} if heads is not None else {}
    kept, left = None, found.entries
    if update:
        table = labels or tables.beside(root)
        kept, left = unchanged(folder / INDEX, found.entries, source, table)
    chunks: list[Chunk] = [FileChunk(str(root), tuple(c), activation, heads) for c in _cut(left)]
    names = tuple(entry.file for entry in found.entries)
    return Plan(
        root, folder, source, chunks, len(names), names, found.ignored, tuple(found.failures), kept
    )


def _of_files(path: Path) -> bool:
    """An index that we wrote into a folder of checkpoints: the files are the zoo, not the index."""
    if not (path / INDEX).is_file():
        return False
    from pyarrow import ArrowException, parquet

    try:
        meta = parquet.read_schema(path / INDEX).metadata or {}
        source = json.loads(meta[KEY])["source"]
    except (ArrowException, OSError, KeyError, ValueError, TypeError):
        return not (path / "zoo.json").exists()
    return isinstance(source, dict) and source.get("layout") == "folder"


def _plan_rows(path: Path, folder: Path) -> Plan:
    zoo = Zoo.open(path)
    layout, root = (zoo.layout, path) if zoo.layout != "indexed" else origin(path)
    source = {"layout": layout, "path": os.path.relpath(root, folder)}
    largest = max((space.size for space in zoo.spaces.values()), default=1)
    count = min(CHUNK_ROWS, max(1, CHUNK_BYTES // (4 * largest)))
    starts = range(0, len(zoo), count)
    stamp = (path / INDEX if (path / INDEX).is_file() else path).stat().st_mtime_ns
    chunks: list[Chunk] = [RowChunk(str(path), s, min(s + count, len(zoo)), stamp) for s in starts]
    failed, left_out = tuple(zoo.failures), tuple(zoo.record.get("left_out", ()))
    return Plan(path, folder, source, chunks, len(zoo), failures=failed, left_out=left_out)


def _cut(entries: list[Entry]) -> Iterator[list[Entry]]:
    """Chunks of at most CHUNK_ROWS files and about CHUNK_BYTES bytes."""
    chunk: list[Entry] = []
    size = 0
    for entry in entries:
        if chunk and (len(chunk) == CHUNK_ROWS or size + entry.size > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(entry)
        size += entry.size
    if chunk:
        yield chunk


def _written(
    plan: Plan, parts: Path, workers: int, advance: Callable[[int], None]
) -> Iterator[Path]:
    """The part file of every chunk, in order; those that are there already are not made again."""
    if plan.kept:
        advance(len(plan.kept))
    todo = [(chunk, parts / f"{_digest(chunk)}.arrow") for chunk in plan.chunks]
    if (workers or os.cpu_count() or 1) == 1 or len(todo) < 2:
        for chunk, file in todo:
            chunk.write(file)
            advance(len(chunk))
            yield file
        return
    for i in spread(_write, todo, workers or os.cpu_count() or 1):
        advance(len(todo[i][0]))
    yield from (file for _, file in todo)


def _write(chunk: Chunk, file: Path) -> None:
    chunk.write(file)


def _digest(chunk: Chunk) -> str:
    return hashlib.sha256(f"{__version__}{VERSION}{chunk.key()}".encode()).hexdigest()[:24]


def _merged(plan: Plan, parts: list[Path], strict: bool) -> dict[str, Any]:
    """Carry all parts over into index.parquet, one row group a part; returns the summary."""
    target = plan.folder / INDEX
    failures, schemas = list(plan.failures), []
    spaces: dict[str, str] = {}
    for file in parts:
        schema, meta = read_part(file)
        failures += meta["failures"]
        for arch, space in meta["spaces"].items():
            spaces.setdefault(arch, space)
        schemas.append(schema)
    failures.sort(key=lambda item: item["checkpoint"])
    if strict:
        _stop(failures)
    rows: Iterable[pyarrow.Table] = map(read_rows, parts)
    told = None
    if plan.kept:
        spaces, told = {**plan.kept.spaces, **spaces}, plan.kept.told
        schemas.append(plan.kept.schema)
        rows = interleaved(plan.kept.tables(), rows)
    if plan.total == len(failures) - len(plan.failures):
        raise nothing(plan.root, failures, plan.ignored)
    labels = labels_of(plan, failures)
    merge = Merge()
    stated: dict[str, Any] = {"version": VERSION, "spaces": spaces, "source": plan.source}
    if labels is not None:
        told = Told.of(labels, plan.folder, schemas, told)
    stated |= {"labels": told.record()} if told else {}
    merge.write(target, rows, schemas, labels, {KEY: json.dumps(stated)})
    return {
        "index": str(target),
        "checkpoints": merge.count,
        "finite": merge.finite,
        "labelled": merge.labelled,
        "architectures": merge.archs,
        "activations": merge.activations,
        **_only_listed(spaces, merge.archs),
        "ignored": plan.ignored,
        **({"labels": labels.report} if labels else {}),
        **({"left_out": list(plan.left_out)} if plan.left_out else {}),
        "failed": failures,
    }


def _only_listed(spaces: dict[str, str], counts: dict[str, int]) -> dict[str, dict[str, int]]:
    """Why networks are listed without being understood, and how many for each reason."""
    reasons: dict[str, int] = {}
    for arch, count in counts.items():
        record = json.loads(spaces[arch])
        if record.get("kind") == "opaque":
            reasons[record["reason"]] = reasons.get(record["reason"], 0) + count
    return {"only_listed": reasons} if reasons else {}


def labels_of(plan: Plan, failures: list[dict[str, str]]) -> tables.Labels | None:
    """The table of labels that was given, or lies in a folder of checkpoints, for those that could
    be read."""
    if plan.labels is None and plan.source["layout"] != "folder":
        return None
    bad = {item["checkpoint"] for item in failures}
    names = [name for name in plan.names if name not in bad]
    return tables.read(plan.root, names, plan.labels) if names else None
