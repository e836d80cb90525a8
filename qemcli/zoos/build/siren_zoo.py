"""A zoo of SIRENs: its images, where each network begins, and the rows of its index."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qemcli import signals
from qemcli.errors import InputError, UsageError
from qemcli.spaces import Chain, siren
from qemcli.zoos.build import sources
from qemcli.zoos.build.siren import Batch, Fit, fitted, slots
from qemcli.zoos.build.siren_recipe import SirenRecipe

if TYPE_CHECKING:
    import pandas

MARGIN = 1e-3  # dB: the engine's rounding never leaves a network below its target


@dataclass(frozen=True)
class Pictures:
    """The images of a zoo, split already: pixels (p, channels, height, width) in [0, 1], and (p,)
    labels, splits and rows in their own file (the source's, or the test source's)."""

    pixels: Tensor
    label: np.ndarray
    split: np.ndarray
    row: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width


def load(recipe: SirenRecipe) -> Pictures:
    """The recipe's images, the splits cut in an order drawn from its seed.

    Raises InputError for files that hold no images, or images that no SIREN shows; UsageError
    where there are too few.
    """
    image, label = sources.read(recipe.source)
    rng = np.random.default_rng((recipe.seed, 2**32))
    order = rng.permutation(len(image))
    if recipe.test_source:
        test_image, test_label = sources.read(recipe.test_source)
        held = rng.permutation(len(test_image))
        if test_image.shape[1:] != image.shape[1:]:
            raise InputError(
                f"{recipe.test_source}: images of {test_image.shape[1:]}, "
                f"those of {recipe.source} are {image.shape[1:]}"
            )
    else:
        test_image, test_label, held, order = (
            image,
            label,
            order[: recipe.test],
            order[recipe.test :],
        )
    _enough(recipe.source, len(order), recipe.train + recipe.val)
    _enough(recipe.test_source or recipe.source, len(held), recipe.test)
    if image.shape[1] not in signals.CHANNELS:
        raise InputError(
            f"{recipe.source}: images of {image.shape[1]} channels", "grey or RGB images are needed"
        )
    row = np.concatenate([order[: recipe.train + recipe.val], held[: recipe.test]])
    inner, outer = row[: recipe.train + recipe.val], row[recipe.train + recipe.val :]
    chosen = np.concatenate([image[inner], test_image[outer]])
    labels = np.concatenate([label[inner], test_label[outer]])
    pixels, _ = sources.tensors(chosen, labels, recipe.resize)
    split = np.repeat(["train", "val", "test"], [recipe.train, recipe.val, recipe.test])
    return Pictures((pixels + 1) / 2, labels, split, row)


def _enough(source: str, there: int, wanted: int) -> None:
    if there < wanted:
        raise UsageError(f"{source}: {there} images for {wanted}", "fewer networks: --models")


@lru_cache(maxsize=2)
def networks(recipe: SirenRecipe) -> np.ndarray:
    """(networks, 2): image and view of every network, in an order drawn from the recipe's seed, so
    that each block is like the zoo."""
    views = [recipe.views] * recipe.train + [1] * (recipe.val + recipe.test)
    pairs = np.array([(i, view) for i, count in enumerate(views) for view in range(count)])
    return np.random.default_rng((recipe.seed, 2**32 + 1)).permutation(pairs)


def space_of(recipe: SirenRecipe, shape: tuple[int, int, int]) -> Chain:
    """The weight space of the recipe's networks on images of this shape."""
    return siren((2, *recipe.widths, shape[0]), recipe.w0, recipe.convention, shape)


def seed_of(recipe: SirenRecipe, split: str, row: int, view: int) -> int:
    """The seed of a network: of the recipe's, its image and its view; the recipe's own alone where
    the initialisation is shared."""
    key = (0, 0, 0) if recipe.shared_init else (int(split == "test"), row, view)
    return int(np.random.default_rng((recipe.seed, *key)).integers(2**62))


def initial(space: Chain, recipe: SirenRecipe, seed: int) -> Tensor:
    """(D,) weights at which a network begins, by the recipe's `init`."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(shape: tuple[int, ...], bound: float) -> Tensor:
        return (2 * torch.rand(shape, generator=generator) - 1) * bound

    pairs = []
    for i, la in enumerate(space.layers):
        first, last = i == 0, i == len(space.layers) - 1
        torch_bound = 1 / math.sqrt(la.cols)  # of nn.Linear, weights and biases
        bound = math.sqrt(6 / la.cols) / recipe.w0
        if first and recipe.init != "dws":
            bound = 1 / la.cols
        if last and recipe.init != "nfn":
            bound = torch_bound
        weight = uniform((1, la.rows, la.cols, 1), bound)
        zero = recipe.init != "nfn" and not last
        bias = uniform((1, la.rows), 0.0 if zero else torch_bound)
        pairs.append((weight, bias))
    return space.flatten(space.from_matrices(pairs))[0]


def block(
    recipe: SirenRecipe, pictures: Pictures, numbers: list[int], device: str = "cpu"
) -> tuple[Chain, np.ndarray, list[dict[str, Any]]]:
    """Fit these networks: their space, weights (n, D) and rows of the index."""
    space = space_of(recipe, pictures.shape)
    black, white = space.forward.levels
    goal = 0.0
    if recipe.psnr:
        goal = (white - black) ** 2 * 10 ** (-(recipe.psnr + MARGIN) / 10)
    fit = Fit(recipe.first_w0, recipe.lr, goal, recipe.steps)
    rows = [_row(recipe, pictures, number) for number in numbers]

    def starts() -> Iterator[tuple[int, Tensor, Tensor]]:
        for i, number in enumerate(numbers):
            picture = pictures.pixels[networks(recipe)[number, 0]]
            yield i, initial(space, recipe, rows[i]["seed"]), black + (white - black) * picture

    batch = Batch(space, fit, min(len(numbers), slots(space, device)), device=device)
    flat = torch.empty(len(numbers), space.size)
    for network in fitted(batch, starts()):
        flat[network.number] = network.flat
        rows[network.number]["steps"] = np.int32(network.steps)
    shown = signals.render(space, space.unflatten(flat))
    truth = pictures.pixels[networks(recipe)[numbers, 0]]
    psnr = signals.psnr(shown.double(), truth.double())
    for row, value in zip(rows, psnr.tolist(), strict=True):
        row["psnr"] = value
    return space, flat.numpy(), rows


def _row(recipe: SirenRecipe, pictures: Pictures, number: int) -> dict[str, Any]:
    image, view = networks(recipe)[number].tolist()
    split, row = str(pictures.split[image]), int(pictures.row[image])
    run = f"{split}-{row:05d}"
    return {
        "checkpoint": f"{run}/view-{view}",
        "run": run,
        "final": True,
        "split": split,
        "label": np.int64(pictures.label[image]),
        "image": np.int64(row),
        "view": np.int32(view),
        "seed": seed_of(recipe, split, row, view),
    }


def about(recipe: SirenRecipe) -> dict[str, Any]:
    """What the zoo's record says beside its recipe: the names of the classes."""
    names = sources.class_names(recipe.source)
    return {"classes": names} if names else {}


def summary(recipe: SirenRecipe, table: pandas.DataFrame) -> dict[str, Any]:
    """What the build answers: counts, and quantiles of the PSNR."""
    quantiles = table["psnr"].quantile([0, 0.25, 0.5, 0.75, 1]).round(2).tolist()
    return {
        "networks": len(table),
        "checkpoints": len(table),
        "not_finite": int((~table["finite"]).sum()),
        "below_target": int((~(table["psnr"] >= recipe.psnr)).sum()),
        "psnr_quantiles": quantiles,
        "steps_median": int(table["steps"].median()),
    }


def card(recipe: SirenRecipe, summary: dict[str, Any]) -> list[str]:
    """The body of the zoo's card: what the networks are and how they were fitted."""
    low, q25, middle, q75, high = summary["psnr_quantiles"]
    widths = "-".join(map(str, ("2", *recipe.widths)))
    views = f" ({recipe.views} of each training image)" if recipe.views > 1 else ""
    target = f"until {recipe.psnr:g} dB or " if recipe.psnr else ""
    names = dataclasses.asdict(recipe)
    settings = ("w0", "first_w0", "convention", "init", "shared_init", "lr", "seed")
    return [
        recipe.about or f"SIRENs of {recipe.source}.",
        "",
        f"{summary['networks']} networks{views} of widths {widths} and one output a channel, split "
        f"by image: {recipe.train} train, {recipe.val} val, {recipe.test} test images. "
        + ", ".join(f"{name} {names[name]}" for name in settings)
        + ".",
        "",
        f"Fitted {target}for {recipe.steps} steps of Adam (median {summary['steps_median']}). "
        f"PSNR in dB: minimum {low:.2f}, quartiles {q25:.2f}, {middle:.2f}, {q75:.2f}, maximum "
        f"{high:.2f}; {summary['below_target']} below the target.",
        "",
        "Columns: label (class of the image), image (its row in its file: the test file for the "
        "split test), view, psnr, steps, seed.",
    ]
