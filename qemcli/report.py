"""Pictures from results; matplotlib comes with the extra `plots`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qemcli.errors import EnvironmentFailure, UsageError


def _figure(width: float = 5.0, height: float = 5.0) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise EnvironmentFailure(
            "pictures need matplotlib", "pip install 'qemcli[plots]'"
        ) from None
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write the figure by its suffix; UsageError where there is no such folder."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"{path}: a picture is a .png, .svg or .pdf file")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: no such folder")
    figure.savefig(path, dpi=120)


def scatter(prediction: np.ndarray, label: np.ndarray, title: str, path: Path) -> None:
    """Predicted (vertical) against true (horizontal) with the line of perfect prediction."""
    figure = _figure()
    axes = figure.subplots()
    low, high = min(prediction.min(), label.min()), max(prediction.max(), label.max())
    axes.plot([low, high], [low, high], color="0.6", linewidth=1, zorder=0)
    axes.scatter(label, prediction, s=12, alpha=0.6, linewidths=0)
    axes.set_xlabel("true test accuracy")
    axes.set_ylabel("predicted from the weights")
    axes.set_title(title, fontsize=10)
    axes.set_aspect("equal", adjustable="datalim")
    save(figure, path)


def confusion(
    prediction: np.ndarray, label: np.ndarray, classes: tuple[str, ...], title: str, path: Path
) -> None:
    """Counts by label (down) and likeliest class (across), shaded by the share of the label."""
    found, wanted, n = prediction.argmax(axis=1), label.astype(int), len(classes)
    counts = np.zeros((n, n), dtype=int)
    known = wanted < n
    np.add.at(counts, (wanted[known], found[known]), 1)
    figure = _figure(2.5 + 0.35 * n, 2.0 + 0.35 * n)
    axes = figure.subplots()
    axes.imshow(counts / counts.sum(axis=1, keepdims=True).clip(1), cmap="Greys", vmin=0, vmax=1)
    for i, j in zip(*np.nonzero(counts), strict=True):
        axes.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=7, color="C3")
    axes.set_xticks(range(n), classes, rotation=90, fontsize=8)
    axes.set_yticks(range(n), classes, fontsize=8)
    axes.set_xlabel("likeliest class, from the weights")
    axes.set_ylabel("label")
    axes.set_title(title, fontsize=10)
    save(figure, path)


def tradeoff(rows: list[dict[str, Any]], metric: str, path: Path) -> None:
    """Score against invariance error (log scale), one mark a design; bars are one deviation over
    seeds."""
    floor = 1e-16
    figure = _figure(9.0, 5.0)
    axes = figure.subplots()
    for i, row in enumerate(row for row in rows if row.get("augment", "none") == "none"):
        error = max(float(row["invariance_error"]), floor)
        colour, marker = f"C{i % 10}", "osD^vP*X"[i // 10 % 8]
        bars = {"yerr": row.get("sd", 0.0), "fmt": marker, "color": colour, "capsize": 2}
        axes.errorbar([error], [row[metric]], label=row["design"], **bars)
    axes.set_xscale("log")
    axes.set_xlabel("invariance error: largest change along the orbit / spread of the answers")
    shown = {"tau": "Kendall's τ"}.get(metric, metric)
    axes.set_ylabel(f"{shown} on held-out networks")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def augmented(rows: list[dict[str, Any]], metric: str, path: Path) -> None:
    """Score (vertical) on zoos augmented by growing scales, one line a design."""
    figure = _figure(8.0, 4.5)
    axes = figure.subplots()
    for i, row in enumerate(rows):
        zoos = [name for name in row if name != "design" and not name.endswith((" low", " high"))]
        scores = [row[zoo] for zoo in zoos]
        axes.plot(zoos, scores, marker="osD^vP*X"[i % 8], color=f"C{i % 10}", label=row["design"])
    axes.set_xlabel("scales of the copies that train and test networks were augmented by")
    axes.set_ylabel(metric)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def errors(rows: list[dict[str, Any]], path: Path) -> None:
    """Largest error of every row of a verification (log scale), with the tolerance it is held
    to."""
    floor = 1e-18
    names = [
        " ".join(str(r[k]) for k in ("kind", "group", "elements", "layer") if r.get(k))
        for r in rows
    ]
    figure = _figure(8.0, 1.2 + 0.24 * len(rows))
    axes = figure.subplots()
    colours = {True: "C2", False: "C3", None: "C7"}
    for place, row in enumerate(rows):
        error = min(max(row["max_error"], floor), 1e6)
        colour = "C0" if row["kind"] == "control" else colours[row["holds"]]
        axes.barh(place, np.log10(error / floor), left=np.log10(floor), color=colour, height=0.7)
        if row["tolerance"]:
            axes.plot([np.log10(row["tolerance"])] * 2, [place - 0.4, place + 0.4], color="k")
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("log10 of the largest error over the spread of the answers; | is the tolerance")
    axes.set_title("green holds, red does not, blue: controls that must move", fontsize=9)
    save(figure, path)
