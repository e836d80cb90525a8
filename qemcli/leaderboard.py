"""What a comparison found: means over seeds, their intervals, paired differences, as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qemcli import registry
from qemcli.comparison import Comparison, named
from qemcli.intervals import over_seeds, paired
from qemcli.tables import Table, table

Runs = list[tuple[dict[str, Any], dict[str, np.ndarray]]]
RESAMPLES = 400
LOWEST = ("mse", "mae")  # scores that are best when they are lowest
SCORES = ("tau", "r2", "accuracy", "macro_f1", "psnr", *LOWEST)
TEXTS = ("zoo", "design", "architecture", "quasi", "config", "augment", "settings")
COSTS = ("parameters", "seconds", "inference_ms", "memory_mb")


def summary(plan: Comparison, runs: Runs) -> list[dict[str, Any]]:
    """One row a zoo, design and augmentation: means over seeds with the interval of the score, and
    the paired difference to the reference, both on test networks augmented as the training zoo was.
    """
    task = registry.load("tasks", plan.task)
    grouped: dict[tuple[str, str, str], Runs] = {}
    for row, predictions in runs:
        key = (row.get("zoo", ""), row["design"], row["augment"])
        grouped.setdefault(key, []).append((row, predictions))
    rows = []
    for (zoo, design, augment), members in grouped.items():
        label = members[0][1]["label"]
        ours = np.stack([p[augment] for _, p in members])
        found = _averaged(task.METRIC, [row for row, _ in members])
        _, low, high = over_seeds(task.resampled, ours, label, resamples=RESAMPLES)
        found |= {f"{task.METRIC}_low": low, f"{task.METRIC}_high": high}
        base = grouped.get((zoo, plan.reference, augment))
        if base and design != plan.reference and _seeds(base) == _seeds(members):
            theirs = np.stack([p[augment] for _, p in base])
            gap = paired(task.resampled, ours, theirs, label, resamples=RESAMPLES)
            found |= dict(zip(("difference", "low", "high"), gap, strict=True))
        rows.append(found | _thresholds(plan, augment, members))
    return rows


def _seeds(members: Runs) -> list[int]:
    return [row["seed"] for row, _ in members]


def above(metric: str, threshold: float) -> str:
    """How the score on networks of at least this accuracy is called in tables."""
    return f"{metric} from {threshold:g}"


def _thresholds(plan: Comparison, augment: str, members: Runs) -> dict[str, Any]:
    """The scores on networks of at least each accuracy, means over seeds, with their intervals over
    seeds and networks and the number of networks."""
    task = registry.load("tasks", plan.task)
    found: dict[str, Any] = {}
    for threshold in plan.thresholds:
        label = members[0][1]["label"]
        keep = label >= threshold
        if keep.sum() < 3:
            continue
        predictions = np.stack([p[augment][keep] for _, p in members])
        name = above(task.METRIC, threshold)
        value, low, high = over_seeds(task.resampled, predictions, label[keep])
        found |= {name: value, f"{name} low": low, f"{name} high": high}
        found[f"n from {threshold:g}"] = int(keep.sum())
    return found


def _averaged(metric: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is the same in all runs, and the means of the rest; of the invariance error the worst,
    and of memory the most."""
    found: dict[str, Any] = {k: rows[0][k] for k in TEXTS if k in rows[0]}
    found["seeds"] = len(rows)
    for name in rows[0]:
        values = [row[name] for row in rows if row.get(name) is not None]
        if name in (*TEXTS, "seed", "eps") or not values:
            continue
        worst = name in ("invariance_error", "memory_mb")
        found[name] = max(values) if worst else float(np.mean(values))
        if name == "parameters":  # of trees each seed has its own number
            found[name] = round(found[name])
        if name == metric:
            found["sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    if "eps" in rows[0]:
        found["eps"] = [float(e) for e in np.mean([row["eps"] for row in rows], axis=0)]
    return found


def augmented(plan: Comparison, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a design that was also trained on augmented zoos: its score on each of them, test
    networks augmented alike, and the interval of its paired difference to the reference there."""
    metric = registry.load("tasks", plan.task).METRIC
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        told = found.setdefault((row.get("zoo", ""), row["design"]), _place(row))
        told[row["augment"]] = row[metric]
        if "low" in row:
            told[f"{row['augment']} low"], told[f"{row['augment']} high"] = row["low"], row["high"]
    ranges = {named(scales) for scales in plan.augment}
    return [told for told in found.values() if ranges <= set(told)]


def columns(plan: Comparison, rows: list[dict[str, Any]]) -> list[str]:
    """What a person sees of the rows on a terminal, in this order: the rest is in the files."""
    metric = registry.load("tasks", plan.task).METRIC
    first = ["design", *(["augment"] if plan.augment else []), "seeds"]
    scores = [metric, f"{metric}_low", f"{metric}_high", "difference", "low", "high"]
    told = [*_zoo(plan), *first, *scores, *_ranges(plan), "invariance_error", *COSTS, "settings"]
    return [name for name in told if any(row.get(name) is not None for row in rows)]


def _ranges(plan: Comparison) -> list[str]:
    metric = registry.load("tasks", plan.task).METRIC
    return [f"{metric} {named(scales)}" for scales in plan.ranges]


def tables(plan: Comparison, rows: list[dict[str, Any]]) -> list[Table]:
    """The designs as they were trained on the zoo as it is; where the comparison has thresholds,
    their scores above them; where it augments, their scores on the augmented zoos."""
    plain = [row for row in rows if row["augment"] == "none"]
    found = [_plain(plan, plain)]
    if plan.thresholds:
        found.append(_above(plan, plain))
    if plan.augment:
        found.append(_augmented(plan, rows))
    return found


def _plain(plan: Comparison, rows: list[dict[str, Any]]) -> Table:
    metric = registry.load("tasks", plan.task).METRIC
    told = [
        {**row, metric: _with_interval(row, metric, f"{metric}_low", f"{metric}_high")}
        | (
            {"difference": _with_interval(row, "difference", "low", "high", "+")}
            if "low" in row
            else {}
        )
        for row in rows
    ]
    others = [name for name in ("r2", "macro_f1", "mse") if name != metric]
    shown = [*_zoo(plan), "design", "seeds", metric, "sd", *others, "difference", *_ranges(plan)]
    shown += ["invariance_error", "eps", *COSTS, "settings"]
    best = [name for name in shown if name.split()[0] in SCORES and name not in LOWEST]
    return table(told, shown, best, LOWEST, plan.title)


def _with_interval(
    row: dict[str, Any], name: str, low: str, high: str, sign: str = ""
) -> tuple[float, str]:
    """A number, and the same with its interval as it is shown."""
    value = row[name]
    ends = row.get(low, math.nan), row.get(high, math.nan)
    if not math.isfinite(value):
        return value, "–"
    if not all(map(math.isfinite, ends)):
        return value, f"{value:{sign}.3f}"
    return value, f"{value:{sign}.3f} ({ends[0]:{sign}.3f} to {ends[1]:{sign}.3f})"


def _above(plan: Comparison, plain: list[dict[str, Any]]) -> Table:
    """One row a design, one column a threshold: score (interval), and below them all the counts."""
    metric = registry.load("tasks", plan.task).METRIC
    names = {above(metric, t): f"n from {t:g}" for t in plan.thresholds}
    told: list[dict[str, Any]] = []
    for zoo in dict.fromkeys(row.get("zoo", "") for row in plain):
        rows = [row for row in plain if row.get("zoo", "") == zoo]
        told += [_place(row) | _scored(row, list(names)) for row in rows]
        counts = {name: rows[0].get(count) for name, count in names.items()}
        texts = {name: (None, str(n)) for name, n in counts.items() if n is not None}
        told.append(_place(rows[0]) | {"design": "networks", **texts})
    return table(told, [*_zoo(plan), "design", *names], list(names))


def _scored(row: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {n: _with_interval(row, n, f"{n} low", f"{n} high") for n in names if n in row}


def _augmented(plan: Comparison, rows: list[dict[str, Any]]) -> Table:
    """The scores, and in brackets the intervals of the differences to the reference."""
    zoos = ["none", *map(named, plan.augment)]
    told = []
    for row in augmented(plan, rows):
        cells: dict[str, Any] = {}
        for zoo in zoos:
            text = "–" if not math.isfinite(row[zoo]) else f"{row[zoo]:.3f}"
            if f"{zoo} low" in row and math.isfinite(row[zoo]):
                text += f" ({row[f'{zoo} low']:+.3f} to {row[f'{zoo} high']:+.3f})"
            cells[zoo] = (row[zoo], text)
        told.append(_place(row) | cells)
    return table(told, [*_zoo(plan), "design", *zoos], zoos)


def _place(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("zoo", "design") if name in row}


def _zoo(plan: Comparison) -> list[str]:
    return ["zoo"] if len(plan.zoos) > 1 else []
