"""The TOML recipe of a zoo of CNNs of many architectures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qemcli.errors import UsageError
from qemcli.zoos.build.drawn import JUNCTIONS, DrawnRecipe

CHOSEN = ("depth", "width", "kernel", "stride", "junction", "activation")
SHALLOWEST = 3  # convolutions below which there is no layer but the one before to add


@dataclass(frozen=True)
class MixedRecipe(DrawnRecipe):
    """A zoo of small CNNs, `block` networks of every architecture that is drawn.

    Attributes, beside those of every zoo that is drawn:
        depth: how many convolutions, one is chosen an architecture; so are kernel (odd), stride,
        junction (pool | flatten) and activation; width is chosen a layer. A value that is listed
        twice is chosen twice as often. The stride is that of every convolution; of networks with
        sums of the first alone.
        residual: share of the architectures that have sums, in [0, 1]; those have 3 convolutions or
        more.
    """

    family: str = "mixed"
    name: str = "cnn-mixed"
    models: int = 320
    checkpoints: tuple[int, ...] = (150, 300, 500)
    depth: tuple[int, ...] = (1, 2, 3, 4)
    width: tuple[int, ...] = (4, 8, 12, 16)
    kernel: tuple[int, ...] = (3, 5)
    stride: tuple[int, ...] = (2, 3)
    junction: tuple[str, ...] = JUNCTIONS
    activation: tuple[str, ...] = ("relu", "leaky_relu", "tanh", "gelu", "sigmoid")
    residual: float = 0.4

    def check_architecture(self, path: Path) -> None:
        """Choices that are there and known, odd kernels, and layers to add where there are sums."""
        self.check_choices(path, "junction", JUNCTIONS)
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
