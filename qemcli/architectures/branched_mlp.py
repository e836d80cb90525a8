"""Branched MLP: flat weights of blocks, classifier and embedding through a branch each.

The baseline "MLP" of the transformer tables (Tran et al., arXiv:2410.04209); no symmetry.

    y = w . [relu MLP(blocks), relu MLP(classifier), Linear(embedding)]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qemcli.layers.branches import Flat, ends, mlp
from qemcli.layers.metanetwork import Metanetwork
from qemcli.layers.presets import Preset
from qemcli.spaces import Transformer, WeightSpace, transformer_of

READS = (Transformer,)


@dataclass(frozen=True)
class Config:
    """`width` of every layer; `standardised`: each weight by constants of the training set, set by
    `calibrate`."""

    width: int = 50
    standardised: bool = False
    outputs: int = 1


_TABLE = "baseline MLP of arXiv:2410.04209"
PRESETS = {
    "branched-mlp-mnist": Preset(Config(), 933_251, _TABLE, "transformer-mnist"),
    "branched-mlp-ag-news": Preset(Config(), 896_051, _TABLE, "transformer-ag-news"),
    "branched-mlp-standardised": Preset(
        Config(standardised=True), None, "ours: constants of the training set", "transformer-mnist"
    ),
}


class Model(Metanetwork):
    """dict of (b, *shape) -> raw outputs (b, outputs)."""

    branches: Any  # a ModuleList; mypy takes the methods of what it holds for tensors

    def __init__(self, space: WeightSpace, config: Config = Config()) -> None:
        super().__init__()
        space = transformer_of(space, "branched_mlp")
        self.space, self.config = space, config
        embed, classify = ends(space)
        inside = [t.name for t in space.tensors if t not in space.outside]
        n, on = config.width, config.standardised
        self.branches = nn.ModuleList()
        for names, depth in ((inside, 2), (classify, 3)):
            if names:
                size = sum(space[name].size for name in names)
                self.branches.append(Flat(space, names, mlp([size, *[n] * depth]), on))
        if embed:
            size = sum(space[name].size for name in embed)
            self.branches.append(Flat(space, embed, nn.Linear(size, n), on))
        self.last = nn.Linear(n * len(self.branches), config.outputs)

    def claims(self, space: WeightSpace) -> set[str]:
        """Nothing."""
        return set()

    def calibrate(self, w: Mapping[str, Tensor]) -> None:
        """Set the constants of `standardised` from the training set's weights; else nothing."""
        for branch in self.branches:
            branch.fit(w)

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        return self.last(torch.cat([branch(w) for branch in self.branches], dim=1))
