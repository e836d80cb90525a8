"""Several designs on one zoo: same split, same schedule, several seeds; every run is kept and
none is done twice.

A comparison is a TOML file:

    zoo = "cnn-fashion"                          # name or path; `where` filters it
    seeds = [0, 1, 2]
    reference = "monomial_nfn none"              # paired differences are against this design
    group = "monomial"                           # the orbits that trained predictors are tried on
    ranges = [[1, 10], [1, 10000]]               # scales of those tries, U[lo, hi]; of matrices in
                                                 # heads (group = "general-linear") the singular
                                                 # values, so that hi / lo bounds the condition
    thresholds = [0, 0.2, 0.4]                   # also scored on networks of such accuracy or more
    augment = [[1, 10]]                          # also train on zoos doubled by such copies
    augmented = ["monomial_nfn none"]            # these designs only (all where not said)
    (optional) [schedule]
    epochs = 30
    (optional) [config]                          # of every design, before its own
    edit = "dilate"
    [[design]]
    architecture = "statnn"
    quasi = "balanced"
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qemcli import groups, registry
from qemcli.errors import UsageError
from qemcli.machine import steady
from qemcli.predictors import Design, Predictor, calibrate
from qemcli.processes import spread
from qemcli.recipes import fields, read_toml
from qemcli.samples import Sample, carried, scored
from qemcli.spaces import WeightSpace
from qemcli.testing import invariance_error
from qemcli.training import Rows, Run, Schedule
from qemcli.writing import beside

Range = tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """What is compared; see the module's example."""

    zoo: str | None = None
    where: str | None = None
    splits: str | None = None
    task: str = "generalization"
    seeds: tuple[int, ...] = (0, 1, 2)
    reference: str = ""
    group: str = "monomial"
    ranges: tuple[Range, ...] = ()
    augment: tuple[Range, ...] = ()
    augmented: tuple[str, ...] = ()
    thresholds: tuple[float, ...] = ()
    schedule: Schedule = Schedule()
    designs: tuple[Design, ...] = ()

    @property
    def edit(self) -> str | None:
        """The edit of the designs, which must have the same; None where they do not edit."""
        found = {design.edit for design in self.designs}
        if len(found) > 1:
            raise UsageError(
                f"the designs are trained for different edits: {sorted(map(str, found))}"
            )
        return found.pop() if found else None


@dataclass(frozen=True)
class Trial:
    """One run: a design, a seed, and the scales its training zoo was augmented by (None: as it
    is)."""

    design: Design
    seed: int
    augment: Range | None
    schedule: Schedule

    @property
    def name(self) -> str:
        return label(self.design)

    def key(self, plan: Comparison, data: str) -> str:
        """All that the run and its row depend on, as a file name."""
        tried = [plan.task, plan.group, plan.ranges]
        record = json.dumps([dataclasses.asdict(self), tried, data], sort_keys=True)
        return hashlib.sha256(record.encode()).hexdigest()[:16]


def label(design: Design) -> str:
    """`monomial_nfn exact eps=0.5`: how a design is called in tables."""
    settings = [f"{k}={v}" for k, v in sorted(design.config.items())]
    return " ".join([design.architecture, design.quasi, *settings])


def load(path: Path) -> Comparison:
    """Read a comparison; UsageError names what is wrong."""
    document = read_toml(path)
    shared = document.pop("config", {})
    given = [fields(Design, d, f"{path} [[design]]") for d in document.pop("design", [])]
    designs = tuple(Design(**{**d, "config": {**shared, **d.get("config", {})}}) for d in given)
    schedule = Schedule(**fields(Schedule, document.pop("schedule", {}), f"{path} [schedule]"))
    fields(Comparison, document, str(path))
    for name in ("ranges", "augment"):
        document[name] = tuple((float(low), float(high)) for low, high in document.get(name, ()))
    document["seeds"] = tuple(document.get("seeds", (0, 1, 2)))
    document["augmented"] = tuple(document.get("augmented", ()))
    document["thresholds"] = tuple(map(float, document.get("thresholds", ())))
    found = Comparison(schedule=schedule, designs=designs, **document)
    if not designs:
        raise UsageError(f"{path}: no [[design]] to compare")
    if found.thresholds and not registry.load("tasks", found.task).ORDERED:
        raise UsageError(f"{path}: thresholds are for accuracies, and the task is {found.task}")
    known = [label(design) for design in designs]
    for name in (*filter(None, [found.reference]), *found.augmented):
        if name not in known:
            raise UsageError(f"{path}: '{name}' is not among the designs", "; ".join(known))
    return found


def trials(plan: Comparison) -> Iterator[Trial]:
    """Every run of the comparison, seeds outermost, so that an early stop leaves whole seeds."""
    for seed in plan.seeds:
        for augment in (None, *plan.augment):
            for design in plan.designs:
                if augment is None or not plan.augmented or label(design) in plan.augmented:
                    yield Trial(design, seed, augment, _schedule(plan, augment))


def _schedule(plan: Comparison, augment: Range | None) -> Schedule:
    """Half the epochs over a doubled zoo: every run of a comparison takes as many steps."""
    whole = plan.schedule
    return whole if augment is None else dataclasses.replace(whole, epochs=-(-whole.epochs // 2))


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


def run(
    trial: Trial, plan: Comparison, sample: Sample
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Train one design; its row, and its predictions of the test networks under every range
    tried."""
    task = registry.load("tasks", plan.task)
    parts = {name: sample.split(name) for name in ("train", "val", "test")}
    learn = {name: parts[name] for name in ("train", "val")}
    if trial.augment:
        learn = {n: doubled(s, plan.group, trial.augment, 7 + trial.seed) for n, s in learn.items()}
    with torch.random.fork_rng():
        torch.manual_seed(trial.seed)
        model = trial.design.build_mixed(sample.spaces, task.outputs(sample.classes))
    rows = {n: Rows(carried(trial.design, s.networks), s.target) for n, s in learn.items()}
    calibrate(model, rows["train"].networks)
    start = time.process_time()
    Run(model, task, trial.schedule, trial.seed).fit(rows["train"], rows["val"])
    seconds = time.process_time() - start
    space, *others = sample.spaces
    predictor = Predictor(
        trial.name, space, trial.design, plan.task, model, {}, sample.classes, tuple(others)
    )
    return _measured(trial, plan, predictor, parts["test"], seconds)


def _measured(
    trial: Trial, plan: Comparison, predictor: Predictor, test: Sample, seconds: float
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    task = registry.load("tasks", plan.task)
    start = time.process_time()
    answers = predictor.predict_all(test.networks)
    per_network = (time.process_time() - start) / len(test)
    prediction, label_ = scored(task, answers, test.target)
    predictions = {"none": prediction}
    for scales in dict.fromkeys((*plan.ranges, *filter(None, [trial.augment]))):
        copies = orbit(test, plan.group, scales, 99)
        predictions[named(scales)], _ = scored(
            task, predictor.predict_all(copies.networks), test.target
        )
    row: dict[str, Any] = {
        "design": trial.name,
        "augment": named(trial.augment),
        "seed": trial.seed,
        **task.score(predictions[named(trial.augment)], label_),
        "parameters": predictor.parameters,
        "seconds": seconds,
        "inference_ms": 1e3 * per_network,
        "invariance_error": worst_error(predictor, plan.group, test),
    }
    for name, values in predictions.items():
        row[f"{task.METRIC} {name}"] = task.score(values, label_).get(task.METRIC)
    layer = getattr(predictor.metanetwork, "quasi", None)
    if layer is not None:
        row["eps"] = _strengths(layer)
    return row, {"label": label_, **predictions}


def _strengths(layer: torch.nn.Module) -> list[float]:
    """eps of every layer of a chain's quasi layer, or of every block of one for attention."""
    own = getattr(layer, "eps", None)
    state = layer.state_dict().items()
    kept = [x for name, x in state if name.rpartition(".")[2] == "eps"]
    found = [own().detach()] if callable(own) else kept
    return torch.cat([x.reshape(-1) for x in found]).tolist()


def named(scales: Range | None) -> str:
    return "none" if scales is None else f"{scales[0]:g}:{scales[1]:g}"


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


def _save(row: dict[str, Any], predictions: dict[str, np.ndarray], path: Path) -> None:
    import pandas

    table = pandas.DataFrame({name: list(values) for name, values in predictions.items()})
    table.attrs = {"row": json.dumps(row)}
    beside(path, lambda p: table.to_parquet(p, index=False))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    import pandas

    table = pandas.read_parquet(path)
    return json.loads(table.attrs["row"]), {n: np.stack(table[n].to_list()) for n in table}


def _start(sample: Sample) -> None:
    global _SAMPLE  # a worker's one argument that is too large to send with every trial
    torch.set_num_threads(1)
    steady()
    _SAMPLE = sample


_SAMPLE: Sample


def _work(trial: Trial, plan: Comparison, path: Path) -> None:
    row, predictions = run(trial, plan, _SAMPLE)
    _save(row, predictions, path)


def compare(
    plan: Comparison,
    sample: Sample,
    folder: Path,
    workers: int = 1,
    advance: Callable[[int], None] = lambda n: None,
) -> list[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Run what is not yet in `folder`/runs, one single-threaded process a worker; returns every
    run."""
    folder.joinpath("runs").mkdir(parents=True, exist_ok=True)
    data = sample.networks.hash()
    kept = [(t, folder / "runs" / f"{t.key(plan, data)}.parquet") for t in trials(plan)]
    todo = [(trial, path) for trial, path in kept if not path.is_file()]
    advance(len(kept) - len(todo))
    jobs = [(trial, plan, path) for trial, path in todo]
    for _ in spread(_work, jobs, workers, _start, (sample,)):
        advance(1)
    return [_read(path) for _, path in kept]
