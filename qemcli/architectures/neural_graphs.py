"""Neural graphs: message passing (NG-GNN) or attention (NG-T) on the graph of a network's neurons.

Kofinas et al., Graph Neural Networks for Learning Equivariant Representations of Neural Networks,
arXiv:2403.12143.

    x_i = embed(b_i) + code(place of i),   e_ij = embed(w_ij)          y = MLP(x of the outputs)

A neuron is a node, a weight an edge in both directions, a kernel one edge with all its taps. The
nodes of a hidden layer share one code, inputs and outputs have their own: hidden neurons are
exchangeable, and nothing else is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from qemcli.errors import UsageError
from qemcli.layers.features import Features, require_hidden
from qemcli.layers.graph import Entry
from qemcli.layers.heads import mlp_head
from qemcli.layers.pna import GNN
from qemcli.layers.presets import Preset
from qemcli.registry import suggest
from qemcli.spaces import WeightSpace

BACKBONES = {"gnn": GNN}


@dataclass(frozen=True)
class Config:
    """`backbone`: gnn | transformer, with `channels` a node (an edge: as many | half as many) and
    so many `layers`; `heads` of the attention. `dropout` in [0, 1).

    `fourier`: random frequencies of every entry (0: entries as they are), drawn with standard
    deviation `fourier_scale`. `probes`: learned inputs whose values at every neuron are read (0:
    none). `outputs` of the model; `expand`: branches of the editor.
    """

    backbone: str = "gnn"
    channels: int = 32
    layers: int = 4
    heads: int = 8
    fourier: int = 0
    fourier_scale: float = 3.0
    probes: int = 0
    dropout: float = 0.0
    outputs: int = 1
    expand: int = 1


_PAPER = "arXiv:2403.12143, released configuration"
_GNN = Config(fourier=128, dropout=0.2, outputs=10)
PRESETS = {
    "ng-gnn-inr": Preset(_GNN, 92_010, _PAPER, "siren-mnist"),
    "ng-gnn-64-inr": Preset(
        replace(_GNN, probes=64), 100_714, f"{_PAPER}, 64 probe features", "siren-mnist"
    ),
    "ng-gnn-small": Preset(
        Config(channels=16, layers=3, outputs=10), None, "ours: what two cores train", "siren-mnist"
    ),
}


class Model(nn.Module):
    """dict of (b, *shape) -> raw outputs (b, outputs)."""

    kind = "invariant"

    def __init__(self, space: WeightSpace, config: Config = Config()) -> None:
        super().__init__()
        self.space, self.config = space, config
        self.backbone = _backbone(space, config)
        n = space.widths[-1] * config.channels
        self.head = mlp_head(n, config.channels, config.outputs)

    def claims(self, space: WeightSpace) -> set[str]:
        """Permutations: nothing else is built in."""
        return {"permutation"}

    def calibrate(self, w: Mapping[str, Tensor]) -> None:
        """Standardise by the training set: one pair of constants a tensor."""
        self.backbone.entry.calibrate(w)

    def equivariant(self, w: Mapping[str, Tensor]) -> list[tuple[str, Features]]:
        """Edges and nodes after every layer that updates both; the inputs' nodes are left out."""
        return [
            (f"layer{i}", _features(self.space, *step))
            for i, step in enumerate(self.backbone.updated(w), start=1)
        ]

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        outputs = self.backbone.nodes(w)[:, -self.space.widths[-1] :]
        return self.head(outputs.flatten(1))


def _features(space: WeightSpace, x: Tensor, edges: list[Tensor]) -> Features:
    """Nodes of layers 1..L in the place of the biases, edges in that of the weights."""
    return list(zip(edges, x.split(list(space.widths), dim=1)[1:], strict=True))


def _backbone(space: WeightSpace, config: Config) -> GNN:
    require_hidden(space, "a neural graph")
    if config.backbone not in BACKBONES:
        hint = suggest(config.backbone, list(BACKBONES))
        raise UsageError(f"neural_graphs has no backbone '{config.backbone}'", hint)
    edges = config.channels
    entry = Entry(
        space, config.channels, edges, config.fourier, config.fourier_scale, config.probes
    )
    return GNN(space, config.channels, config.layers, entry, config.dropout)
