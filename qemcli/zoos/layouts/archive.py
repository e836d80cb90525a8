"""An archive of checkpoints: any tar or zip, any format, read where they lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qemcli.checkpoints import Checkpoint
from qemcli.spaces import WeightSpace
from qemcli.zoos.layouts import _runs
from qemcli.zoos.members import first_names
from qemcli.zoos.scan import OTHERS, SUFFIXES, labels
from qemcli.zoos.zoo import Zoo

# What the first member of a zip is that is one checkpoint itself.
WHOLE = ("/data.pkl", ".npy", "config.json", "metadata.json", "model.weights.h5")
TEXT = "no checkpoint"


def sniff(path: Path) -> bool:
    """A tar or a zip with checkpoints in it that is not itself one."""
    if path.is_dir():
        return False
    names = first_names(path, 512)
    return bool(names) and not names[0].endswith(WHOLE) and any(map(_chosen, names))


def _chosen(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.rpartition("/")[2].startswith(".")


def open(path: Path, activation: str | None = None, statistics: bool = False) -> Zoo:
    """The zoo of all members that can be read; InputError where there is none."""
    runs = _runs.find(path, _chosen, _left_out)
    looked = _Looked(activation)
    rows: dict[str, dict[str, Any]] = {}
    known: dict[str, WeightSpace] = {}
    for name in list(runs.checkpoints):
        known |= _runs.spaces(runs, [(name, name)], looked)
        if name in known:
            rows[name] = {"activation": known[name].activation, **looked.said}
    return _runs.opened(runs, "archive", rows, known, {})


def _left_out(name: str) -> str | None:
    return TEXT if name.lower().endswith(OTHERS) else _runs.OTHER


@dataclass
class _Looked:
    """The weight space of a checkpoint, equal ones once; what the last one said of itself."""

    activation: str | None
    said: dict[str, Any] = field(default_factory=dict)
    met: dict[WeightSpace, WeightSpace] = field(default_factory=dict)

    def __call__(self, checkpoint: Checkpoint) -> WeightSpace:
        self.said = {
            "coverage": checkpoint.coverage(space := checkpoint.listed(self.activation)),
            "format": checkpoint.format,
            **labels(checkpoint.metadata),
        }
        return self.met.setdefault(space, space)
