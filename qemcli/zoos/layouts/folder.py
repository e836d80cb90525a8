"""A folder of checkpoints, or one checkpoint: any format, any tree, a table of labels beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemcli.errors import InputError
from qemcli.zoos import sources, tables
from qemcli.zoos.scan import Entry, Reader, listing, scan
from qemcli.zoos.zoo import Zoo

if TYPE_CHECKING:
    import pandas

WIDTHS = {"uid": "int64", "parameters": "int32"}


def sniff(path: Path) -> bool:
    """Any folder, any file: what it is not, its reader says."""
    return True


def open(path: Path, activation: str | None = None, statistics: bool = False) -> Zoo:
    """The zoo of a folder, by headers; what cannot be read is in `failures`.

    Raises InputError where not one checkpoint can be read.
    """
    single = not path.is_dir()
    root = path.parent if single else path
    reader = Reader(root, activation)
    if single:
        return _single(path, reader)
    found = listing(root)
    rows: list[dict[str, Any]] = []
    failures = list(found.failures)
    for row in scan(found.entries, reader):
        (failures if "reason" in row else rows).append(row)
    failures.sort(key=lambda item: item["checkpoint"])
    if not rows:
        raise nothing(path, failures, found.ignored)
    index = table(rows)
    labels = tables.read(root, index["checkpoint"].tolist())
    record: dict[str, Any] = {"name": path.resolve().name, "ignored": found.ignored}
    if labels:
        index, record["labels"] = labels.fill(index), labels.report
    return Zoo(index, reader.spaces(), sources.files(root), path, "folder", record, failures)


def _single(path: Path, reader: Reader) -> Zoo:
    from qemcli.checkpoints import open_checkpoint

    checkpoint = open_checkpoint(path)
    checkpoint.space(reader.activation)  # raises with the path, where scan would only note it
    status = path.stat()
    rows = list(scan([Entry(path.name, status.st_size, status.st_mtime_ns)], reader))
    record = {"name": path.stem}
    return Zoo(table(rows), reader.spaces(), sources.files(path.parent), path, "single", record)


def nothing(path: Path, failures: list[dict[str, str]], ignored: int) -> InputError:
    """That a folder holds no usable checkpoint, and why."""
    if failures:
        first = failures[0]
        return InputError(
            f"{path}: none of its {len(failures)} checkpoints can be read; "
            f"the first: {first['checkpoint']}: {first['reason']}"
        )
    return InputError(
        f"{path}: no checkpoint in it ({ignored} other files)",
        "it reads .safetensors, .pt, .pth, .bin, .ckpt and .npz",
    )


def table(rows: list[dict[str, Any]]) -> pandas.DataFrame:
    """Index rows as a table, sorted by checkpoint, with `uid` in front."""
    import pandas

    index = pandas.DataFrame(rows).sort_values("checkpoint", ignore_index=True)
    index.insert(0, "uid", range(len(index)))
    return index.astype({k: v for k, v in WIDTHS.items() if k in index})
