"""Runs of comparisons: one design trained and measured; every run is kept and none is done twice.

A run is a parquet of its predictions of the test networks, with its row of results beside them in
the file's own metadata. Its name is a hash of all that it depends on, the networks included.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from qemcli import groups, memory, registry
from qemcli.comparison import Comparison, Range, Trial, named, trials
from qemcli.designs import calibrate
from qemcli.errors import InputError, UsageError
from qemcli.machine import steady
from qemcli.predictors import Predictor
from qemcli.processes import spread
from qemcli.samples import Sample, carried, scored
from qemcli.spaces import WeightSpace
from qemcli.testing import invariance_error
from qemcli.training import Rows, Run
from qemcli.writing import beside

FAILED = ".failed"
Result = tuple[dict[str, Any], dict[str, np.ndarray]]  # a row, and predictions by range


def orbit(sample: Sample, group: str, scales: Range, seed: int) -> Sample:
    """Every network under one random element of its own."""
    generator = torch.Generator().manual_seed(seed)

    def move(space: WeightSpace, flat: torch.Tensor) -> torch.Tensor:
        element = groups.sample(group, space, len(flat), generator, scale_range=scales)
        return space.flatten(groups.act(element, space, space.unflatten(flat)))

    return dataclasses.replace(sample, networks=sample.networks.map(move))


def doubled(sample: Sample, group: str, scales: Range, seed: int) -> Sample:
    """The networks and one copy of each under a random element, as the published tables augment."""
    import pandas

    copy = orbit(sample, group, scales, seed)
    index = pandas.concat([sample.index, copy.index], ignore_index=True)
    networks, target = sample.networks.followed(copy.networks), torch.cat([sample.target] * 2)
    return dataclasses.replace(sample, networks=networks, target=target, index=index)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A predictor, the processor time of its training in seconds, and the memory that this took
    beyond the networks and libraries, in 2^20 bytes (qemcli.memory says how it is measured)."""

    predictor: Predictor
    seconds: float
    megabytes: float | None


def trained(trial: Trial, plan: Comparison, sample: Sample) -> Trained:
    """The trial's design, trained on the train split and stopped by the val split; the test split
    is not looked at. What carries networks to their representatives is part of the training."""
    task = registry.load("tasks", plan.task)
    learn = {name: sample.split(name) for name in ("train", "val")}
    if trial.augment:
        learn = {n: doubled(s, plan.group, trial.augment, 7 + trial.seed) for n, s in learn.items()}
    with memory.watched() as peak:
        with torch.random.fork_rng():
            torch.manual_seed(trial.seed)
            model = trial.design.build_mixed(sample.spaces, task.outputs(sample.classes))
        start = time.process_time()
        rows = {n: Rows(carried(trial.design, s.networks), s.target) for n, s in learn.items()}
        calibrate(model, rows["train"].networks)
        Run(model, task, trial.schedule, trial.seed).fit(rows["train"], rows["val"])
        seconds = time.process_time() - start
    space, *others = sample.spaces
    predictor = Predictor(
        trial.name, space, trial.design, plan.task, model, {}, sample.classes, tuple(others)
    )
    return Trained(predictor, seconds, peak.megabytes)


def run(trial: Trial, plan: Comparison, sample: Sample) -> Result:
    """Train one design; its row, and its predictions of the test networks under every range
    tried."""
    task, test = registry.load("tasks", plan.task), sample.split("test")
    made = trained(trial, plan, sample)
    predictor = made.predictor
    start = time.process_time()
    answers = predictor.predict_all(test.networks)
    per_network = (time.process_time() - start) / len(test)
    prediction, label = scored(task, answers, test.target)
    predictions = {"none": prediction, **_under(trial, plan, predictor, test)}
    row: dict[str, Any] = {
        **identity(trial),
        **task.score(predictions[named(trial.augment)], label),
        "parameters": predictor.parameters,
        "seconds": made.seconds,
        "inference_ms": 1e3 * per_network,
        "memory_mb": made.megabytes,
        "invariance_error": worst_error(predictor, plan.group, test),
    }
    for name, values in predictions.items():
        row[f"{task.METRIC} {name}"] = task.score(values, label).get(task.METRIC)
    layer = getattr(predictor.metanetwork, "quasi", None)
    if layer is not None:
        row["eps"] = _strengths(layer)
    return row, {"label": label, **predictions}


def _under(
    trial: Trial, plan: Comparison, predictor: Predictor, test: Sample
) -> dict[str, np.ndarray]:
    """The predictions of the test networks under elements of every range, by its name."""
    task: ModuleType = registry.load("tasks", plan.task)
    found = {}
    for scales in dict.fromkeys((*plan.ranges, *filter(None, [trial.augment]))):
        copies = orbit(test, plan.group, scales, 99)
        answers = predictor.predict_all(copies.networks)
        found[named(scales)], _ = scored(task, answers, test.target)
    return found


def identity(trial: Trial) -> dict[str, Any]:
    """What was run, as columns of its row."""
    design, schedule = trial.design, trial.schedule
    return {
        "design": trial.name,
        "architecture": design.architecture,
        "quasi": design.quasi,
        "config": json.dumps(design.config, sort_keys=True),
        "augment": named(trial.augment),
        "seed": trial.seed,
        "lr": schedule.lr,
        "weight_decay": schedule.weight_decay,
        **({"settings": trial.settings} if trial.settings else {}),
    }


def _strengths(layer: torch.nn.Module) -> list[float]:
    """eps of every layer of a chain's quasi layer, or of every block of one for attention."""
    own = getattr(layer, "eps", None)
    state = layer.state_dict().items()
    kept = [x for name, x in state if name.rpartition(".")[2] == "eps"]
    found = [own().detach()] if callable(own) else kept
    return torch.cat([x.reshape(-1) for x in found]).tolist()


def worst_error(predictor: Predictor, group: str, test: Sample, networks: int = 64) -> float:
    """Largest change of the answer along the orbit over the spread of the answers, in float64."""
    errors = []
    for space, flat, _ in test.networks.parts(torch.arange(min(networks, len(test)))):
        if len(flat) < 2 and test.networks.mixed:
            continue  # one answer has no spread
        rows = flat.double()
        element = groups.sample(group, space, len(rows), torch.Generator().manual_seed(5))
        predictor.model.double()
        try:
            ask = predictor.on(space)
            errors.append(invariance_error(ask, space, space.unflatten(rows), element))
        finally:
            predictor.model.float()
    return float(torch.cat(errors).max()) if errors else math.nan


def save(row: dict[str, Any], predictions: dict[str, np.ndarray], path: Path) -> None:
    """Keep a run."""
    import pandas

    table = pandas.DataFrame({name: list(values) for name, values in predictions.items()})
    table.attrs = {"row": json.dumps(row)}
    beside(path, lambda p: table.to_parquet(p, index=False))


def read(path: Path) -> Result:
    """A run that was kept."""
    import pandas

    table = pandas.read_parquet(path)
    return json.loads(table.attrs["row"]), {n: np.stack(table[n].to_list()) for n in table}


def start(sample: Sample) -> None:
    """In a worker, once: what all its trials read, and what the first one would load and pay
    for."""
    global _SAMPLE  # a worker's one argument that is too large to send with every trial
    torch.set_num_threads(1)
    steady()
    _SAMPLE = sample
    _warm()


def _warm() -> None:
    """One step of a training, and one score: time and memory of libraries are no design's."""
    from scipy.stats import kendalltau

    model = torch.nn.Linear(2, 1)
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=1e-3, total_steps=2)
    torch.nn.functional.binary_cross_entropy_with_logits(
        model(torch.ones(3, 2)), torch.ones(3, 1)
    ).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    cycle.step()
    kendalltau([0.0, 1.0, 2.0], [0.0, 2.0, 1.0])


_SAMPLE: Sample


def given() -> Sample:
    """In a worker: the sample that it was started with."""
    return _SAMPLE


def _work(trial: Trial, plan: Comparison, path: Path) -> None:
    failed = path.with_suffix(FAILED)
    try:
        row, predictions = run(trial, plan, given())
    except (
        UsageError,
        InputError,
    ) as error:  # its loss diverged, or its trees found nothing to split
        reason = str(error)
        beside(failed, lambda p: p.write_text(reason))
        return
    save(row, predictions, path)
    failed.unlink(missing_ok=True)


def planned(
    todo: Iterable[Trial], plan: Comparison, sample: Sample, folder: Path
) -> dict[Path, Trial]:
    """The file of every trial, whether it is there or not."""
    data = sample.networks.hash()
    return {folder / "runs" / f"{trial.key(plan, data)}.parquet": trial for trial in todo}


def compare(
    plan: Comparison,
    sample: Sample,
    folder: Path,
    workers: int = 1,
    advance: Callable[[int], None] = lambda n: None,
    wanted: Sequence[Trial] | None = None,
) -> list[Result]:
    """Run what is not yet in `folder`/runs, one single-threaded process a worker; returns every
    run. `wanted` are other trials than those of the plan as it stands. What a trial that came to
    nothing says is left beside the runs (`failures`), and it is tried again the next time."""
    kept = planned(trials(plan) if wanted is None else wanted, plan, sample, folder)
    folder.joinpath("runs").mkdir(parents=True, exist_ok=True)
    todo = [(trial, plan, path) for path, trial in kept.items() if not path.is_file()]
    advance(len(kept) - len(todo))
    for _ in spread(_work, todo, workers, start, (sample,)):
        advance(1)
    return [_named(read(path), trial) for path, trial in kept.items() if path.is_file()]


def failures(kept: Mapping[Path, Trial]) -> list[dict[str, Any]]:
    """What the trials that came to nothing say."""
    missing = {path.with_suffix(FAILED): t for path, t in kept.items() if not path.is_file()}
    return [
        {**_told(trial), "reason": path.read_text()}
        for path, trial in missing.items()
        if path.is_file()
    ]


def _told(trial: Trial) -> dict[str, Any]:
    return {"design": trial.name, "augment": named(trial.augment), "seed": trial.seed}


def _named(result: Result, trial: Trial) -> Result:
    """A run may have been kept under another name, or before some columns were."""
    row, predictions = result
    return row | identity(trial), predictions
