"""A zoo of small CNNs: one block of them, trained, with the rows of its index."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from qemcli.spaces import Chain
from qemcli.zoos.build import cnn
from qemcli.zoos.build.drawn import DrawnRecipe
from qemcli.zoos.build.recipe import Recipe
from qemcli.zoos.build.sources import Images, load

if TYPE_CHECKING:
    import pandas

__all__ = ["block", "card", "load", "row", "splits", "summary"]

SPLIT = (0.6, 0.7)  # train below the first, val below the second, test above: by run


def splits(recipe: DrawnRecipe) -> np.ndarray:
    """train, val or test for every network: 60/10/30 in an order drawn from the recipe's seed."""
    order = np.random.default_rng((recipe.seed, 2**32)).permutation(recipe.models)
    rank = np.empty(recipe.models)
    rank[order] = (np.arange(recipe.models) + 0.5) / recipe.models
    return np.array(["train", "val", "test"])[np.digitize(rank, SPLIT)]


def block(
    recipe: Recipe, images: Images, numbers: list[int], device: str = "cpu"
) -> tuple[Chain, np.ndarray, list[dict[str, Any]]]:
    """Train these networks, all activations of them: their space, weights (n, D), rows."""
    networks = [cnn.draw(recipe, number) for number in numbers]
    split = splits(recipe)
    flats, rows = [], []
    for activation in sorted({n.hyper["activation"] for n in networks}):
        group = [n for n in networks if n.hyper["activation"] == activation]
        space = cnn.space_of(recipe, activation, images)
        trained = cnn.Block(space, group, recipe.batch, images)
        for step, weights, scores in cnn.train(trained, recipe.checkpoints):
            flats.append(weights)
            rows += [
                row(recipe, network, step, score, str(split[network.number]))
                for network, score in zip(trained.networks, scores, strict=True)
            ]
    shared = recipe.activation[0] if len(set(recipe.activation)) == 1 else None
    space = dataclasses.replace(space, activation=shared)  # None: each row says its own
    flat = np.concatenate(flats)
    order = sorted(range(len(rows)), key=lambda i: rows[i]["checkpoint"])
    return space, flat[order], [rows[i] for i in order]


def row(
    recipe: DrawnRecipe,
    network: cnn.Network,
    step: int,
    score: dict[str, float],
    split: str,
) -> dict[str, Any]:
    """What the index says of a network at one step."""
    run = f"run-{network.number:05d}"
    hyper = {f"config.{name}": value for name, value in network.hyper.items()}
    return {
        "checkpoint": f"{run}/step-{step:05d}",
        "run": run,
        "step": np.int32(step),
        "final": step == max(recipe.checkpoints),
        "split": split,
        **score,
        **hyper,
        "activation": network.hyper["activation"],
        "seed": network.seed,
    }


def summary(recipe: Recipe, table: pandas.DataFrame) -> dict[str, Any]:
    """What the build answers: counts, and quantiles of the test accuracy."""
    final = table[table["final"]]
    quantiles = final["test_accuracy"].quantile([0, 0.25, 0.5, 0.75, 1]).round(4).tolist()
    return {
        "networks": len(final),
        "checkpoints": len(table),
        "not_finite": int((~table["finite"]).sum()),
        "test_accuracy_quantiles": quantiles,
    }


def card(recipe: Recipe, summary: dict[str, Any]) -> list[str]:
    """The body of the zoo's card: what the networks are and what was drawn for them."""
    low, q25, middle, q75, high = summary["test_accuracy_quantiles"]
    fields = dataclasses.asdict(recipe)
    drawn = ("lr", "l2", "init", "init_std", "dropout", "optimizer", "train_fraction", "activation")
    return [
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
    ]
