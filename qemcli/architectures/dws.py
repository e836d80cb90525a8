"""DWSNets: deep weight-space networks, a map from every tensor of a network to every other.

Navon et al., Equivariant Architectures for Learning in Deep Weight Spaces, arXiv:2301.12780.

    H_1 = D_1 W,    H_i = D_i drop(relu(norm(H_{i-1}))),  i = 2..depth+1      y = A pool(relu(H))

D_i commutes with permutations of the hidden neurons (layers/dws.py); the pool takes maxima (or
means) over them. `basis` takes the same space of linear maps as HNP's full basis, with means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from qemcli.layers import quasi
from qemcli.layers.deltas import Deltas
from qemcli.layers.dws import DWSLayer, FoldedPool, TensorBatchNorm
from qemcli.layers.equivariant import HNPLinear
from qemcli.layers.features import ChannelDropout, Features, pointwise
from qemcli.layers.metanetwork import Bodied, Body
from qemcli.layers.presets import Preset
from qemcli.layers.statistics import StandardiseTensors
from qemcli.spaces import Chain


@dataclass(frozen=True)
class Config:
    """`hidden` channels; `depth`: layers after the first; `dropout` of channels in [0, 1).

    `maps`: attention (published) or sets, on the neurons that two tensors share, or basis (one
    linear map, HNP's full basis, with means inside); `reduction`: max (published) or mean;
    `heads` of attention, 1 in the last layer. `norm`: batch normalisation a tensor.
    `standardised`: one mean and std a tensor, by `calibrate`. `start`: factor of the first weights;
    the published editors take 1e-4. `quasi`: none | paper | released | exact, its `eps` at the
    start, in (-.999, .999), and whether it is learned. `expand`: branches of the editor.
    """

    hidden: int = 32
    depth: int = 4
    maps: str = "attention"
    reduction: str = "max"
    heads: int = 8
    norm: bool = True
    dropout: float = 0.0
    standardised: bool = True
    start: float = 1.0
    quasi: str = "none"
    eps: float = 0.01
    eps_learned: bool = True
    outputs: int = 1
    expand: int = 1


_SMALL = Config(16, 2, "basis", "mean", norm=False, outputs=10)
PRESETS = {
    "dws": Preset(
        Config(outputs=10), 552_650, "arXiv:2301.12780, INR classification", "siren-mnist"
    ),
    "dws-small": Preset(_SMALL, None, "ours: what two cores train", "siren-mnist"),
    "dws-cnn": Preset(Config(), None, "arXiv:2301.12780, as for INRs; it has no CNN zoo"),
    "dws-cnn-small": Preset(replace(_SMALL, outputs=1), None, "ours: what two cores train"),
}
_OCE = "arXiv:2602.01083; with the 6 scalars that its training script holds"
EDITORS = {
    "dws-edit": Preset(Config(start=1e-4, dropout=0.1), 424_453, f"{_OCE}, k = 1", "siren-mnist"),
    **{
        f"dws-oce-{k}": Preset(
            Config(hidden=30, heads=10, start=1e-4, dropout=0.1, expand=k),
            count + 6,
            f"{_OCE}, k = {k}",
            "siren-mnist",
        )
        for k, count in {1: 374_287, 2: 377_404, 4: 383_788, 8: 397_156}.items()
    },
    "dws-edit-small": Preset(_SMALL, None, "ours: what two cores train", "siren-mnist"),
}


class _Body(Body):
    """The layers: one-channel features -> features of `c_out` channels, with every step by name."""

    def __init__(self, space: Chain, config: Config, c_out: int) -> None:
        super().__init__()
        self.standard = StandardiseTensors(space, config.standardised)
        channels = [1, *[config.hidden] * config.depth, c_out]
        last = len(channels) - 2
        self.layers = nn.ModuleList(
            _layer(space, config, a, b, config.heads if i < last else 1)
            for i, (a, b) in enumerate(pairwise(channels))
        )
        norms = (
            TensorBatchNorm(space, c) if config.norm else nn.Identity() for c in channels[1:-1]
        )
        self.norms = nn.ModuleList(norms)
        self.dropout = ChannelDropout(config.dropout)

    def steps(self, h: Features) -> list[tuple[str, Features]]:
        h = self.standard(h)
        steps = [("input", h)]
        h = self.layers[0](h)
        steps.append(("layer1", h))
        for i, (norm, layer) in enumerate(zip(self.norms, self.layers[1:], strict=True), start=2):
            h = layer(self.dropout(pointwise(torch.relu, norm(h))))
            steps.append((f"layer{i}", h))
        return steps

    def forward(self, h: Features) -> Features:
        return self.steps(h)[-1][1]


def _layer(space: Chain, config: Config, c_in: int, c_out: int, heads: int) -> nn.Module:
    if config.maps == "basis":
        return HNPLinear(space, c_in, c_out, full_basis=True)
    layer = DWSLayer(space, c_in, c_out, config.maps, config.reduction, heads)
    layer.init(config.start)
    return layer


class Model(Bodied):
    """dict of (b, *shape) -> raw outputs (b, outputs)."""

    def __init__(self, space: Chain, config: Config = Config()) -> None:
        super().__init__()
        self.space, self.config = space, config
        self.body = _Body(space, config, config.hidden)
        self.dropout = ChannelDropout(config.dropout)
        self.pool = FoldedPool(space, config.reduction)
        self.head = nn.Linear(self.pool.per_channel * config.hidden, config.outputs)
        # Drawn last: with one seed, every mode starts from the same backbone and head.
        self.quasi = _quasi(space, config, config.hidden)

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        h = pointwise(torch.relu, self.read(w))
        return self.head(self.pool(self.dropout(h)))


class Editor(Bodied):
    """dict of (b, *shape) -> what each of k = `expand` branches adds to it, dict of (b, k, *shape).

    The body with k channels in its last layer, times one learned scalar a tensor.
    """

    def __init__(self, space: Chain, config: Config = Config()) -> None:
        super().__init__()
        self.space, self.config = space, config
        self.body = _Body(space, config, config.expand)
        self.out = Deltas(space)
        self.quasi = _quasi(space, config, config.expand)

    def forward(self, w: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.out(self.read(w))


def _quasi(space: Chain, config: Config, c_out: int) -> quasi.Layer | None:
    """Behind the last layer."""
    c_in = config.hidden if config.depth else 1
    return quasi.make(config.quasi, space, c_in, c_out, config.eps, config.eps_learned)
