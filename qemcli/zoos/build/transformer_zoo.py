"""A zoo of small transformers: what they read, one block of them trained, the rows of its index."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qemcli import attention
from qemcli.errors import UsageError
from qemcli.spaces import Transformer, small_transformer
from qemcli.writing import beside
from qemcli.zoos.build import sources, texts, transformer
from qemcli.zoos.build.transformer import Data, Examples
from qemcli.zoos.build.transformer_recipe import AXES, TransformerRecipe

if TYPE_CHECKING:
    import pandas

SPLIT = (0.7, 0.85)  # train below the first, val below the second, test above: by cell of the grid


def load(recipe: TransformerRecipe) -> Data:
    """What the recipe's networks read; the test examples are the first `test_images` of a seeded
    order. Raises InputError for files that hold nothing of the kind."""
    found = None if recipe.patch else texts.load(recipe)
    train, test = _read(recipe, found) if found else _images(recipe)
    classes = int(max(train.label.max(), test.label.max())) + 1
    patch = (train.x.shape[2] // recipe.patch**2, recipe.patch) if recipe.patch else None
    space = small_transformer(recipe.width, recipe.heads, recipe.ffn, recipe.depth, classes, patch)
    return Data(_some(train, recipe.train_images), test, space, found)


def _some(examples: Examples, count: int) -> Examples:
    """The first `count` in a fixed order; 0: all."""
    if not 0 < count < len(examples):
        return examples
    order = torch.from_numpy(np.random.default_rng(1).permutation(len(examples))[:count])
    return Examples(*examples.at(order))


def _images(recipe: TransformerRecipe) -> tuple[Examples, Examples]:
    images = sources.load(recipe)
    side = images.shape[1] // recipe.patch
    if not side or images.shape[1] != images.shape[2]:
        raise UsageError(
            f"patches of {recipe.patch} pixels on images of {images.shape[1:]}",
            "set `patch` and `resize` to fit square images",
        )

    def read(x: Tensor, label: Tensor) -> Examples:
        return Examples(attention.patches(x, recipe.patch), None, label)

    return read(images.train, images.train_label), read(images.test, images.test_label)


def _read(recipe: TransformerRecipe, found: texts.Texts) -> tuple[Examples, Examples]:
    place = attention.positions(recipe.tokens, recipe.width)

    def read(ids: Tensor, label: Tensor) -> Examples:
        real = ids > 0 if recipe.mask else None
        return Examples(found.vectors[ids] + place, real, label)

    return read(found.train, found.train_label), read(found.test, found.test_label)


def cells(recipe: TransformerRecipe) -> int:
    """So many cells of the grid have networks."""
    return min(recipe.models, len(transformer.grid(recipe)))


def splits(recipe: TransformerRecipe) -> np.ndarray:
    """train, val or test for every network: 70/15/15 of the cells, in an order drawn from the
    recipe's seed; networks of one cell stay together."""
    count = cells(recipe)
    order = np.random.default_rng((recipe.seed, 2**32)).permutation(count)
    rank = np.empty(count)
    rank[order] = (np.arange(count) + 0.5) / count
    split = np.array(["train", "val", "test"])[np.digitize(rank, SPLIT)]
    return split[np.arange(recipe.models) % count]


def block(
    recipe: TransformerRecipe, data: Data, numbers: list[int], device: str = "cpu"
) -> tuple[Transformer, np.ndarray, list[dict[str, Any]]]:
    """Train these networks: their space, weights (n, D), rows."""
    networks = [transformer.draw(recipe, number) for number in numbers]
    split = splits(recipe)
    flats, rows = [], []
    # Epochs of one length are trained together.
    for fraction in sorted({n.hyper["train_fraction"] for n in networks}):
        group = [n for n in networks if n.hyper["train_fraction"] == fraction]
        trained = transformer.Block(data, group, recipe)
        for epoch, weights, scores in transformer.train(trained):
            flats.append(weights)
            lost = trained.diverged.tolist()
            rows += [
                _row(recipe, network, epoch, {**score, "diverged": at}, split[network.number])
                for network, score, at in zip(trained.networks, scores, lost, strict=True)
            ]
    flat = np.concatenate(flats)
    order = sorted(range(len(rows)), key=lambda i: rows[i]["checkpoint"])
    return data.space, flat[order], [rows[i] for i in order]


def _row(
    recipe: TransformerRecipe,
    network: transformer.Network,
    epoch: int,
    score: dict[str, Any],
    split: str,
) -> dict[str, Any]:
    run = f"run-{network.number:05d}"
    hyper = {f"config.{name}": value for name, value in network.hyper.items()}
    return {
        "checkpoint": f"{run}/epoch-{epoch:04d}",
        "run": run,
        "epoch": np.int32(epoch),
        "final": epoch == max(recipe.checkpoints),
        "split": str(split),
        **score,
        "diverged": np.int32(score["diverged"]),
        **hyper,
        "cell": np.int32(network.number % len(transformer.grid(recipe))),
        "seed": network.seed,
    }


def accompany(data: Data, folder: Path) -> None:
    """Put beside the networks what they cannot be run without: the word vectors."""
    if data.texts:
        beside(folder / "embedding.safetensors", data.texts.save)


def about(recipe: TransformerRecipe) -> dict[str, Any]:
    """What the zoo's record says beside its recipe: the names of the classes."""
    names = sources.class_names(recipe.source)
    return {"classes": names} if names else {}


def summary(recipe: TransformerRecipe, table: pandas.DataFrame) -> dict[str, Any]:
    """What the build answers: counts, and quantiles of the test accuracy."""
    final = table[table["final"]]
    quantiles = final["test_accuracy"].quantile([0, 0.25, 0.5, 0.75, 1]).round(4).tolist()
    return {
        "networks": len(final),
        "checkpoints": len(table),
        "diverged": int((final["diverged"] >= 0).sum()),
        "test_accuracy_quantiles": quantiles,
    }


def card(recipe: TransformerRecipe, summary: dict[str, Any]) -> list[str]:
    """The body of the zoo's card: what the networks are and what was drawn for them."""
    low, q25, middle, q75, high = summary["test_accuracy_quantiles"]
    fields = dataclasses.asdict(recipe)
    start = "one point times init_std, and one order" if recipe.shared_init else "its own seed"
    reads = (
        f"patches of {recipe.patch} pixels"
        if recipe.patch
        else f"the first {recipe.tokens} known words, as frozen vectors ({texts.VECTORS}; "
        "embedding.safetensors), with sinusoids of their positions; padding "
        f"is {'not read' if recipe.mask else 'read too'}"
    )
    return [
        recipe.about or f"Small transformers trained on {recipe.source}.",
        "",
        f"{summary['networks']} networks of width {recipe.width}, {recipe.depth} blocks of "
        f"{recipe.heads} heads and {recipe.ffn} neurons, without residual sums; they read {reads}. "
        f"{summary['checkpoints']} checkpoints (epochs {', '.join(map(str, recipe.checkpoints))}; "
        f"batch {recipe.batch}), split 70/15/15 by cell of the grid; each network has {start}. "
        f"{summary['diverged']} diverged and were stopped where they last were finite.",
        "",
        f"Test accuracy of the final networks on {recipe.test_images} held-out examples: "
        f"minimum {low:.3f}, quartiles {q25:.3f}, {middle:.3f}, {q75:.3f}, maximum {high:.3f}.",
        "",
        f"The grid (a network a cell, {cells(recipe)} of {len(transformer.grid(recipe))}): "
        + "; ".join(f"{name} {list(fields[name])}" for name in ("optimizer", *AXES))
        + ". init_std_sgd is of sgd and momentum.",
    ]
