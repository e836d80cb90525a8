"""The settings of a zoo of small transformers; every one has a default and a unit or a range."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from qemcli.errors import UsageError
from qemcli.zoos.build.zoo_recipe import ZooRecipe

OPTIMIZERS = ("adam", "rmsprop", "sgd", "momentum")
ADAPTIVE = ("adam", "rmsprop")
AXES = (
    "lr", "lr_sgd", "lr_momentum", "init_std", "init_std_sgd", "l2", "train_fraction", "dropout",
)  # fmt: skip


@dataclass(frozen=True)
class TransformerRecipe(ZooRecipe):
    """A zoo of small transformers, one network a cell of a grid of hyper-parameters.

    The defaults of the grid are the Small Transformer Zoo's (Tran et al., arXiv:2410.04209).

    Attributes, beside those of every zoo (its source holds images where `patch` is set, else
    texts):
        test_images: how many held-out images or texts the accuracy is measured on.
        train_images: so many of the source are trained on; 0: all.
        models: number of networks; checkpoints: epochs at which one is kept, the last ends the
        training.
        batch: examples a step; warmup: epochs of rising rate, a cosine follows.
        shared_init: all networks begin at one point (times their init_std) and see one order.
        width, heads, ffn, depth: numbers of a token, heads, feed-forward neurons, blocks.
        patch: side in pixels of a patch; 0: texts.
        tokens: words of a text that are read; vocabulary: words that have vectors.
        mask: padding is not read. False: it is, as in the published zoo.
        optimizer, l2, train_fraction, dropout: axes of the grid.
        lr, init_std: of adam and rmsprop; lr_sgd, lr_momentum: of those two; init_std_sgd: of both.
    """

    family: str = "transformer"
    name: str = "transformer"
    test_images: int = 500
    train_images: int = 0
    models: int = 100
    checkpoints: tuple[int, ...] = (50, 75, 100)
    batch: int = 128
    warmup: int = 10
    shared_init: bool = False
    width: int = 32
    heads: int = 2
    ffn: int = 64
    depth: int = 2
    patch: int = 4
    tokens: int = 64
    vocabulary: int = 5000
    mask: bool = True
    optimizer: tuple[str, ...] = OPTIMIZERS
    lr: tuple[float, ...] = (3e-4, 5e-4, 1e-3, 3e-3, 5e-3, 1e-2, 3e-2, 5e-2)
    lr_sgd: tuple[float, ...] = (1e-3, 3e-3, 5e-3, 7e-3, 1e-2, 3e-2, 5e-2, 7e-2)
    lr_momentum: tuple[float, ...] = (1e-3, 3e-3, 5e-3, 7e-3, 1e-2, 3e-2, 5e-2, 7e-2)
    init_std: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    init_std_sgd: tuple[float, ...] = (0.1, 0.15, 0.2, 0.25, 0.3)
    l2: tuple[float, ...] = (1e-8, 1e-7, 1e-6, 1e-4, 1e-2)
    train_fraction: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7)
    dropout: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.2)

    @property
    def networks(self) -> int:
        return self.models

    def resized(self, networks: int) -> TransformerRecipe:
        """So many networks."""
        return dataclasses.replace(self, models=networks)

    def checked(self, path: Path) -> TransformerRecipe:
        """The recipe where its values can be trained; UsageError otherwise."""
        self.check_choices(path, "optimizer", OPTIMIZERS)
        for name in AXES:
            values = getattr(self, name)
            top = {"train_fraction": 1.0, "dropout": 0.99}.get(name, float("inf"))
            above = 0.0 if name in ("l2", "dropout") else 1e-12
            if not values or min(values) < above or max(values) > top:
                raise UsageError(f"{path}: '{name}' is {list(values)}; it is empty or out of range")
        sizes = ("models", "batch", "block", "width", "heads", "ffn", "depth", "tokens")
        for name in sizes:
            if getattr(self, name) < 1:
                raise UsageError(f"{path}: '{name}' is {getattr(self, name)}; 1 or more is needed")
        if self.width % self.heads:
            raise UsageError(f"{path}: {self.heads} heads do not divide a width of {self.width}")
        if min(self.checkpoints, default=-1) < 0 or min(self.patch, self.warmup) < 0:
            raise UsageError(
                f"{path}: checkpoints, patch and warmup must be there and not negative"
            )
        return self
