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
    if plan.group is None:
        return
    reason = groups.allowed(plan.group, sample.space)
    if reason:
        raise UsageError(f"--augment {plan.group}: {reason}")
    generator = torch.Generator().manual_seed(plan.seed)
    element = groups.sample(
        plan.group, sample.space, len(sample), generator, scale_range=plan.scales
    )
    w = groups.act(element, sample.space, sample.space.unflatten(sample.flat))
    name = f"{plan.group} {plan.scales[0]:g}:{plan.scales[1]:g}"
    yield name, replace(sample, flat=sample.space.flatten(w))


def evaluate(predictor: Predictor, zoo: Zoo, plan: Plan) -> list[dict[str, Any]]:
    """One row for each augmentation and threshold: n, and every metric with its 95 % interval."""
    task = registry.load("tasks", predictor.task)
    if plan.thresholds != Plan.thresholds and not task.ORDERED:
        raise UsageError(f"--thresholds: a {task.TARGET} is neither more nor less than another")
    sample = gather([zoo], task, edit=predictor.design.edit)
    if not predictor.reads(sample.space):
        alike = run_alike(predictor.space, sample.space)
        raise InputError(
            f"'{predictor.name}' reads {predictor.space.title}; the zoo holds "
            f"{sample.space.title}{'' if alike else ', run in another way'}"
        )
    rows = []
    for name, networks in moved(sample, plan):
        answers = predictor.predict(networks.flat, plan.batch_size, plan.device)
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
    return scored(task, predictor.predict(sample.flat, plan.batch_size, plan.device), sample.target)
