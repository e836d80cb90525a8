"""Scores of a predictor on a labelled zoo: per accuracy threshold, and along the orbits of a
group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qemcli import groups, registry
from qemcli.errors import InputError, UsageError
from qemcli.intervals import interval
from qemcli.predictors import Predictor, run_alike
from qemcli.samples import Sample, gather, scored
from qemcli.spaces import WeightSpace

if TYPE_CHECKING:
    from qemcli.zoos.zoo import Zoo


@dataclass(frozen=True)
class Plan:
    """thresholds on the true accuracy; group and scales of the augmentation, or None; seed."""

    thresholds: tuple[float, ...] = (0.0,)
    group: str | None = None
    scales: tuple[float, float] = (1.0, 10.0)
    seed: int = 0
    batch_size: int = 256
    device: str = "cpu"


def numbers(text: str, option: str) -> tuple[float, ...]:
    """`0,.2,.4` as numbers; UsageError names the option."""
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text}: not a list of numbers", "for example 0,.2,.4") from None


def scales(text: str) -> tuple[float, float]:
    """`LO:HI` as two positive numbers; UsageError otherwise."""
    try:
        low, high = (float(word) for word in text.split(":"))
    except ValueError:
        raise UsageError(f"--scale-range {text}: not LO:HI", "for example 1:10000") from None
    if not 0 < low <= high:
        raise UsageError(f"--scale-range {text}: 0 < LO <= HI is needed")
    return low, high


def held_out(zoo: Zoo, split: str, say: Callable[[str], None]) -> Zoo:
    """The rows that a score may speak of: the named split; `auto` is test where the zoo has one,
    else all."""
    has = "split" in zoo.index and zoo.index["split"].notna().any()
    if split == "auto":
        split = "test" if has and (zoo.index["split"] == "test").any() else "all"
        n = len(zoo.index) if split == "all" else int((zoo.index["split"] == split).sum())
        say(f"scored on: {split} ({n} rows)")
    if split == "all":
        return zoo
    if not has or not (zoo.index["split"] == split).any():
        raise InputError(f"the zoo has no '{split}' split", "use --split all")
    return zoo.split(split)


def moved(sample: Sample, plan: Plan) -> Iterator[tuple[str, Sample]]:
    """The sample as it is, then under one random element of the group a network."""
    yield "none", sample
    group = plan.group
    if group is None:
        return
    for space in sample.spaces:
        if reason := groups.allowed(group, space):
            raise UsageError(f"--augment {group}: {reason}")
    generator = torch.Generator().manual_seed(plan.seed)

    def move(space: WeightSpace, flat: torch.Tensor) -> torch.Tensor:
        element = groups.sample(group, space, len(flat), generator, scale_range=plan.scales)
        return space.flatten(groups.act(element, space, space.unflatten(flat)))

    name = f"{group} {plan.scales[0]:g}:{plan.scales[1]:g}"
    yield name, replace(sample, networks=sample.networks.map(move))


def readable(predictor: Predictor, space: WeightSpace) -> None:
    """InputError where the predictor does not read networks of this weight space as they are."""
    if predictor.reads(space) or (predictor.fits(space) and not predictor.met(space)):
        return
    own = predictor.space.title
    if predictor.others:
        own = f"{len(predictor.spaces)} architectures, most of them {own}"
    alike = any(run_alike(s, space) for s in predictor.spaces)
    raise InputError(
        f"'{predictor.name}' reads {own}; the zoo holds "
        f"{space.title}{'' if alike else ', run in another way'}"
    )


def evaluate(predictor: Predictor, zoo: Zoo, plan: Plan) -> list[dict[str, Any]]:
    """One row for each augmentation and threshold: n, and every metric with its 95 % interval."""
    task = registry.load("tasks", predictor.task)
    if plan.thresholds != Plan.thresholds and not task.ORDERED:
        raise UsageError(f"--thresholds: a {task.TARGET} is neither more nor less than another")
    sample = gather([zoo], task, edit=predictor.design.edit)
    for space in sample.spaces:
        readable(predictor, space)
    rows = []
    for name, networks in moved(sample, plan):
        answers = predictor.predict_all(networks.networks, plan.batch_size, plan.device)
        prediction, label = scored(task, answers, networks.target)
        for threshold in plan.thresholds:
            keep = label >= threshold
            row: dict[str, Any] = {"augment": name, "threshold": threshold, "n": int(keep.sum())}
            rows.append({**row, **with_intervals(task, prediction[keep], label[keep], plan.seed)})
    return rows


def with_intervals(
    task: Any, prediction: np.ndarray, label: np.ndarray, seed: int
) -> dict[str, float]:
    """{tau, tau_low, tau_high, r2, ...}; nothing where fewer than three networks are left."""
    if len(label) < 3:
        return {}
    found: dict[str, float] = {}
    for name, value in task.score(prediction, label).items():
        low, high = interval(partial(_one, task, name), prediction, label, seed)
        found |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return found


def _one(task: Any, name: str, prediction: np.ndarray, label: np.ndarray) -> float:
    return task.score(prediction, label)[name]


def predicted(predictor: Predictor, zoo: Zoo, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """(predictions, labels) of the zoo's labelled networks, as they are stored."""
    task = registry.load("tasks", predictor.task)
    sample = gather([zoo], task, edit=predictor.design.edit)
    answers = predictor.predict_all(sample.networks, plan.batch_size, plan.device)
    return scored(task, answers, sample.target)
