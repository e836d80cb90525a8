"""A zoo of CNNs of many architectures: a block of networks of one of them, trained, with the rows
of its index."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from qemcli.spaces import Layered
from qemcli.zoos.build import cnn, cnn_zoo, mixed
from qemcli.zoos.build.mixed_recipe import CHOSEN, MixedRecipe
from qemcli.zoos.build.sources import Images, load

if TYPE_CHECKING:
    import pandas

__all__ = ["block", "card", "load", "summary"]


def block(
    recipe: MixedRecipe, images: Images, numbers: list[int], device: str = "cpu"
) -> tuple[Layered, np.ndarray, list[dict[str, Any]]]:
    """Train these networks, which are of one architecture: their space, weights (n, D), rows."""
    (number,) = {n // recipe.block for n in numbers}
    arch = mixed.architectures(recipe)[number]
    own = {"activation": arch.activation}
    networks = [cnn.draw(recipe, n) for n in numbers]
    networks = [dataclasses.replace(n, hyper={**n.hyper, **own}) for n in networks]
    split = cnn_zoo.splits(recipe)
    space = mixed.space_of(arch, images)
    trained = cnn.Block(space, networks, recipe.batch, images)
    flats, rows = [], []
    for step, weights, scores in cnn.train(trained, recipe.checkpoints):
        flats.append(weights)
        for network, score in zip(trained.networks, scores, strict=True):
            row = cnn_zoo.row(recipe, network, step, score, str(split[network.number]))
            rows.append({**row, "config.architecture": np.int32(number), **arch.columns})
    flat = np.concatenate(flats)
    order = sorted(range(len(rows)), key=lambda i: rows[i]["checkpoint"])
    return space, flat[order], [rows[i] for i in order]


def summary(recipe: MixedRecipe, table: pandas.DataFrame) -> dict[str, Any]:
    """What the build answers: counts, quantiles of the test accuracy over the networks and of its
    median over the architectures."""
    final = table[table["final"]]
    by = final.groupby("config.architecture")
    ends = [0, 0.25, 0.5, 0.75, 1]
    return {
        "networks": len(final),
        "checkpoints": len(table),
        "architectures": len(by),
        "with_sums": int(by["config.sums"].first().sum()),
        "weight_spaces": int(table["arch"].nunique()),
        "not_finite": int((~table["finite"]).sum()),
        "test_accuracy_quantiles": final["test_accuracy"].quantile(ends).round(4).tolist(),
        "architecture_median_quantiles": by["test_accuracy"]
        .median()
        .quantile(ends)
        .round(4)
        .tolist(),
    }


def card(recipe: MixedRecipe, summary: dict[str, Any]) -> list[str]:
    """The body of the zoo's card: what the networks are and what was drawn for them."""
    fields = dataclasses.asdict(recipe)
    drawn = ("lr", "l2", "init", "init_std", "dropout", "optimizer", "train_fraction")
    listed = [
        "; ".join(f"{n} {list(v) if isinstance(v := fields[n], tuple) else v}" for n in names)
        for names in ((*CHOSEN, "residual"), drawn)
    ]
    networks, medians = (
        " | ".join(f"{x:.3f}" for x in summary[key])
        for key in ("test_accuracy_quantiles", "architecture_median_quantiles")
    )
    return [
        recipe.about or f"Small CNNs of many architectures trained on {recipe.source}.",
        "",
        f"{summary['networks']} networks of {summary['architectures']} architectures "
        f"({recipe.block} of each, {summary['with_sums']} architectures with residual sums, "
        f"{summary['weight_spaces']} weight spaces), {summary['checkpoints']} checkpoints (steps "
        f"{', '.join(map(str, recipe.checkpoints))}; batch {recipe.batch}), split 60/10/30 by run. "
        f"{summary['not_finite']} checkpoints hold weights that are not finite.",
        "",
        f"Test accuracy of the final networks on {recipe.test_images} held-out images: {networks} "
        "(minimum, quartiles, maximum); the median of an architecture's networks: "
        f"{medians}.",
        "",
        f"Drawn for every architecture: {listed[0]}. All convolutions have the stride, of networks "
        "with sums the first alone; sums are made as in the CNN Wild Park, between layers of one "
        "width.",
        "",
        f"Drawn for every network: {listed[1]}.",
    ]
