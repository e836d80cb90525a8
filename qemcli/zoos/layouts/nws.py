"""NWS (Eilertsen et al. 2020, arXiv:2002.05688), byte for byte, at index level: runs of raw float64
snapshots, from a folder or an archive.

<run>/weights/001.bin .. 020.bin hold every variable of a network, convolutions and dense layers
output first, in the order in which TensorFlow made them; <run>/error.bin is float64 [n, 5]: step,
train, validation and test error in percent, smoothed validation error. Snapshot m is that of row
round((m - 1) (n - 1) / 19). Tables (nws_*_train.csv, ..._test.csv) hold the settings and the parts.
Every network has batch normalisation and no file says its shapes, so that rows are listed,
by their number of parameters, and not claimed.
"""

from __future__ import annotations

import io
import re
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from qemcli.errors import InputError, QemError
from qemcli.spaces import WeightSpace, opaque
from qemcli.zoos.layouts import _runs
from qemcli.zoos.members import LARGEST, Member, first_names
from qemcli.zoos.networks import Networks
from qemcli.zoos.zoo import Zoo

NAME = re.compile(r"(?:^|/)([^/]+)/weights/(\d{3})\.bin$")
TABLE = re.compile(r"(?:^|/)nws_\w*?(train|test)\.csv$")
SNAPSHOTS, COLUMNS = 20, 5
REASON = "batch normalisation, and no file says the shapes of its tensors"
CODES = {
    "optimizer": ("adam", "rmsprop", "momentum"),
    "activation": ("relu", "elu", "sigmoid", "tanh"),
    "initialization": ("constant", "normal", "glorot_uniform", "glorot_normal"),
}  # fmt: skip


def sniff(path: Path) -> bool:
    """A folder or an archive with snapshots of such names."""
    return any(NAME.search(name) for name in first_names(path))


def open(path: Path, activation: str | None = None, statistics: bool = False) -> Zoo:
    """The zoo, one row a snapshot; InputError where there is none."""
    runs = _runs.find(path, lambda name: NAME.search(name) is not None, _left_out)
    settings = _settings(runs)
    errors: dict[str, np.ndarray | None] = {}
    spaces: dict[int, WeightSpace] = {}
    rows: dict[str, dict[str, Any]] = {}
    known: dict[str, WeightSpace] = {}
    for name, member in list(runs.checkpoints.items()):
        found = NAME.search(name)
        if found is None or member.size % 8 or not member.size:
            runs.fail(name, f"{member.size} bytes are no float64 numbers")
            continue
        run, snapshot = str(PurePosixPath(name).parent.parent), int(found[2])
        if run not in errors:
            errors[run] = _errors(runs, f"{run}/error.bin")
        count = member.size // 8
        known[name] = spaces.setdefault(count, opaque({"weights": (count,)}, REASON))
        told = settings.get(run.rpartition("/")[2], {})
        expected = told.get("config.weightn_conv", 0) + told.get("config.weightn_fc", 0)
        if expected and expected != count:
            runs.fail(name, f"{count} numbers, the table says {expected:g}")
            known.pop(name)
            continue
        rows[name] = {
            "run": found[1], "step": snapshot, "final": snapshot == SNAPSHOTS,
            **_scores(errors[run], snapshot), **told,
        }  # fmt: skip
    about = {"paper": "arXiv:2002.05688", "splits": "as published: the tables' names"}
    zoo = _runs.opened(runs, "nws", rows, known, about)
    return Zoo(
        zoo.index.drop(columns="activation"), zoo.spaces, source(path), path, "nws", zoo.record,
        zoo.failures,
    )  # fmt: skip


def source(root: Path) -> Any:
    """Rows that are raw float64 numbers, read as float32."""

    def read(space: WeightSpace, table: Any) -> tuple[np.ndarray, dict[int, str]]:
        reader = Networks.of(root)
        out = np.full((len(table), space.size), np.nan, np.float32)
        bad: dict[int, str] = {}
        columns = zip(*(table[c].tolist() for c in ("file", "size", "begins", "packed")),
                      strict=True)  # fmt: skip
        for i, (name, size, begins, packed) in enumerate(columns):
            try:
                raw = reader.tree.read(Member(name, size, begins, packed))
                with np.errstate(over="ignore"):
                    out[i] = np.frombuffer(raw, "<f8")
            except (QemError, ValueError) as error:
                bad[i] = str(error)
        return out, bad

    return read


def _left_out(name: str) -> str | None:
    wanted = TABLE.search(name) or name.endswith("/error.bin")
    return None if wanted else _runs.OTHER


def _errors(runs: _runs.Runs, name: str) -> np.ndarray | None:
    """(n, 5) of a run; None where it is not there or is damaged."""
    member = runs.texts.get(name)
    if member is None or member.reason is not None or member.size > LARGEST:
        return None
    try:
        raw = runs.reader.tree.read(member)
    except QemError:
        return None
    whole = len(raw) and len(raw) % (8 * COLUMNS) == 0
    return np.frombuffer(raw, "<f8").reshape(-1, COLUMNS) if whole else None


def _scores(errors: np.ndarray | None, snapshot: int) -> dict[str, float]:
    """Accuracies, of errors in percent."""
    if errors is None or not 1 <= snapshot <= SNAPSHOTS:
        return {}
    row = errors[round((snapshot - 1) * (len(errors) - 1) / (SNAPSHOTS - 1))]
    names = ("train_accuracy", "val_accuracy", "test_accuracy")
    return {name: float(1 - value / 100) for name, value in zip(names, row[1:4], strict=True)}


def _settings(runs: _runs.Runs) -> dict[str, dict[str, Any]]:
    """Run -> split and settings, by the tables in the tree; codes as words."""
    import pandas

    found: dict[str, dict[str, Any]] = {}
    for name in sorted(runs.texts):
        part = TABLE.search(name)
        if part is None:
            continue
        try:
            table = pandas.read_csv(io.StringIO(runs.text(name) or ""), skipinitialspace=True)
        except ValueError as error:
            raise InputError(f"{runs.path}: '{name}' is no table ({error})") from None
        if "path" not in table:
            raise InputError(f"{runs.path}: '{name}' has no column 'path'")
        for row in table.to_dict("records"):
            run = str(row.pop("path")).strip().rstrip("/").rpartition("/")[2]
            told = {f"config.{k}": _word(str(k), v) for k, v in row.items()}
            found[run] = {"split": part[1], **told}
    return found


def _word(column: str, value: Any) -> Any:
    words = CODES.get(column)
    if words and isinstance(value, int | float) and value in range(len(words)):
        return words[int(value)]
    return value
