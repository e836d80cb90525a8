"""What recipes of CNNs have in common: the images, how long networks are trained, and what is drawn
for every one of them."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from qemcli.errors import UsageError
from qemcli.spaces import ACTIVATIONS
from qemcli.zoos.build.zoo_recipe import ZooRecipe

Range = tuple[float, float]
OPTIMIZERS = ("adam", "rmsprop", "sgd")
INITS = ("he_normal", "glorot_normal", "orthogonal", "normal", "truncated_normal")
JUNCTIONS = ("pool", "flatten")


@dataclass(frozen=True)
class DrawnRecipe(ZooRecipe):
    """Many networks of the same images, each trained its own way.

    Attributes, beside those of every zoo:
        test_images: how many held-out images the accuracy is measured on.
        models: number of networks; checkpoints: steps at which one is kept, the last ends the
        training. batch: images a step.
        lr, l2, init_std: drawn log-uniformly for every network; dropout: uniformly; init,
        optimizer, activation and train_fraction: one is chosen.
    """

    name: str = "cnn"
    test_images: int = 1000
    models: int = 100
    checkpoints: tuple[int, ...] = (100, 300, 500)
    batch: int = 32
    block: int = 32
    lr: Range = (5e-4, 5e-2)
    l2: Range = (1e-8, 1e-2)
    init_std: Range = (1e-3, 0.5)
    dropout: Range = (0.0, 0.7)
    init: tuple[str, ...] = INITS
    optimizer: tuple[str, ...] = OPTIMIZERS
    activation: tuple[str, ...] = ("relu",)
    train_fraction: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)

    @property
    def networks(self) -> int:
        return self.models

    def resized(self, networks: int) -> Self:
        """So many networks."""
        return dataclasses.replace(self, models=networks)

    def checked(self, path: Path) -> Self:
        """The recipe where its values can be drawn and trained; UsageError otherwise."""
        for name in ("lr", "l2", "init_std"):
            ends = getattr(self, name)
            if len(ends) != 2 or not 0 < ends[0] <= ends[1]:
                raise UsageError(f"{path}: '{name}' is {list(ends)}; [low, high] above 0 is needed")
        if len(self.dropout) != 2 or not 0 <= self.dropout[0] <= self.dropout[1] < 1:
            raise UsageError(f"{path}: 'dropout' is {list(self.dropout)}; 0 <= low <= high < 1")
        sizes = (self.models, self.batch, self.block, self.test_images)
        if min(self.checkpoints, default=-1) < 0 or min(sizes) < 1:
            raise UsageError(
                f"{path}: checkpoints, models, batch, block and test_images must be there and "
                "positive"
            )
        shares = self.train_fraction
        if not shares or not 0 < min(shares) <= max(shares) <= 1:
            raise UsageError(f"{path}: 'train_fraction' is {list(shares)}; above 0, up to 1")
        self.check_choices(path, "init", INITS)
        self.check_choices(path, "optimizer", OPTIMIZERS)
        self.check_choices(path, "activation", sorted(ACTIVATIONS))
        self.check_architecture(path)
        return self

    @abstractmethod
    def check_architecture(self, path: Path) -> None:
        """UsageError where the networks that are described are none."""
