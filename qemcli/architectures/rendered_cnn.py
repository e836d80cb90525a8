"""Rendered CNN: draw the picture that an INR shows, and classify the picture by a small CNN.

What a user would do without weight-space learning, and the limit of its accuracy:

    P = f_w(grid),   H_0 = (P - mean) / std,   H_i = pool(relu(norm(conv(H_{i-1})))),   i = 1..depth
    y = MLP(H_depth)

It reads the function alone, so it is exactly invariant to every symmetry of the networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from qemcli import groups
from qemcli.functions import respond
from qemcli.layers.metanetwork import Metanetwork
from qemcli.layers.presets import Preset
from qemcli.layers.probing import Jitter, batch_of
from qemcli.layers.statistics import Standardise
from qemcli.signals import check, coordinates, device
from qemcli.spaces import Chain, WeightSpace


@dataclass(frozen=True)
class Config:
    """`channels` of the 3 x 3 convolutions, each followed by normalisation, ReLU and 2 x 2 max
    pooling; `head`: width of the hidden layer; `dropout` in [0, 1) before it and behind it.

    `size`: (height, width) of the picture, () for the networks' own. `jitter`: size of the random
    affine map through which the picture is drawn in training, 0 none.
    """

    channels: tuple[int, ...] = (16, 32, 64)
    head: int = 128
    dropout: float = 0.2
    size: tuple[int, int] | tuple[()] = ()
    jitter: float = 0.0
    outputs: int = 1


PRESETS = {
    "rendered-cnn": Preset(
        Config(outputs=10), None, "ours: what a user would do instead", "siren-mnist"
    ),
}


class Model(Metanetwork):
    """dict of (b, *shape) -> raw outputs (b, outputs)."""

    def __init__(self, space: Chain, config: Config = Config()) -> None:
        super().__init__()
        self.space, self.config = space, config
        shown, self.height, self.width = check(space, config.size or None)
        self.jitter = Jitter(config.jitter)
        self.scale = Standardise(shown)
        stages: list[nn.Module] = []
        for a, b in pairwise((shown, *config.channels)):
            stages += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
            stages += [nn.MaxPool2d(2, ceil_mode=True)]
        self.convolutions = nn.Sequential(*stages)
        height, width = self.height, self.width
        for _ in config.channels:
            height, width = -(-height // 2), -(-width // 2)
        numbers = (config.channels or (shown,))[-1] * height * width
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(config.dropout),
            nn.Linear(numbers, config.head),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.head, config.outputs),
        )

    def claims(self, space: WeightSpace) -> set[str]:
        """Every group of these networks."""
        return set(groups.applicable(space))

    def calibrate(self, w: Mapping[str, Tensor]) -> None:
        """Set mean and std of the training set's pictures, one pair a channel."""
        with self.jitter.still():
            self.scale.fit(self._values(w).flatten(0, 1))

    @torch.no_grad()
    def _values(self, w: Mapping[str, Tensor]) -> Tensor:
        """(b, pixels, channels); nothing before the picture is learned."""
        dtype = w[self.space.layers[0].weight].dtype
        grid = coordinates(self.space, self.height, self.width, dtype).to(device(w))
        maps, shifts = self.jitter(batch_of(w), grid)
        return respond(self.space, w, grid @ maps + shifts)

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        picture = (
            self.scale(self._values(w)).transpose(1, 2).unflatten(2, (self.height, self.width))
        )
        return self.head(self.convolutions(picture))
