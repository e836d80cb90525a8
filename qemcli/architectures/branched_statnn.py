"""Branched StatNN: seven statistics of every tensor, blocks and classifier a branch each.

The baseline "StatNN" of the transformer tables (Tran et al., arXiv:2410.04209).

    y = w . [relu MLP(phi(blocks)), relu MLP(phi(classifier)), Linear(embedding)]

The heads of a tensor are pooled: invariant to their order and to that of neurons, and, where the
networks come balanced, to GL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qemcli.groups import allowed
from qemcli.layers.attention_quasi import READ, statistics
from qemcli.layers.branches import Flat, ends, mlp
from qemcli.layers.metanetwork import Metanetwork
from qemcli.layers.presets import Preset
from qemcli.layers.statistics import Standardise, seven
from qemcli.spaces import Transformer, WeightSpace, transformer_of

READS = (Transformer,)


@dataclass(frozen=True)
class Config:
    """`width` of the branches of statistics, `embedding` of the flat one; `standardised`: each
    statistic by constants of the training set, set by `calibrate`."""

    width: int = 256
    embedding: int = 64
    standardised: bool = False
    outputs: int = 1


_TABLE = "baseline StatNN of arXiv:2410.04209"
PRESETS = {
    "branched-statnn-mnist": Preset(Config(), 203_393, _TABLE, "transformer-mnist"),
    "branched-statnn-ag-news": Preset(Config(), 168_449, _TABLE, "transformer-ag-news"),
    "branched-statnn-standardised": Preset(
        Config(standardised=True), None, "ours: constants of the training set", "transformer-mnist"
    ),
}


class Model(Metanetwork):
    """dict of (b, *shape) -> raw outputs (b, outputs)."""

    standards: Any  # a ModuleList; mypy takes the methods of what it holds for tensors

    def __init__(self, space: WeightSpace, config: Config = Config()) -> None:
        super().__init__()
        space = transformer_of(space, "branched_statnn")
        self.space, self.config = space, config
        embed, self.classify = ends(space)
        roles = sum(role in READ for block in space.blocks for role in block.roles)
        sizes = [7 * roles, *[7 * len(self.classify)] * bool(self.classify)]
        n = config.width
        self.standards = nn.ModuleList(
            Standardise(size) if config.standardised else nn.Identity() for size in sizes
        )
        self.bodies = nn.ModuleList(mlp([size, n, n]) for size in sizes)
        self.embed = None
        if embed:
            linear = nn.Linear(sum(space[name].size for name in embed), config.embedding)
            self.embed = Flat(space, embed, linear, config.standardised)
        width = n * len(sizes) + config.embedding * bool(embed)
        self.last = nn.Linear(width, config.outputs)

    def claims(self, space: WeightSpace) -> set[str]:
        """Orders of neurons and of heads."""
        return {name for name in ("permutation", "heads") if allowed(name, space) is None}

    def _phi(self, w: Mapping[str, Tensor]) -> list[Tensor]:
        found = [statistics(self.space.read(w))]
        if self.classify:
            found.append(torch.cat([seven(w[name].flatten(1)) for name in self.classify], dim=1))
        return found

    def calibrate(self, w: Mapping[str, Tensor]) -> None:
        """Set the constants of `standardised` from the training set's weights; else nothing."""
        if not self.config.standardised:
            return
        for standard, phi in zip(self.standards, self._phi(w), strict=True):
            standard.fit(phi)
        if self.embed is not None:
            self.embed.fit(w)

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        parts = zip(self.bodies, self.standards, self._phi(w), strict=True)
        found = [body(standard(phi)) for body, standard, phi in parts]
        if self.embed is not None:
            found.append(self.embed(w))
        return self.last(torch.cat(found, dim=1))
