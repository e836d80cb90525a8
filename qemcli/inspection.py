"""What there is to say about a checkpoint: its weight space, its symmetries, what was left out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from qemcli import groups
from qemcli.checkpoints import Checkpoint, open_checkpoint
from qemcli.errors import QemError
from qemcli.spaces import WeightSpace
from qemcli.zoos.statistics import digests, ties


def describe(checkpoint: Checkpoint, activation: str | None = None) -> dict[str, Any]:
    """One record: space, tensors with their axes, groups, activation, parameters, dtype, finite,
    coverage, skipped, ties. Raises InputError where it cannot be understood or read."""
    space = checkpoint.space(activation)
    flat = checkpoint.row(space)[None]
    refused = {n: groups.allowed(n, space) for n in groups.names() if n != "all"}
    dtypes = sorted({checkpoint.dtypes[name] for name in space.names})
    return {
        "checkpoint": str(checkpoint.path),
        "format": checkpoint.format,
        "family": space.family,
        "widths": list(space.widths),
        "activation": space.activation,
        "activation_source": _source(space, activation),
        "groups": groups.applicable(space),
        "refused": {name: reason for name, reason in refused.items() if reason},
        "parameters": space.size,
        "dtype": ", ".join(dtypes),
        "finite": bool(np.isfinite(flat).all()),
        "coverage": checkpoint.coverage(space),
        "ties": int(ties(space, flat)[0]),
        "sha256": str(digests(flat)[0]),
        "tensors": {
            t.name: {"axes": str(t), "shape": list(t.shape), "dtype": checkpoint.dtypes[t.name]}
            for t in space.tensors
        },
        "skipped": [{"tensor": name, "reason": reason} for name, reason in space.skipped],
        "space": json.loads(space.to_json()),
    }


def _source(space: WeightSpace, stated: str | None) -> str:
    if space.activation is None:
        return "unknown: only permutation is claimed (state it with --activation)"
    return "stated by --activation" if stated else "known from the checkpoint"


def inspect(
    paths: Iterable[Path], activation: str | None = None, strict: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """(records, failures) of checkpoints, each counted once; a single one that is bad raises."""
    listed = list(dict.fromkeys(Path(path) for path in paths))
    rows, failed = [], []
    for path in listed:
        try:
            rows.append(describe(open_checkpoint(path), activation))
        except QemError as error:
            if strict or len(listed) == 1:
                raise
            reason = error.message.removeprefix(f"{path}: ")
            failed.append({"checkpoint": str(path), "reason": reason})
    return rows, failed
