"""Flat MLP: all weights in a row into a multilayer perceptron; the control without any symmetry.

y = MLP(concat(W_1, b_1, ..., W_L, b_L))                the baseline "MLP" of arXiv:2302.14040
    delta = s * MLP(concat(...)), one hidden layer more     its editor; s is a scalar a tensor
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qemcli.layers.deltas import Deltas
from qemcli.layers.heads import mlp_head
from qemcli.layers.metanetwork import Metanetwork
from qemcli.layers.presets import Preset
from qemcli.layers.statistics import Standardise
from qemcli.spaces import WeightSpace, chain_of

READS = (WeightSpace,)


@dataclass(frozen=True)
class Config:
    """`head`: width of the two hidden layers (three in the editor); `dropout` in [0, 1).

    `standardised`: each weight by constants of the training set, set by `calibrate`. `expand`:
    branches of the editor.
    """

    head: int = 1000
    dropout: float = 0.0
    standardised: bool = False
    outputs: int = 1
    expand: int = 1


PRESETS = {
    "flat-mlp-inr": Preset(
        Config(outputs=10), 2_197_010, "arXiv:2409.11697, MNIST/Fashion INR row", "siren-mnist"
    ),
    "flat-mlp-inr-cifar": Preset(
        Config(outputs=10), 2_263_010, "arXiv:2409.11697, CIFAR INR row", "siren-cifar"
    ),
    "flat-mlp": Preset(Config(), None, "ours: the same on the CNN zoo"),
    "flat-mlp-standardised": Preset(
        Config(standardised=True), None, "ours: constants of the training set"
    ),
}
_STYLE = "arXiv:2302.14040; its editing of INRs"
EDITORS = {
    "flat-mlp-edit-mnist": Preset(Config(), 4_374_191, _STYLE, "siren-mnist"),
    "flat-mlp-edit-cifar": Preset(Config(), 4_506_257, _STYLE, "siren-cifar"),
}


class Model(Metanetwork):
    """dict of (b, *shape) -> raw outputs (b, outputs)."""

    def __init__(self, space: WeightSpace, config: Config = Config()) -> None:
        super().__init__()
        self.space, self.config = space, config
        self.scale = Standardise(space.size) if config.standardised else nn.Identity()
        self.head = mlp_head(space.size, config.head, config.outputs, config.dropout)

    def claims(self, space: WeightSpace) -> set[str]:
        """Nothing."""
        return set()

    def _flat(self, w: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([w[name].flatten(1) for name in self.space.names], dim=1)

    def calibrate(self, w: Mapping[str, Tensor]) -> None:
        """Set the constants of `standardised` from the training set's weights; else nothing."""
        if isinstance(self.scale, Standardise):
            self.scale.fit(self._flat(w))

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        return self.head(self.scale(self._flat(w)))


class Editor(Metanetwork):
    """dict of (b, *shape) -> what each of k = `expand` branches adds to it, dict of (b, k, *shape);
    equivariant to nothing."""

    def __init__(self, space: WeightSpace, config: Config = Config()) -> None:
        super().__init__()
        self.space, self.config = space, config
        self.scale = Standardise(space.size) if config.standardised else nn.Identity()
        head = mlp_head(space.size, config.head, config.head, config.dropout)
        out = nn.Linear(config.head, config.expand * space.size)
        self.body = nn.Sequential(*head, nn.ReLU(), out)
        self.out = Deltas(chain_of(space, "an editor"))

    def claims(self, space: WeightSpace) -> set[str]:
        """Nothing."""
        return set()

    def calibrate(self, w: Mapping[str, Tensor]) -> None:
        """Set the constants of `standardised` from the training set's weights; else nothing."""
        if isinstance(self.scale, Standardise):
            self.scale.fit(self.space.flatten(w))

    def forward(self, w: Mapping[str, Tensor]) -> dict[str, Tensor]:
        k = self.config.expand
        flat = self.body(self.scale(self.space.flatten(w)))
        return self.out.scaled(self.space.unflatten(flat.unflatten(1, (k, -1)).flatten(0, 1)), k)
