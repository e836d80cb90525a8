"""From a recipe to a predictor with its card: open the zoos, split by run, train, score on what
was held out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qemcli import __version__, registry
from qemcli.designs import calibrate
from qemcli.errors import InputError, UsageError
from qemcli.evaluation import with_intervals
from qemcli.predictors import Predictor
from qemcli.recipes import Recipe
from qemcli.samples import Sample, carried, gather, scored
from qemcli.training import Rows, Run
from qemcli.zoos.alone import alone
from qemcli.zoos.opening import open_zoo

STATE = "training-state.pt"


@dataclass(frozen=True)
class Trained:
    """A predictor, its score on the held-out networks, one row an epoch, and where it lies."""

    predictor: Predictor
    test: dict[str, Any]
    history: list[dict[str, float]]
    folder: Path


def with_split(sample: Sample, seed: int, say: Callable[[str], None]) -> Sample:
    """The sample with a split column: its own, or 70/15/15 by run, so that no run is on two
    sides."""
    table = sample.index
    if "split" in table and (table["split"] == "train").any():
        return sample
    key = "run" if "run" in table and table["run"].notna().all() else "checkpoint"
    runs = np.array(sorted(table[key].unique()))
    order = np.random.default_rng(seed).permutation(len(runs))
    bounds = np.array([0.7, 0.85]) * len(runs)
    side = np.digitize(np.arange(len(runs)), bounds)
    names = dict(zip(runs[order], np.array(["train", "val", "test"])[side], strict=True))
    say(f"the zoo has no split: 70/15/15 by {key}, seed {seed}")
    return dataclasses.replace(sample, index=table.assign(split=table[key].map(names)))


def _selected(sample: Sample, where: str | None) -> Sample:
    from qemcli.zoos.where import rows

    return sample if where is None else sample.rows(np.flatnonzero(rows(sample.index, where)))


def collect(
    recipe: Recipe, zoos: list[str], activation: str | None, say: Callable[[str], None]
) -> Sample:
    """Every labelled network of the recipe's zoos, split by run; rows of the test split also by
    `test_where`."""
    names: list[str | None] = list(zoos or recipe.zoos) or [None]
    opened = [
        open_zoo(name, say, where=recipe.where, activation=activation, splits=recipe.splits)
        for name in names
    ]
    task = registry.load("tasks", recipe.task)
    sample = gather(opened, task, activation, recipe.design.edit)
    if recipe.design.balanced and any(space.activation is None for space in sample.spaces):
        say("note: activation not known, so nothing is balanced; pass --activation NAME")
    sample = with_split(sample, recipe.seed, say)
    test = sample.index["split"].to_numpy() == "test"
    keep = ~test
    if recipe.test_where:
        from qemcli.zoos.where import rows

        keep |= test & rows(sample.index, recipe.test_where)
    return sample.rows(np.flatnonzero(keep)) if recipe.test_where else sample


def fresh(folder: Path, resume: bool) -> Path:
    """The output folder, not made yet; UsageError where it holds something and the run does not
    resume it."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder}: a file is in the way")
    if folder.is_dir() and any(folder.iterdir()) and not resume:
        raise UsageError(
            f"--out {folder}: it is not empty", "give another --out, or --resume to go on with it"
        )
    return folder


def fit(
    recipe: Recipe,
    sample: Sample,
    folder: Path,
    resume: bool = False,
    device: str = "cpu",
    on_epoch: Callable[[dict[str, float]], None] = lambda row: None,
) -> Trained:
    """Train the recipe's design on the sample's train split; writes predictor, card and history
    to `folder`."""
    task = registry.load("tasks", recipe.task)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = recipe.design.build_mixed(sample.spaces, task.outputs(sample.classes))
    ready = dataclasses.replace(sample, networks=carried(recipe.design, sample.networks))
    train, val, test = (ready.split(name) for name in ("train", "val", "test"))
    calibrate(model, train.networks)
    if not len(test):
        raise InputError(
            "no network is held out for the test score", "add split 'test' to the zoo's index"
        )
    run = Run(model, task, recipe.schedule, recipe.seed, device, folder / STATE)
    learn, hold = (Rows(part.networks, part.target) for part in (train, val))
    with alone(folder) if run.team.rank == 0 else nullcontext():
        history = run.fit(learn, hold, resume, on_epoch)
        space, *others = sample.spaces
        predictor = Predictor(
            folder.name, space, recipe.design, recipe.task, model.cpu(), {}, sample.classes,
            tuple(others),
        )  # fmt: skip
        held = sample.split("test")
        pair = scored(task, predictor.predict_all(held.networks), held.target)
        score = {"n": len(held), **with_intervals(task, *pair, recipe.seed)}
        predictor.provenance = provenance(recipe, sample, len(train), len(val), score)
        if run.team.rank == 0:
            _write(predictor, recipe, score, history, folder)
    return Trained(predictor, score, history, folder)


def provenance(
    recipe: Recipe, sample: Sample, train: int, val: int, score: dict[str, Any]
) -> dict[str, Any]:
    """What is needed to make the predictor again, and what it scored."""
    hashes = sorted(sample.index["sha256"]) if "sha256" in sample.index else []
    return {
        "qem": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seed": recipe.seed,
        "zoos": _names(recipe),
        "networks_sha256": hashlib.sha256("".join(hashes).encode()).hexdigest(),
        "train": train,
        "val": val,
        "schedule": dataclasses.asdict(recipe.schedule),
        "test": score,
    }


def _reads(predictor: Predictor) -> str:
    """The networks that it was trained on, in a sentence."""
    space = predictor.space
    if not predictor.others:
        return (
            f"Reads {space.family} networks of widths {space.widths}, {space.activation}, of "
            f"{space.size:,} parameters each."
        )
    sizes = [one.size for one in predictor.spaces]
    depths = [len(one.widths) - 1 for one in predictor.spaces]
    return (
        f"Reads networks of many architectures; it was trained on {len(sizes)}, of {min(sizes):,} "
        f"to {max(sizes):,} parameters and {min(depths)} to {max(depths)} layers, most of them "
        f"{space.title}."
    )


def _names(recipe: Recipe) -> list[str]:
    """The zoos by name: where they lie on this machine is nobody's business."""
    return [Path(zoo).name for zoo in recipe.zoos]


def _write(
    predictor: Predictor,
    recipe: Recipe,
    score: dict[str, Any],
    history: list[dict[str, float]],
    folder: Path,
) -> None:
    predictor.save(folder)
    (folder / "history.json").write_text(json.dumps(history, indent=1) + "\n")
    (folder / "README.md").write_text(card(predictor, recipe, score))
    (folder / STATE).unlink(missing_ok=True)


def card(predictor: Predictor, recipe: Recipe, score: dict[str, Any]) -> str:
    """The card of a freshly trained predictor: what it reads, what it claims, what it scored."""
    design = predictor.design
    groups = ", ".join(sorted(predictor.claims)) or "none"
    lines = [
        "---",
        "library_name: qem",
        f"task: {predictor.task}",
        f"architecture: {design.architecture}",
        f"quasi: {design.quasi}",
        f"seed: {recipe.seed}",
        "---",
        f"# {predictor.name}",
        "",
        f"{_reads(predictor)} Has {predictor.parameters:,} parameters.",
        f"Exactly invariant by design to: {groups}.",
        "",
        f"| metric | on {score['n']} held-out networks | 95 % interval |",
        "|---|---|---|",
    ]
    for name in ("tau", "r2", "mae", "accuracy", "macro_f1", "mse", "psnr"):
        if name in score:
            low, high = score[f"{name}_low"], score[f"{name}_high"]
            lines.append(f"| {name} | {score[name]:.4f} | {low:.4f} to {high:.4f} |")
    zoos = " ".join(f"--zoo {zoo}" for zoo in _names(recipe))
    lines += [
        "",
        f"Made again by `qem train RECIPE {zoos} --seed {recipe.seed}`.".replace("  ", " "),
        "",
    ]
    return "\n".join(lines)
