"""What a comparison found: means over seeds, paired differences, and the same as Markdown."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qemcli import registry
from qemcli.comparison import Comparison, named
from qemcli.intervals import over_seeds, paired

Runs = list[tuple[dict[str, Any], dict[str, np.ndarray]]]


def table(plan: Comparison, runs: Runs) -> list[dict[str, Any]]:
    """One row a design and augmentation: means over seeds, and the paired difference to the
    reference, both on test networks augmented as the training zoo was."""
    task = registry.load("tasks", plan.task)
    metric = getattr(task, task.METRIC)
    grouped: dict[tuple[str, str], Runs] = {}
    for row, predictions in runs:
        grouped.setdefault((row["design"], row["augment"]), []).append((row, predictions))
    rows = []
    for (design, augment), members in grouped.items():
        found = _averaged(design, augment, task.METRIC, [row for row, _ in members])
        base = grouped.get((plan.reference, augment))
        if base and design != plan.reference and len(base) == len(members):
            ours, theirs = (np.stack([p[augment] for _, p in part]) for part in (members, base))
            gap = paired(metric, ours, theirs, members[0][1]["label"], resamples=400)
            found |= dict(zip(("difference", "low", "high"), gap, strict=True))
        rows.append(found | _thresholds(plan, augment, members))
    return rows


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


def _averaged(design: str, augment: str, metric: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"design": design, "augment": augment, "seeds": len(rows)}
    for name in rows[0]:
        values = [row[name] for row in rows if row[name] is not None]
        if name in ("design", "augment", "seed", "eps") or not values:
            continue
        found[name] = max(values) if name == "invariance_error" else float(np.mean(values))
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
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        told = found.setdefault(row["design"], {"design": row["design"]})
        told[row["augment"]] = row[metric]
        if "low" in row:
            told[f"{row['augment']} low"], told[f"{row['augment']} high"] = row["low"], row["high"]
    ranges = {named(scales) for scales in plan.augment}
    return [told for told in found.values() if ranges <= set(told)]


def tables(plan: Comparison, rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Markdown: the designs as they were trained on the zoo as it is; where the comparison has
    thresholds, their scores above them; where it augments, their scores on the augmented zoos."""
    plain = [row for row in rows if row["augment"] == "none"]
    text = markdown(plain, [name for name in columns if name != "augment"])
    if plan.thresholds:
        text += f"\n{_above(plan, plain)}"
    if not plan.augment:
        return text
    zoos = ["none", *map(named, plan.augment)]
    found = augmented(plan, rows)
    for told in found:
        for zoo in zoos:
            if f"{zoo} low" in told and math.isfinite(told[zoo]):
                low, high = told[f"{zoo} low"], told[f"{zoo} high"]
                told[zoo] = f"{told[zoo]:.3f} ({low:+.3f} to {high:+.3f})"
    return f"{text}\n{markdown(found, ['design', *zoos])}"


def _above(plan: Comparison, plain: list[dict[str, Any]]) -> str:
    """One row a design, one column a threshold: score (interval), and below them all the counts."""
    metric = registry.load("tasks", plan.task).METRIC
    names = {above(metric, t): f"n from {t:g}" for t in plan.thresholds}
    rows = [{"design": row["design"], **_cells(row, list(names))} for row in plain]
    counts = {name: plain[0].get(count) for name, count in names.items()}
    return markdown([*rows, {"design": "networks", **counts}], ["design", *names])


def _cells(row: dict[str, Any], names: list[str]) -> dict[str, str]:
    told = {name: row[name] for name in names if math.isfinite(row.get(name, math.nan))}
    return {
        name: f"{value:.3f} ({row[f'{name} low']:.3f} to {row[f'{name} high']:.3f})"
        for name, value in told.items()
    }


def markdown(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """The table as Markdown, four digits."""

    def cell(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(f"{v:.2f}" for v in value)
        if isinstance(value, float) and math.isfinite(value):
            return f"{value:.3f}" if 1e-3 <= abs(value) < 1e3 or value == 0 else f"{value:.1e}"
        unknown = value is None or isinstance(value, float)  # no number: some run was constant
        return "–" if unknown else f"{value:,}" if isinstance(value, int) else str(value)

    shown = [name for name in columns if any(name in row for row in rows)]
    lines = ["| " + " | ".join(shown) + " |", "|" + "---|" * len(shown)]
    lines += ["| " + " | ".join(cell(row.get(name)) for name in shown) + " |" for row in rows]
    return "\n".join(lines) + "\n"
