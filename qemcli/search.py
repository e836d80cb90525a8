"""Hyper-parameters searched fairly: as many trials, epochs and networks for every design.

A trial trains a design with other settings and scores it on the validation split; the test split is
not looked at. The first trial is the design as the recipe has it; what follows is proposed by
Optuna's tree-structured Parzen estimator (Akiba et al., arXiv:1907.10902), seeded, from the scores
so far. Every trial is kept under a hash of all that it depends on, so that the same search with
more trials goes on where it was. Optuna comes with the extra `search`.

What is searched: the peak learning rate, within a factor of 10 of the recipe's; weight decay; all
widths of the architecture at once, halved or doubled; dropout where it has some; of trees, which
have no schedule, what TREES says. An architecture may say more, or otherwise, in its module:
`SEARCH = {"depth": [2, 3, 4], "start": (1e-4, 1.0, "log")}` by names of its Config.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from qemcli import registry
from qemcli.comparison import Comparison, Trial
from qemcli.designs import Design
from qemcli.errors import EnvironmentFailure, InputError, UsageError
from qemcli.processes import spread
from qemcli.runs import given, start, trained
from qemcli.samples import Sample, scored
from qemcli.training import Schedule
from qemcli.writing import beside

Range = tuple[float, float] | tuple[float, float, str] | list[Any]  # ends, ends "log", or choices
Settings = dict[str, Any]

SEED = 10_007  # of every trial: none of the seeds that the table speaks of
WIDTHS = ("channels", "hidden", "width", "head", "reader_channels")  # fields of a Config
FACTORS = (0.5, 1.0, 2.0)
DECAY = (1e-6, 1e-1, "log")
DROPOUT = (0.0, 0.5)
TREES: dict[str, Range] = {
    "rate": (0.02, 0.3, "log"),
    "depth": [4, 6, 8, 10],
    "leaf": [5, 10, 20, 50],
    "columns": (0.3, 1.0),
}


@dataclass(frozen=True)
class Chosen:
    """The settings that a search ended with, and one row a trial."""

    settings: Settings
    rows: list[dict[str, Any]]

    @property
    def told(self) -> str:
        """`lr=0.003 width=2`: as tables show them."""
        return " ".join(f"{name}={_shown(value)}" for name, value in self.settings.items())

    def applied(self, trial: Trial) -> Trial:
        """The trial with these settings."""
        design, schedule = with_settings(trial.design, trial.schedule, self.settings)
        return dataclasses.replace(trial, design=design, schedule=schedule, settings=self.told)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def ranges(design: Design, schedule: Schedule) -> dict[str, Range]:
    """What is searched of a design, by name."""
    module = registry.load("architectures", design.architecture)
    names = {f.name for f in dataclasses.fields(module.Config)}
    declared: dict[str, Range] = getattr(module, "SEARCH", {})
    if "rounds" in names:
        return {k: v for k, v in TREES.items() if k in names} | declared
    found: dict[str, Range] = {"lr": (schedule.lr / 10, schedule.lr * 10, "log")}
    found["weight_decay"] = DECAY
    if names & set(WIDTHS):
        found["width"] = list(FACTORS)
    if "dropout" in names:
        found["dropout"] = DROPOUT
    return found | declared


def with_settings(
    design: Design, schedule: Schedule, settings: Settings
) -> tuple[Design, Schedule]:
    """The design and schedule with these settings; widths that heads share stay multiples of
    them."""
    module = registry.load("architectures", design.architecture)
    own: Settings = {f.name: f.default for f in dataclasses.fields(module.Config)}
    own |= design.config
    changed = {k: v for k, v in settings.items() if k in own and k != "width" and v != own[k]}
    factor, heads = settings.get("width", 1.0), own.get("heads", 1)
    if factor != 1:
        for name in (name for name in WIDTHS if name in own):
            changed[name] = _scaled(own[name], factor, heads if name == "channels" else 1)
    rates = {k: v for k, v in settings.items() if k in ("lr", "weight_decay")}
    kept = dataclasses.replace(design, config={**design.config, **changed})
    return kept, dataclasses.replace(schedule, **rates)


def _scaled(width: Any, factor: float, multiple: int) -> Any:
    if isinstance(width, list | tuple):
        return [_scaled(one, factor, multiple) for one in width]
    return width and max(1, round(width * factor / multiple)) * multiple


def search(
    plan: Comparison,
    sample: Sample,
    folder: Path,
    count: int,
    workers: int = 1,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, Chosen]:
    """`count` trials of every design; one single-threaded process a worker, one design at a time in
    each, so the number of workers changes nothing. Returns what was chosen, by the design's name.

    Raises EnvironmentFailure where Optuna is not installed, UsageError where no trial of a design
    ends in a score.
    """
    _library()
    data = sample.networks.hash()
    folder.joinpath("search").mkdir(parents=True, exist_ok=True)
    jobs = [(name, plan, folder / "search", count, data) for name in plan.entries]
    for _ in spread(_work, jobs, workers, start, (sample,)):
        advance(count)
    return {job[0]: _best(job[0], study(*job)) for job in jobs}


def _work(name: str, plan: Comparison, folder: Path, count: int, data: str) -> None:
    study(name, plan, folder, count, data, given())


def study(
    name: str, plan: Comparison, folder: Path, count: int, data: str, sample: Sample | None = None
) -> list[dict[str, Any]]:
    """One row a trial of one design. The same trials are proposed again however often it is asked:
    those that are kept are read, the others run on the sample."""
    optuna = _library()
    design = plan.entries[name]
    over = ranges(design, plan.scheduled(name))
    sampler = optuna.samplers.TPESampler(seed=SEED)
    found = optuna.create_study(direction="maximize", sampler=sampler)
    found.enqueue_trial(_present(design, plan.scheduled(name), over))
    rows = []
    for number in range(count):
        asked = found.ask()
        settings = {k: _asked(asked, k, r) for k, r in over.items()}
        row = _tried(name, settings, plan, folder, data, sample)
        if row["score"] is None:
            found.tell(asked, state=optuna.trial.TrialState.FAIL)
        else:
            found.tell(asked, row["score"])
        rows.append({"design": name, "trial": number, **row})
    return rows


def _library() -> ModuleType:
    try:
        import optuna
    except ImportError:
        raise EnvironmentFailure(
            "searching hyper-parameters needs optuna", "pip install 'qemcli[search]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _asked(trial: Any, name: str, over: Range) -> Any:
    """What the library proposes, to three digits."""
    if isinstance(over, list):
        return trial.suggest_categorical(name, over)
    return float(f"{trial.suggest_float(name, over[0], over[1], log='log' in over):.3g}")


def _present(design: Design, schedule: Schedule, over: Mapping[str, Range]) -> Settings:
    """The recipe's own settings, as far as they are within what is searched."""
    module = registry.load("architectures", design.architecture)
    own: Settings = {f.name: f.default for f in dataclasses.fields(module.Config)}
    own |= design.config | {"lr": schedule.lr, "weight_decay": schedule.weight_decay}
    if over.get("width") == list(FACTORS):
        own["width"] = 1.0
    return {name: own[name] for name, r in over.items() if name in own and _within(own[name], r)}


def _within(value: Any, over: Range) -> bool:
    return value in over if isinstance(over, list) else over[0] <= value <= over[1]


def _tried(
    name: str,
    settings: Settings,
    plan: Comparison,
    folder: Path,
    data: str,
    sample: Sample | None,
) -> dict[str, Any]:
    """The row of one trial, from its file where it is kept."""
    design, schedule = with_settings(plan.entries[name], plan.scheduled(name), settings)
    trial = Trial(design, SEED, None, schedule, name)
    depends = [trial.key(plan, data), "validation"]
    path = folder / f"{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]}.json"
    if sample is not None and not path.is_file():
        text = json.dumps(_scored(trial, plan, sample))
        beside(path, lambda p: p.write_text(text))
    return {**settings, **json.loads(path.read_text())}


def _scored(trial: Trial, plan: Comparison, sample: Sample) -> dict[str, Any]:
    """The score on the validation split; None with the reason where there is none."""
    task = registry.load("tasks", plan.task)
    try:
        made = trained(trial, plan, sample)
    except (UsageError, InputError) as error:  # the loss diverged; widths that do not go together
        return {"score": None, "seconds": None, "reason": str(error)}
    val = sample.split("val")
    pair = scored(task, made.predictor.predict_all(val.networks), val.target)
    score = task.score(*pair).get(task.METRIC, math.nan)
    told = {"score": score, "seconds": made.seconds, "parameters": made.predictor.parameters}
    return told if math.isfinite(score) else {**told, "score": None, "reason": "a constant answer"}


def _best(name: str, rows: list[dict[str, Any]]) -> Chosen:
    known = [row for row in rows if row["score"] is not None]
    if not known:
        raise UsageError(
            f"no trial of '{name}' ends in a score: {rows[0].get('reason')}",
            "search with more trials, or leave the design out",
        )
    best = max(known, key=lambda row: row["score"])
    beside_settings = {"design", "trial", "score", "seconds", "parameters", "reason"}
    return Chosen({k: v for k, v in best.items() if k not in beside_settings}, rows)
