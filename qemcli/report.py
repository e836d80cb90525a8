"""Pictures from results; matplotlib comes with the extra `plots`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qemcli.errors import EnvironmentFailure, UsageError
from qemcli.writing import beside

FORMATS = (".png", ".svg", ".pdf")
MARKS, LINES = "osD^vP*X", ("-", "--", ":", "-.")
SHOWN = {"tau": "Kendall's τ", "psnr": "PSNR, dB,"}
COSTS = {  # columns of a comparison, as pictures call them
    "parameters": "parameters",
    "seconds": "training, seconds of one processor",
    "inference_ms": "inference, milliseconds a network",
    "memory_mb": "peak memory of the training, MB",
}
TILE, GAP, LINE = 96, 8, 13  # pixels of a sheet: an image's side, between images, a line of text


def _figure(width: float = 5.0, height: float = 5.0, layout: Any = "constrained") -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise EnvironmentFailure(
            "pictures need matplotlib", "pip install 'qemcli[plots]'"
        ) from None
    return Figure(figsize=(width, height), layout=layout)


def check(path: Path) -> None:
    """UsageError where no picture can be written to `path`; asked before the work begins."""
    if path.suffix not in FORMATS:
        raise UsageError(f"{path}: a picture is a .png, .svg or .pdf file")
    if not path.parent.is_dir() or path.is_dir():
        raise UsageError(f"{path}: no such folder" if not path.is_dir() else f"{path}: a folder")


def save(figure: Any, path: Path, dpi: int = 120) -> None:
    """Write the figure by its suffix, beside the target and renamed; raises as `check`."""
    check(path)
    beside(path, lambda p: figure.savefig(p, dpi=dpi, format=path.suffix[1:]))


def sheet(
    rows: Sequence[Sequence[np.ndarray]],
    captions: Sequence[Sequence[str]],
    path: Path,
    names: Sequence[str] = (),
) -> None:
    """A contact sheet: rows of images (c, h, w) on the [0, 1] scale, clipped to it for display.

    `captions` holds one text an image, row by row (an empty row: none); `names` one text a row,
    at its left. Images keep their pixels: each is enlarged by a whole number.
    """
    largest = max(max(image.shape[1:]) for row in rows for image in row)
    side = largest * max(1, round(TILE / largest))
    captions = [*captions, *([()] * (len(rows) - len(captions)))]
    text = [LINE * max((c.count("\n") + 1 for c in row), default=0) for row in captions]
    left = GAP + (TILE if any(names) else 0)
    width = left + max(map(len, rows)) * (side + GAP)
    tops = np.cumsum([GAP, *(side + GAP + t for t in text)])
    canvas = np.ones((int(tops[-1]), width, 3))
    figure = _figure(width / 100, int(tops[-1]) / 100, "none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for i, (row, top) in enumerate(zip(rows, tops, strict=False)):
        for j, image in enumerate(row):
            at = left + j * (side + GAP)
            _place(canvas[top : top + side, at : at + side], image)
            said = _shown(captions[i][j]) if j < len(captions[i]) else ""
            style = {"ha": "center", "va": "top", "fontsize": 6.5, "parse_math": False}
            axes.text(at + side / 2, top + side + 2, said, **style)
        if i < len(names):
            axes.text(GAP, top + side / 2, names[i], va="center", fontsize=8, parse_math=False)
    extent = (0, width, int(tops[-1]), 0)
    axes.imshow(canvas, extent=extent, interpolation="nearest", aspect="auto")
    save(figure, path, 100)


def _place(tile: np.ndarray, image: np.ndarray) -> None:
    """Enlarge the image by a whole number and put it into the middle of the tile."""
    pixels = np.broadcast_to(image, (3, *image.shape[1:])).transpose(1, 2, 0)
    by = len(tile) // max(image.shape[1:])
    large = np.kron(np.clip(pixels, 0, 1), np.ones((by, by, 1)))
    top, left = (len(tile) - large.shape[0]) // 2, (len(tile) - large.shape[1]) // 2
    tile[:] = 0.9
    tile[top : top + large.shape[0], left : left + large.shape[1]] = large


def _shown(text: str) -> str:
    """What the font has; anything else, and what could drive a viewer, is a question mark."""
    known = (
        c if c == "\n" or (c.isprintable() and c < "\u0250") or c == "…" else "?" for c in text
    )
    return "".join(known)


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
    figure = _figure(9.0, _height(rows))
    axes = figure.subplots()
    for i, row in enumerate(_plain(rows)):
        error = max(float(row["invariance_error"]), floor)
        colour, marker = f"C{i % 10}", MARKS[i // 10 % len(MARKS)]
        bars = {"yerr": row.get("sd", 0.0), "fmt": marker, "color": colour, "capsize": 2}
        axes.errorbar([error], [row[metric]], label=row["design"], **bars)
    axes.set_xscale("log")
    axes.set_xlabel("invariance error: largest change along the orbit / spread of the answers")
    axes.set_ylabel(_score(metric))
    _legend(axes)
    save(figure, path)


def cost(rows: list[dict[str, Any]], metric: str, name: str, path: Path) -> None:
    """Score against what a design costs, `name` a column of COSTS (log scale), one mark a design;
    bars are the 95 % interval over seeds and networks."""
    figure = _figure(9.0, _height(rows))
    axes = figure.subplots()
    for i, row in enumerate(_plain(rows)):
        if not row.get(name):
            continue
        ends = [abs(row[metric] - row[f"{metric}_{end}"]) for end in ("low", "high")]
        bars = {"yerr": [[ends[0]], [ends[1]]], "color": f"C{i % 10}", "capsize": 2}
        mark = MARKS[i // 10 % len(MARKS)]
        axes.errorbar([row[name]], [row[metric]], fmt=mark, label=row["design"], **bars)
    axes.set_xscale("log")
    axes.set_xlabel(COSTS[name])
    axes.set_ylabel(_score(metric))
    _legend(axes)
    save(figure, path)


def ranges(rows: list[dict[str, Any]], metric: str, names: Sequence[str], path: Path) -> None:
    """Score (vertical) of predictors trained on the zoo as it is, on test networks moved by growing
    scales, one line a design."""
    figure = _figure(9.0, _height(rows))
    axes = figure.subplots()
    for i, row in enumerate(_plain(rows)):
        scores = [row.get(f"{metric} {name}", np.nan) for name in names]
        style = {"color": f"C{i % 10}", "linestyle": LINES[i // 10 % len(LINES)]}
        axes.plot(names, scores, marker=MARKS[i % len(MARKS)], label=row["design"], **style)
    axes.set_xlabel("scales that test networks were moved by; the zoo in training as it is")
    axes.set_ylabel(_score(metric))
    _legend(axes)
    save(figure, path)


def augmented(rows: list[dict[str, Any]], metric: str, path: Path) -> None:
    """Score (vertical) on zoos augmented by growing scales, one line a design."""
    figure = _figure(8.0, 4.5)
    axes = figure.subplots()
    for i, row in enumerate(rows):
        told = ("design", "zoo")
        zoos = [name for name in row if name not in told and not name.endswith((" low", " high"))]
        scores = [row[zoo] for zoo in zoos]
        axes.plot(
            zoos, scores, marker=MARKS[i % len(MARKS)], color=f"C{i % 10}", label=row["design"]
        )
    axes.set_xlabel("scales of the copies that train and test networks were augmented by")
    axes.set_ylabel(_score(metric))
    _legend(axes)
    save(figure, path)


def _plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("augment", "none") == "none"]


def _height(rows: list[dict[str, Any]]) -> float:
    """Inches that hold the legend."""
    return max(5.0, 0.8 + 0.17 * len(_plain(rows)))


def _score(metric: str) -> str:
    return f"{SHOWN.get(metric, metric)} on held-out networks"


def _legend(axes: Any) -> None:
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


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
