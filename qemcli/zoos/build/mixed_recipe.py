"""The TOML recipe of a zoo of CNNs of many architectures."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from qemcli import registry
from qemcli.errors import UsageError
from qemcli.spaces import ACTIVATIONS

Range = tuple[float, float]
JUNCTIONS = ("pool", "flatten")
CHOSEN = ("depth", "width", "kernel", "stride", "junction", "activation")
SHALLOWEST = 3  # convolutions below which there is no layer but the one before to add


@dataclass(frozen=True)
class MixedRecipe:
    """A zoo of small CNNs, `block` networks of every architecture that is drawn.

    Attributes:
        name, licence, about, source, test_source, test_images, resize: as for CNNs.
        models: number of networks; checkpoints: steps at which one is kept, the last ends the
        training. batch: images a step.
        block: networks of one architecture, which are trained together.
        depth: how many convolutions, one is chosen an architecture; so are kernel (odd), stride,
        junction (pool | flatten) and activation; width is chosen a layer. A value that is listed
        twice is chosen twice as often. The stride is that of every convolution; of networks with
        sums of the first alone.
        residual: share of the architectures that have sums, in [0, 1]; those have 3 convolutions or
        more.
        lr, l2, init_std: drawn log-uniformly for every network; dropout: uniformly; init, optimizer
        and train_fraction: one is chosen.
    """

    family: str = "mixed"
    name: str = "cnn-mixed"
    licence: str = "unknown"
    about: str = ""
    source: str = "digits"
    test_source: str | None = None
    test_images: int = 1000
    resize: int = 0
    models: int = 320
    checkpoints: tuple[int, ...] = (150, 300, 500)
    batch: int = 32
    seed: int = 0
    block: int = 32
    depth: tuple[int, ...] = (1, 2, 3, 4)
    width: tuple[int, ...] = (4, 8, 12, 16)
    kernel: tuple[int, ...] = (3, 5)
    stride: tuple[int, ...] = (2, 3)
    junction: tuple[str, ...] = JUNCTIONS
    activation: tuple[str, ...] = ("relu", "leaky_relu", "tanh", "gelu", "sigmoid")
    residual: float = 0.4
    lr: Range = (5e-4, 5e-2)
    l2: Range = (1e-8, 1e-2)
    init_std: Range = (1e-3, 0.5)
    dropout: Range = (0.0, 0.7)
    init: tuple[str, ...] = (
        "he_normal",
        "glorot_normal",
        "orthogonal",
        "normal",
        "truncated_normal",
    )
    optimizer: tuple[str, ...] = ("adam", "rmsprop", "sgd")
    train_fraction: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)

    @property
    def networks(self) -> int:
        return self.models

    def resized(self, networks: int) -> MixedRecipe:
        """So many networks: the first architectures."""
        return dataclasses.replace(self, models=networks)

    def checked(self, path: Path) -> MixedRecipe:
        """The recipe where its values can be drawn and trained; UsageError otherwise."""
        self._check_training(path)
        for name, known in (("activation", sorted(ACTIVATIONS)), ("junction", list(JUNCTIONS))):
            for value in getattr(self, name):
                if value not in known:
                    hint = registry.suggest(value, known)
                    raise UsageError(f"{path}: '{name}' has {value!r}", hint)
        for name in CHOSEN:
            if not getattr(self, name):
                raise UsageError(f"{path}: '{name}' is empty")
        if min(*self.depth, *self.width, *self.kernel, *self.stride) < 1:
            raise UsageError(f"{path}: depth, width, kernel and stride must be positive")
        if any(size % 2 == 0 for size in self.kernel):
            raise UsageError(f"{path}: 'kernel' is {list(self.kernel)}; odd sizes are needed")
        if not 0 <= self.residual <= 1 or (self.residual and max(self.depth) < SHALLOWEST):
            raise UsageError(
                f"{path}: 'residual' is {self.residual}",
                f"0 to 1; above 0 a `depth` of {SHALLOWEST} or more is needed",
            )
        return self

    def _check_training(self, path: Path) -> None:
        for name in ("lr", "l2", "init_std"):
            ends = getattr(self, name)
            if len(ends) != 2 or not 0 < ends[0] <= ends[1]:
                raise UsageError(f"{path}: '{name}' is {list(ends)}; [low, high] above 0 is needed")
        if len(self.dropout) != 2 or not 0 <= self.dropout[0] <= self.dropout[1] < 1:
            raise UsageError(f"{path}: 'dropout' is {list(self.dropout)}; 0 <= low <= high < 1")
        if min(self.checkpoints, default=-1) < 0 or min(self.models, self.batch, self.block) < 1:
            raise UsageError(
                f"{path}: checkpoints, models, batch and block must be there and positive"
            )
