"""What experiment trackers export, as the columns of an index: W&B's (its page's csv, and the
`summary`, `config`, `name` frame of its documentation) and MLflow's `search_runs`."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qemcli.zoos.scan import LABELS

if TYPE_CHECKING:
    import pandas

NESTED = {"config": "config.", "summary": "metrics.", "params": "config.", "metrics": "metrics."}
PREFIXES = {"params.": "config.", "config/": "config.", "summary/": "metrics."}
# What a tracker says of the run itself, not of what was tried in it.
BOOKKEEPING = frozenset(
    {
        "State", "Notes", "User", "Tags", "Created", "Runtime", "Sweep", "Agent", "Host", "Commit",
        "GPU Type", "GitHub", "experiment_id", "status", "artifact_uri", "start_time", "end_time",
        "Start Time", "Duration", "Source Type", "Source Name", "Status", "Updated", "End Time",
        "ID", "id", "Name", "name", "run_id", "Run ID", "run_name",
    }
)  # fmt: skip
PLAIN = (*LABELS, "activation")
# How the words of a label are written: test/acc, eval_accuracy, valid.top1_acc, ...
WORDS = {
    "acc": "accuracy", "acc1": "accuracy", "top1": "", "valid": "val", "validation": "val",
    "eval": "val", "dev": "val", "testing": "test", "training": "train",
}  # fmt: skip
UNSAID = {"accuracy": "test_accuracy"}  # of whatever was held out, where no other column says it
LONGEST = 1 << 20  # characters of a cell that is read as a dict


def flat(table: pandas.DataFrame) -> pandas.DataFrame:
    """The table with columns of dicts taken apart: a dict, JSON, or the text of Python's."""
    import pandas

    for name, prefix in NESTED.items():
        if name not in table:
            continue
        dicts = [_dict(value) for value in table[name]]
        if not any(dicts):
            continue
        columns = dict.fromkeys(str(k) for d in dicts for k in d if not str(k).startswith("_"))
        taken = {f"{prefix}{k}": [_scalar(d.get(k)) for d in dicts] for k in columns}
        parts = pandas.DataFrame(taken, index=table.index)
        table = pandas.concat([table.drop(columns=name), parts], axis=1)
    return table


def _dict(value: Any) -> dict[Any, Any]:
    if isinstance(value, str) and value.startswith("{") and len(value) < LONGEST:
        for read in (json.loads, ast.literal_eval):
            try:
                value = read(value)
                break
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    return value if isinstance(value, dict) else {}


def _scalar(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)


def renamed(columns: Sequence[str]) -> list[str]:
    """The names of an index for those of a table: labels plain, settings under `config.`, other
    measurements under `metrics.`, what a tracker keeps of the run under `run.`."""
    found: list[str] = []
    meant = [_renamed(str(name)) for name in columns]
    for name, wanted in zip(columns, meant, strict=True):
        if _label(str(name)) in UNSAID and UNSAID[_label(str(name))] not in meant:
            wanted = UNSAID[_label(str(name))]
        if wanted in found:  # test_acc beside test_accuracy: the first one counts
            wanted = f"config.{name}"
        found.append(wanted)
    return found


def _renamed(name: str) -> str:
    if name in PLAIN:
        return name
    if name in BOOKKEEPING or name.startswith("tags."):
        return f"run.{name}"
    for prefix, ours in PREFIXES.items():
        if name.startswith(prefix):
            name = ours + name.removeprefix(prefix)
    if name.startswith("config."):
        return "activation" if name == "config.activation" else name
    label = _label(name)
    if label in LABELS and label not in ("run", "split", "image"):
        return label
    return name if name.startswith("metrics.") else f"config.{name}"


def _label(name: str) -> str:
    """A column's name in the words of LABELS."""
    words = re.split(r"[/. _-]+", name.removeprefix("metrics.").lower())
    return "_".join(filter(None, (WORDS.get(word, word) for word in words)))
