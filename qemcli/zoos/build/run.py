"""Build a zoo: the recipe's networks in blocks, one single-threaded process a core, resumable."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qemcli import __version__
from qemcli.processes import spread
from qemcli.zoos.build.recipe import Recipe
from qemcli.zoos.build.sources import Images
from qemcli.zoos.store import Store, beside

SPLIT = (0.6, 0.7)  # train below the first, val below the second, test above: by run


def blocks(recipe: Recipe) -> list[list[int]]:
    """Network numbers of every block."""
    numbers = range(recipe.models)
    return [list(numbers[i : i + recipe.block]) for i in range(0, recipe.models, recipe.block)]


def splits(recipe: Recipe) -> np.ndarray:
    """train, val or test for every network: 60/10/30 in an order drawn from the recipe's seed."""
    order = np.random.default_rng((recipe.seed, 2**32)).permutation(recipe.models)
    rank = np.empty(recipe.models)
    rank[order] = (np.arange(recipe.models) + 0.5) / recipe.models
    return np.array(["train", "val", "test"])[np.digitize(rank, SPLIT)]


def build(
    recipe: Recipe,
    images: Images,
    folder: Path,
    workers: int,
    resume: bool = False,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Train every block that is not there yet, then write index, zoo.json and card; returns the
    summary.

    Raises UsageError where `folder` holds something else, or the start of another recipe's zoo.
    """
    store = Store(folder, resume, dataclasses.asdict(recipe))
    work = blocks(recipe)
    todo = [b for b in range(len(work)) if not store.done(b)]
    advance(recipe.models - sum(len(work[b]) for b in todo))
    if workers > 1 and len(todo) > 1:
        jobs = [(b, work[b], folder) for b in todo]
        for i in spread(_block, jobs, workers, _start, (recipe, images)):
            advance(len(work[todo[i]]))
    else:
        _start(recipe, images)
        for block in todo:
            _block(block, work[block], folder)
            advance(len(work[block]))
    return _finished(recipe, store, len(work))


_RECIPE: Recipe
_IMAGES: Images


def _start(recipe: Recipe, images: Images) -> None:
    global _RECIPE, _IMAGES  # a worker's two arguments that are too large to send with every block
    import torch

    from qemcli.machine import steady

    torch.set_num_threads(1)
    steady()
    _RECIPE, _IMAGES = recipe, images


def _block(block: int, numbers: list[int], folder: Path) -> None:
    """Train one block, all activations of it, and write it whole."""
    from qemcli.zoos.build import cnn

    networks = [cnn.draw(_RECIPE, number) for number in numbers]
    split = splits(_RECIPE)
    flats, rows = [], []
    for activation in sorted({n.hyper["activation"] for n in networks}):
        group = [n for n in networks if n.hyper["activation"] == activation]
        space = cnn.space_of(_RECIPE, activation, _IMAGES)
        trained = cnn.Block(space, group, _RECIPE, _IMAGES)
        for step, weights, scores in cnn.train(trained):
            flats.append(weights)
            rows += [
                _row(network, step, score, str(split[network.number]))
                for network, score in zip(trained.networks, scores, strict=True)
            ]
    shared = _RECIPE.activation[0] if len(set(_RECIPE.activation)) == 1 else None
    space = dataclasses.replace(space, activation=shared)  # None: each row says its own
    flat = np.concatenate(flats)
    order = sorted(range(len(rows)), key=lambda i: rows[i]["checkpoint"])
    Store(folder, resume=True).write(block, space, flat[order], [rows[i] for i in order])


def _row(network: Any, step: int, score: dict[str, float], split: str) -> dict[str, Any]:
    run = f"run-{network.number:05d}"
    hyper = {f"config.{name}": value for name, value in network.hyper.items()}
    return {
        "checkpoint": f"{run}/step-{step:05d}",
        "run": run,
        "step": np.int32(step),
        "final": step == max(_RECIPE.checkpoints),
        "split": split,
        **score,
        **hyper,
        "activation": network.hyper["activation"],
        "seed": network.seed,
    }


def _finished(recipe: Recipe, store: Store, count: int) -> dict[str, Any]:
    record = {"recipe": dataclasses.asdict(recipe), "licence": recipe.licence, "name": recipe.name}
    about = {**record, "provenance": {"command": "qem build", "qem": __version__}}
    table = store.finish(count, about)
    final = table[table["final"]]
    quantiles = final["test_accuracy"].quantile([0, 0.25, 0.5, 0.75, 1]).round(4).tolist()
    summary = {
        "zoo": str(store.folder),
        "networks": len(final),
        "checkpoints": len(table),
        "not_finite": int((~table["finite"]).sum()),
        "test_accuracy_quantiles": quantiles,
    }
    text = card(recipe, summary)
    beside(store.folder / "README.md", lambda p: p.write_text(text))
    return summary


def card(recipe: Recipe, summary: dict[str, Any]) -> str:
    """The zoo's card: data, licence, what was drawn, how it is built again."""
    low, q25, middle, q75, high = summary["test_accuracy_quantiles"]
    fields = dataclasses.asdict(recipe)
    drawn = ("lr", "l2", "init", "init_std", "dropout", "optimizer", "train_fraction", "activation")
    lines = [
        "---",
        "library_name: qem",
        f"license: {recipe.licence}",
        "tags: [model-zoo, weight-space]",
        "---",
        f"# {recipe.name}",
        "",
        recipe.about or f"Small CNNs trained on {recipe.source}.",
        "",
        f"{summary['networks']} networks, {summary['checkpoints']} checkpoints (steps "
        f"{', '.join(map(str, recipe.checkpoints))}; batch {recipe.batch}), split 60/10/30 by run. "
        f"{summary['not_finite']} checkpoints hold weights that are not finite.",
        "",
        f"Test accuracy of the final networks on {recipe.test_images} held-out images: "
        f"minimum {low:.3f}, quartiles {q25:.3f}, {middle:.3f}, {q75:.3f}, maximum {high:.3f}.",
        "",
        "Drawn for every network: "
        + "; ".join(f"{name} {list(fields[name])}" for name in drawn)
        + ".",
        "",
        f"Built again by `qem build {recipe.name} --models {recipe.models} --seed {recipe.seed} "
        "--out DIR`; recipe.json holds every setting.",
        "",
    ]
    return "\n".join(lines)
