"""The CNN Wild Park (Kofinas et al. 2024, arXiv:2403.12143), byte for byte, from a folder or the
.zip itself: CNNs of many architectures, each at many epochs.

<trial>/checkpoint_<epoch>/checkpoint.pt holds a state dict beside pickled settings of other
people's classes: these are read as data, nothing of theirs is imported. Parts and scores come from
cnn_park_splits.json in or beside the zoo, else scores from result.json or from the checkpoints
themselves. Sums of layers of different widths, of which the authors add the channels that both
have, are in no weight space of ours: such networks are listed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qemcli.checkpoints import Checkpoint
from qemcli.errors import InputError, QemError
from qemcli.formats._torch_pickles import located
from qemcli.formats._torch_tensors import Beyond
from qemcli.formats.torch_file import plain
from qemcli.recognition import activation_name, weights
from qemcli.spaces import Chain, Layered, WeightSpace, opaque, residual
from qemcli.spaces.residual import NONE
from qemcli.zoos.layouts import _runs
from qemcli.zoos.members import first_names
from qemcli.zoos.zoo import Zoo

NAME = re.compile(r"(?:^|/)([^/]+)/checkpoint_(\d{1,9})/checkpoint\.pt$")
SPLITS = "cnn_park_splits.json"
SCORE = "test/acc"
SETTINGS = ("n_layers", "channels", "kernel_size", "stride", "padding", "residual", "activation")
Key = tuple[str, int]  # trial, epoch


def sniff(path: Path) -> bool:
    """A folder or an archive with checkpoints of such names."""
    return any(NAME.search(name) for name in first_names(path))


def open(path: Path, activation: str | None = None, statistics: bool = False) -> Zoo:
    """The zoo, one row a checkpoint; InputError where not one can be read, or for a splits file
    that is damaged."""
    runs = _runs.find(path, lambda name: NAME.search(name) is not None, _left_out)
    keys = {name: _key(name) for name in runs.checkpoints}
    looked = _Looked()
    known = _runs.spaces(runs, [(n, keys[n][0]) for n in sorted(keys)], looked)
    stated = _stated(runs)
    last: dict[str, int] = {}
    for trial, epoch in keys.values():
        last[trial] = max(last.get(trial, 0), epoch)
    scores = _scores(runs, {trial for trial, _ in keys.values()})
    rows = {}
    for name in list(known):
        trial, epoch = keys[name]
        split, score = stated.get((trial, epoch), (None, None))
        score = scores.get((trial, epoch)) if score is None else score
        if score is None:
            score = _inside(runs, name)
        told = looked.settings.get(id(known[name]), {})
        rows[name] = {
            "run": trial,
            "step": epoch,
            "final": epoch == last[trial],
            "split": split,
            "test_accuracy": score,
            **told,
        }
    about = {"paper": "arXiv:2403.12143", "splits": SPLITS if stated else "none"}
    return _runs.opened(runs, "wild_park", rows, known, about)


def _left_out(name: str) -> str | None:
    base = name.rpartition("/")[2]
    wanted = base in (SPLITS, "result.json")
    return None if wanted else _runs.OTHER


def _key(name: str) -> Key:
    found = NAME.search(name)
    if found is None:
        raise InputError(f"'{name}' is no checkpoint of the CNN Wild Park")
    return found[1], int(found[2])


@dataclass
class _Looked:
    """The weight space of a checkpoint by its tensors and its settings, which are kept."""

    settings: dict[int, dict[str, Any]] = field(default_factory=dict)

    def __call__(self, checkpoint: Checkpoint) -> WeightSpace:
        said = _said(checkpoint.path, "config")
        space = _space(checkpoint, said)
        acts = _listed(said.get("activation"))
        columns = {f"config.{k}": _text(said[k]) for k in SETTINGS if k in said}
        alone = activation_name(acts[0]) if len(set(acts)) == 1 else None
        self.settings[id(space)] = {
            **columns, "activation": alone if isinstance(space, Layered) else None
        }  # fmt: skip
        return space


def _said(path: Path, key: str) -> dict[str, Any]:
    """What the checkpoint's pickle holds under a key, as plain dicts and lists."""
    try:
        tree = located(path).tree
    except Beyond as why:
        raise InputError(f"{path}: settings of a kind that is not read ({why})") from None
    found = plain(tree.get(key)) if isinstance(tree, Mapping) else None
    return found if isinstance(found, dict) else {}


def _listed(value: Any) -> list[str]:
    return [str(v) for v in value] if isinstance(value, list) else [str(value)] if value else []


def _text(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _space(checkpoint: Checkpoint, said: dict[str, Any]) -> WeightSpace:
    """Convolutions, global pooling and a dense layer, with sums of layers of one width; opaque
    where sums are of other layers."""
    space = checkpoint.listed()
    if not isinstance(space, Chain):
        return space
    added = _added(said.get("residual"))
    kernels = [space[la.weight].unfolded[2:] for la in space.layers if la.conv]
    halves = [str(side) for side in (kernel[0] // 2 for kernel in kernels)]
    usual = set(_listed(said.get("stride"))) <= {"1"}
    usual &= _listed(said.get("padding")) in ([], halves, halves[:1])
    side = kernels[0][0] if kernels else 1
    known = usual and (len(set(kernels)) == 1 or any(i != NONE for i in added))
    image = (space.layers[0].cols, 32, 32)
    space = space.running(stride=1, padding=side // 2, junction="pool", image=image, known=known)
    if all(i == NONE for i in added):
        return space
    try:
        if not usual:
            raise InputError("a stride or padding by which images do not keep their size")
        return residual(space, (*added, NONE))
    except InputError as why:
        reason = f"residual connections: {why.message}"
        return opaque(weights(checkpoint.floats())[0], reason)


def _added(said: Any) -> tuple[int, ...]:
    """The layer that is added to each convolution, -1 for none; InputError for no numbers."""
    listed = said if isinstance(said, list) else [] if said is None else [said]
    if not all(isinstance(i, int) for i in listed):
        raise InputError(f"the setting 'residual' is {said!r}, not the numbers of layers")
    return tuple(max(i, NONE) for i in listed)


def _stated(runs: _runs.Runs) -> dict[Key, tuple[str, float | None]]:
    """(trial, epoch) -> (part, score) of the splits file in the tree, else of one beside it."""
    name = next((n for n in runs.texts if n.rpartition("/")[2] == SPLITS), None)
    beside = runs.path.resolve().parent / SPLITS
    if name is None and not beside.is_file():
        return {}
    try:
        record = runs.json(name) if name else json.loads(beside.read_text())
        return dict(_parts(record))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError):
        raise InputError(
            f"{runs.path}: {SPLITS} is damaged",
            'it is {"train": {"path": [...], "score": [...]}, "val": ..., "test": ...}',
        ) from None


def _parts(record: Any) -> Iterator[tuple[Key, tuple[str, float | None]]]:
    for part in ("train", "val", "test"):
        found = record.get(part, {})
        paths = found["path"] if isinstance(found, dict) else found
        scores = found.get("score", []) if isinstance(found, dict) else []
        for i, path in enumerate(paths):
            tail = str(path).removesuffix("/").removesuffix("/checkpoint.pt").split("/")
            score = float(scores[i]) if i < len(scores) else None
            yield (tail[-2], int(tail[-1].rpartition("_")[2])), (part, score)


def _scores(runs: _runs.Runs, trials: set[str]) -> dict[Key, float]:
    """(trial, epoch) -> score of the lines of result.json."""
    found: dict[Key, float] = {}
    for name in runs.texts:
        trial = name.split("/")[-2] if "/" in name else ""
        if trial not in trials or not name.endswith("/result.json"):
            continue
        for line in runs.lines(name):
            epoch, score = line.get("training_iteration"), line.get(SCORE)
            if isinstance(epoch, int) and isinstance(score, int | float):
                found[trial, epoch] = float(score)
    return found


def _inside(runs: _runs.Runs, name: str) -> float | None:
    """The score in the checkpoint itself."""
    try:
        path = runs.reader.lying(runs.checkpoints[name])
        score = _said(path, "last_result").get(SCORE)
    except QemError as error:
        runs.fail(name, error.message)
        return None
    return float(score) if isinstance(score, int | float) else None
