"""What is shipped and what can be trained, as rows."""

from __future__ import annotations

import json
from typing import Any

from qemcli import registry
from qemcli.predictor_files import FILE, installed, read_header
from qemcli.spaces import WeightSpace


def predictors() -> list[dict[str, Any]]:
    """One row a shipped predictor: task, weight space, design, size and test score, from its
    header."""
    from safetensors import safe_open

    rows = []
    for folder in installed():
        with safe_open(folder / FILE, framework="np") as file:
            header = file.metadata() or {}
            names = list(file.keys())
            sizes = [_count(file.get_slice(name).get_shape()) for name in names]
        space, record = read_header(folder / FILE, header)
        provenance = json.loads(header.get("qem.provenance", "{}"))
        test = provenance.get("test", {})
        rows.append(
            {
                "name": folder.name,
                "task": record["task"],
                "reads": _reads(space, len(record.get("others", ()))),
                "architecture": record["architecture"],
                "quasi": record["quasi"],
                "tau": test.get("tau"),
                "r2": test.get("r2"),
                "accuracy": test.get("accuracy"),
                "edit": record["config"].get("edit"),
                "mse": test.get("mse"),
                "tested_on": test.get("n"),
                "trained_on": provenance.get("train"),
                "tensors": sum(sizes),
            }
        )
    return rows


def _reads(space: WeightSpace, others: int) -> str:
    """The weight space of most of its networks, and how many others it was trained on."""
    first = f"{space.family} {'-'.join(map(str, space.widths))} {space.activation}"
    return f"{first} and {others} other architecture{'s' * (others > 1)}" if others else first


def _count(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def architectures() -> dict[str, str]:
    """Name -> the first line of its docstring."""
    names = registry.names("architectures")
    docs = {name: registry.load("architectures", name).__doc__ or "" for name in names}
    return {name: doc.strip().splitlines()[0] if doc else "" for name, doc in docs.items()}


def presets() -> list[dict[str, Any]]:
    """One row a preset: its published number of parameters and its own (layers/presets.py)."""
    from qemcli.layers.presets import table

    return table()
