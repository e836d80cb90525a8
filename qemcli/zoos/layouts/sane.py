"""SANE's sliced zoos (Schürholt et al. 2024, arXiv:2406.09997), at index level: one torch file a
network, its weights cut into tokens.

dataset_torch.<train|val|test>/sample_<i>.pt is a dict of w (tokens, numbers), m (mask), p
(positions) and props. Which token belongs to which layer is not in the file, so that rows are
listed and not claimed. The pickled data sets beside them (dataset.pt) hold objects of SANE's own
classes and are never opened: give these samples, or the raw zoo.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qemcli.checkpoints import Checkpoint
from qemcli.errors import InputError
from qemcli.spaces import WeightSpace, opaque
from qemcli.zoos.exports import renamed
from qemcli.zoos.layouts import _runs
from qemcli.zoos.members import first_names
from qemcli.zoos.zoo import Zoo

NAME = re.compile(r"(?:^|/)dataset_torch\.(train|val|test)/sample_(\d{1,9})\.pt$")
TOKENS = "w"
REASON = "weights cut into tokens, and no file says of which layers"
PICKLE = "a data set of another program's classes, which is never opened"


def sniff(path: Path) -> bool:
    """A folder or an archive with samples of such names; one part alone as well."""
    return any(NAME.search(_below(path, name)) for name in first_names(path))


def _below(path: Path, name: str) -> str:
    return f"{path.resolve().name}/{name}" if path.is_dir() else name


def open(path: Path, activation: str | None = None, statistics: bool = False) -> Zoo:
    """The zoo, one row a sample; InputError where not one can be read."""

    def chosen(name: str) -> bool:
        return NAME.search(_below(path, name)) is not None

    runs = _runs.find(path, chosen, _left_out)
    rows: dict[str, dict[str, Any]] = {}
    known: dict[str, WeightSpace] = {}
    look = _Looked()
    for name in list(runs.checkpoints):
        known |= _runs.spaces(runs, [(name, name)], look)
        part = NAME.search(_below(path, name))
        if name in known and part is not None:
            rows[name] = {"split": part[1], **look.said}
    about = {"paper": "arXiv:2406.09997", "splits": "the folders"}
    return _runs.opened(runs, "sane", rows, known, about)


def _left_out(name: str) -> str:
    return PICKLE if name.endswith((".pt", ".pkl")) else _runs.OTHER


@dataclass
class _Looked:
    """The space of the tokens alone, equal ones once; what the last sample said of itself."""

    said: dict[str, Any] = field(default_factory=dict)
    met: dict[tuple[int, ...], WeightSpace] = field(default_factory=dict)

    def __call__(self, checkpoint: Checkpoint) -> WeightSpace:
        shape = checkpoint.weights().get(TOKENS)
        if shape is None or len(shape) != 2:
            raise InputError(f"no tokens '{TOKENS}' [count, numbers] in it")
        told = {k: v for k, v in checkpoint.metadata.items() if isinstance(v, bool | int | float)}
        self.said = dict(zip(renamed(list(told)), told.values(), strict=True))
        return self.met.setdefault(shape, opaque({TOKENS: shape}, REASON))
