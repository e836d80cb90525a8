"""ModelZoos (Schürholt et al. 2022, arXiv:2209.14764), and its sisters of phase transitions and
vision transformers: trees of Ray Tune as published, from a folder or the .zip or .tar itself.

<zoo>/<trial>/{params.json,result.json,checkpoint_<epoch>/checkpoints}. Settings come from
params.json, scores from the line of result.json whose `training_iteration` is the epoch. Pickles of
Ray and the images beside the zoo are never opened. The papers shuffle an unsorted listing of the
trials (seed 42, 70/15/15); here it is sorted first, so that it is the same everywhere.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from qemcli.checkpoints import Checkpoint
from qemcli.recognition import activation_name
from qemcli.spaces import Chain, WeightSpace
from qemcli.zoos.layouts import _runs
from qemcli.zoos.members import first_names
from qemcli.zoos.zoo import Zoo

NAME = re.compile(r"(?:^|/)checkpoint_(\d{1,9})/checkpoints$")
SETTINGS = ("params.json", "config.json")
SCORES = "result.json"
PICKLE = "a pickle of Ray Tune or of a training script, which is never opened"
STATE = "state of the optimiser"
IMAGES = "images or preprocessed weights in a pickle: give the raw zoo"
RENAMED = {
    "test_acc": "test_accuracy", "train_acc": "train_accuracy", "val_acc": "val_accuracy",
    "test_loss": "test_loss", "train_loss": "train_loss", "val_loss": "val_loss",
}  # fmt: skip
KEPT = 64  # other columns of a result, as the loss landscape's of the phase-transition zoo
RAY = frozenset(
    {
        "training_iteration", "trial_id", "experiment_id", "date", "timestamp", "pid", "hostname",
        "time_this_iter_s", "time_total_s", "timesteps_total", "timesteps_since_restore", "node_ip",
        "time_since_restore", "iterations_since_restore", "episodes_total", "done", "config",
        "experiment_tag", "warmup_time", "timesteps_this_iter", "trial_name",
    }
)  # fmt: skip


def sniff(path: Path) -> bool:
    """A folder or an archive with such checkpoints, or with a run's settings and scores."""
    names = first_names(path, 512)
    if any(NAME.search(name) for name in names):
        return True
    trials = [name for name in names if "NN_tune_trainable_" in name]
    return any(name.endswith("/params.json") for name in trials)


def open(path: Path, activation: str | None = None, statistics: bool = False) -> Zoo:
    """The zoo, one row an epoch of a trial; InputError where not one checkpoint can be read."""
    runs = _runs.find(path, lambda name: NAME.search(name) is not None, _left_out)
    trials = {name: _trial(name) for name in runs.checkpoints}
    told = {trial: _told(runs, trial) for trial in sorted(set(trials.values()))}
    parts = _runs.parted(told, 42, (0.7, 0.15))
    kinds = []
    for name, trial in trials.items():
        settings = {k: v for k, v in told[trial][0].items() if k.startswith("model::")}
        member = runs.checkpoints[name]
        kinds.append((name, (json.dumps(settings, sort_keys=True, default=str), member.size)))
    known = _runs.spaces(runs, kinds, _look)
    last: dict[str, int] = {}
    for name, trial in trials.items():
        last[trial] = max(last.get(trial, 0), _epoch(name))
    rows = {}
    for name in runs.checkpoints:
        trial, epoch = trials[name], _epoch(name)
        rows[name] = {
            "run": trial.rpartition("/")[2] or path.resolve().stem,
            "step": epoch,
            "final": epoch == last[trial],
            "split": parts[trial],
            "activation": _activation(told[trial][0], known.get(name)),
            **_settings(told[trial][0]),
            **told[trial][1].get(epoch, {}),
        }
    about = {"paper": "arXiv:2209.14764", "splits": "by trial, sorted, seed 42, 70/15/15"}
    return _runs.opened(runs, "model_zoos", rows, known, about)


def _left_out(name: str) -> str | None:
    base = name.rpartition("/")[2]
    if base in (*SETTINGS, SCORES):
        return None
    if base.endswith((".pkl", ".pickle")) or base in (".tune_metadata", "tune_metadata"):
        return PICKLE
    if base.startswith("experiment_state"):
        return PICKLE
    if base == "optimizer":
        return STATE
    return IMAGES if base.endswith(".pt") else _runs.OTHER


def _trial(name: str) -> str:
    return str(PurePosixPath(name).parent.parent).removeprefix(".")


def _epoch(name: str) -> int:
    found = NAME.search(name)
    return int(found[1]) if found else 0


def _told(runs: _runs.Runs, trial: str) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """(settings, epoch -> scores) of a trial; those of its first file of settings that is there."""
    below = f"{trial}/" if trial else ""
    settings: dict[str, Any] = {}
    for base in SETTINGS:
        found = runs.text(below + base)
        try:
            record = json.loads(found) if found else None
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            settings = record
            break
    lines = runs.lines(below + SCORES)
    if not settings and lines and isinstance(lines[0].get("config"), dict):
        settings = lines[0]["config"]
    return settings, {e: _scores(r) for r in lines if (e := _iteration(r)) is not None}


def _iteration(record: dict[str, Any]) -> int | None:
    value = record.get("training_iteration")
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _scores(record: dict[str, Any]) -> dict[str, float]:
    numbers = {
        k: float(v) for k, v in record.items()
        if isinstance(v, int | float) and not isinstance(v, bool) and k not in RAY
    }  # fmt: skip
    found = {ours: numbers[k] for k, ours in RENAMED.items() if k in numbers}
    others = [k for k in numbers if k not in RENAMED][:KEPT]
    return {**found, **{f"metrics.{k}": numbers[k] for k in others}}


def _settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings under their own names; what is no number or word is left out."""
    plain = {k: v for k, v in settings.items() if isinstance(v, bool | int | float | str)}
    found: dict[str, Any] = {f"config.{k}": v for k, v in plain.items() if k != "seed"}
    if isinstance(seed := settings.get("seed"), int):
        found["seed"] = seed
    return found


def _look(checkpoint: Checkpoint) -> WeightSpace:
    """Convolutions without padding, most followed by a pooling by the maximum: how the network is
    run is not known, but that it has no signs is."""
    space = checkpoint.listed()
    if not isinstance(space, Chain) or space.family != "cnn":
        return space
    return space.running(padding=0, pooling="max", image=None)


def _activation(settings: dict[str, Any], space: WeightSpace | None) -> str | None:
    """What model::nlin says of a chain of layers."""
    said = settings.get("model::nlin")
    known = activation_name(said) if isinstance(said, str) else None
    return known if isinstance(space, Chain) else None
