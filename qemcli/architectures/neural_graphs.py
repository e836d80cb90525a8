"""Neural graphs: message passing (NG-GNN) or attention (NG-T) on the graph of a network's neurons.

Kofinas et al., Graph Neural Networks for Learning Equivariant Representations of Neural Networks,
arXiv:2403.12143.

    x_i = embed(b_i) + code(place of i),   e_ij = embed(w_ij)          y = MLP(x of the outputs)

A neuron is a node, a weight an edge in both directions, a kernel one edge with all its taps. The
nodes of a hidden layer share one code, inputs and outputs have their own: hidden neurons are
exchangeable, and nothing else is. A residual sum is an edge of value 1 between the neurons that are
added. Over many architectures the code of a place is how far it is from
the inputs and from the outputs (layers/shared_graph.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qemcli.errors import UnsupportedError, UsageError
from qemcli.layers import quasi
from qemcli.layers.deltas import Deltas
from qemcli.layers.features import Features, door, require_hidden
from qemcli.layers.graph import Entry, Windows
from qemcli.layers.heads import mlp_head
from qemcli.layers.metanetwork import Metanetwork, Mixed
from qemcli.layers.pna import GNN
from qemcli.layers.presets import Preset
from qemcli.layers.relational import Transformer
from qemcli.layers.shared_graph import Layout, StandardiseKinds
from qemcli.registry import suggest
from qemcli.spaces import Chain, Layered, WeightSpace, layered_of

BACKBONES = ("gnn", "transformer")

READS = (Layered,)


@dataclass(frozen=True)
class Config:
    """`backbone`: gnn | transformer, with `channels` a node (an edge: as many | half as many) and
    so many `layers`; `heads` of the attention. `dropout` in [0, 1).

    `fourier`: random frequencies of every entry (0: entries as they are), drawn with standard
    deviation `fourier_scale`. `probes`: learned inputs whose values at every neuron are read (0:
    none). `quasi`: none | paper | released | exact, on the networks' own weights, its `eps` at the
    start, in (-.999, .999), and whether it is learned. `outputs` of the model; `expand`: branches
    of the editor.
    """

    backbone: str = "gnn"
    channels: int = 32
    layers: int = 4
    heads: int = 8
    fourier: int = 0
    fourier_scale: float = 3.0
    probes: int = 0
    dropout: float = 0.0
    quasi: str = "none"
    eps: float = 0.01
    eps_learned: bool = True
    outputs: int = 1
    expand: int = 1


_PAPER = "arXiv:2403.12143, released configuration"
_ALWAYS = "; reversed copies of edges, which it leaves out here (the count is the same)"
_GNN = Config(fourier=128, dropout=0.2, outputs=10)
_T = Config("transformer", 64, fourier=128, fourier_scale=1.0, dropout=0.2, outputs=10)
_COUNT = "; no count is told"
_OURS = "ours: what two cores train"
PRESETS = {
    "ng-gnn-inr": Preset(_GNN, 92_010, _PAPER, "siren-mnist"),
    "ng-gnn-64-inr": Preset(
        replace(_GNN, probes=64), 100_714, f"{_PAPER}, 64 probe features", "siren-mnist"
    ),
    "ng-t-inr": Preset(_T, 376_586, _PAPER + _ALWAYS, "siren-mnist"),
    "ng-t-64-inr": Preset(
        replace(_T, probes=64), 393_866, f"{_PAPER}, 64 probe features{_ALWAYS}", "siren-mnist"
    ),
    "ng-gnn-small": Preset(Config(channels=16, layers=3, outputs=10), None, _OURS, "siren-mnist"),
    "ng-gnn-32": Preset(Config(outputs=10), None, f"{_OURS}, overnight", "siren-mnist"),
    "ng-t-small": Preset(
        Config("transformer", 16, layers=2, heads=4, outputs=10), None, _OURS, "siren-mnist"
    ),
    "ng-gnn-cnn": Preset(Config(channels=256, dropout=0.2), None, f"{_PAPER}, CNN zoo{_COUNT}"),
    "ng-t-cnn": Preset(Config("transformer", 128, dropout=0.2), None, f"{_PAPER}, CNN zoo{_COUNT}"),
    "ng-gnn-cnn-small": Preset(Config(), None, _OURS),
    "ng-t-cnn-small": Preset(Config("transformer", 16, layers=2, heads=4), None, _OURS),
}
EDITORS = {
    "ng-gnn-edit": Preset(
        Config(channels=128, dropout=0.2),
        1_186_696,
        f"{_PAPER}; bias deltas from the nodes of their own layer",
        "siren-mnist",
    ),
    "ng-t-edit": Preset(
        Config("transformer", 64, heads=4, fourier=128, dropout=0.3), 391_112, _PAPER, "siren-mnist"
    ),
    "ng-gnn-edit-small": Preset(Config(channels=16, layers=3), None, _OURS, "siren-mnist"),
}


class _Graph(Metanetwork):
    """What model and editor have in common: a backbone, and what it is equivariant to."""

    space: Layered
    backbone: GNN | Transformer
    quasi: quasi.Layer | None

    def claims(self, space: WeightSpace) -> set[str]:
        """Permutations, unless a quasi layer ties its scales to the neurons' indices: nothing else
        is built in."""
        return {"permutation"} if quasi.keeps(self.quasi) else set()

    def read(self, w: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The weights as the graph takes them, behind the quasi layer."""
        return quasi.entered(self.quasi, self.space, w)

    def calibrate(self, w: Mapping[str, Tensor]) -> None:
        """Standardise by the training set: one pair of constants a tensor."""
        self.backbone.entry.calibrate(w)

    def equivariant(self, w: Mapping[str, Tensor]) -> list[tuple[str, Features]]:
        """Edges and nodes after every layer that updates both; the inputs' nodes are left out."""
        steps = _steps(self.space, self.backbone.updated(self.read(w)))
        if self.quasi is None:
            return steps
        return [("quasi", door(self.space, self.read(w))), *steps]


class Model(_Graph):
    """dict of (b, *shape) -> raw outputs (b, outputs)."""

    def __init__(
        self, space: Layered, config: Config = Config(), layout: Layout | None = None
    ) -> None:
        super().__init__()
        self.space, self.config = space, config
        self.backbone = _backbone(space, config, pairs=False, layout=layout)
        self.head = _head(space, config)
        # Drawn last: with one seed, every mode starts from the same backbone and head.
        self.quasi = quasi.make(config.quasi, space, 1, 1, config.eps, config.eps_learned)

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        return self.head(self.backbone.outputs(self.read(w)).flatten(1))


class Mixture(Mixed):
    """A neural graph over many architectures that have as many outputs each: MLPs, CNNs and SIRENs,
    with or without residual sums.

    `core` holds the parameters; the graphs of the architectures are modules without any, which are
    called with those of the core.
    """

    def __init__(self, spaces: Sequence[WeightSpace], config: Config = Config()) -> None:
        super().__init__()
        if config.probes:
            raise UnsupportedError(
                "probe features have maps of every layer's own, and these are many architectures",
                "leave them out: probes = 0",
            )
        if len(spaces) > 1:
            quasi.refuse_many(config.quasi)
        chains = [layered_of(space, "a neural graph") for space in spaces]
        self.config, self.layout = config, Layout.of(chains)
        self.core = Model(chains[0], config, self.layout)
        for space in spaces:
            self.on(space)

    def bind(self, space: WeightSpace) -> Metanetwork:
        """The graph of one architecture; UnsupportedError where the layout does not hold it."""
        chain = layered_of(space, "a neural graph")
        self.layout.check(chain)
        return Placed(self, chain)

    def calibrate(self, parts: Sequence[tuple[WeightSpace, Mapping[str, Tensor]]]) -> None:
        """Standardise by the training set: a pair of constants each for convolutions and dense
        maps, weights and biases."""
        standard = self.core.backbone.entry.standard
        if isinstance(standard, StandardiseKinds):
            chains = [(layered_of(space, "a neural graph"), w) for space, w in parts]
            standard.fit((chain, door(chain, w)) for chain, w in chains)


class Placed(Metanetwork):
    """dict of (b, *shape) -> raw outputs (b, outputs), of one of the architectures."""

    def __init__(self, shared: Mixture, space: Layered) -> None:
        super().__init__()
        self.shared, self.space = shared, space
        with torch.device("meta"):
            graph = Model(space, shared.config, shared.layout)
        self.graph = (graph,)  # in a tuple: its parameters are the shared ones

    def claims(self, space: WeightSpace) -> set[str]:
        """Permutations: nothing else is built in."""
        return {"permutation"}

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        (graph,), core = self.graph, self.shared.core
        held = {**dict(core.named_parameters()), **dict(core.named_buffers())}
        return functional_call(graph.train(core.training), held, (w,))


class Editor(_Graph):
    """dict of (b, *shape) -> what each of k = `expand` branches adds to it, dict of (b, k, *shape).

    The delta of b_l is an MLP of the nodes of layer l (the published NG-GNN reads those before
    them, and is not equivariant), that of W_l one of its forward edges.
    """

    def __init__(self, space: Chain, config: Config = Config()) -> None:
        super().__init__()
        if config.layers < 2 and config.backbone == "gnn":
            raise UsageError("an editor reads updated edges", "choose layers >= 2")
        self.space, self.config = space, config
        self.backbone = _backbone(space, config, pairs=True)
        self.windows, nodes = Windows(space), config.channels
        edges = _edge_channels(config)
        self.edge = _delta(edges, config.expand * self.windows.largest)
        self.node = _delta(nodes, config.expand)
        self.out = Deltas(space)
        self.quasi = quasi.make(config.quasi, space, 1, 1, config.eps, config.eps_learned)

    def forward(self, w: Mapping[str, Tensor]) -> dict[str, Tensor]:
        features = _features(self.space, *self.backbone(self.read(w)))
        edges = self.windows.branches([self.edge(e) for e, _ in features], self.config.expand)
        nodes = [self.node(x) for _, x in features]
        return self.out(list(zip(edges, nodes, strict=True)))


def _features(space: Layered, x: Tensor, edges: list[Tensor]) -> Features:
    """Nodes of layers 1..L in the place of the biases, edges in that of the weights."""
    return list(zip(edges, x.split(list(space.widths), dim=1)[1:], strict=True))


def _steps(space: Layered, steps: list[tuple[Tensor, list[Tensor]]]) -> list[tuple[str, Features]]:
    return [(f"layer{i}", _features(space, *step)) for i, step in enumerate(steps, start=1)]


def _delta(channels: int, writes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, writes))


def _edge_channels(config: Config) -> int:
    return config.channels if config.backbone == "gnn" else config.channels // 2


def _head(space: Layered, config: Config) -> nn.Module:
    """The published heads: three Linears of the outputs' nodes, or two of twice the width."""
    c, reads = config.channels, space.widths[-1] * config.channels
    if config.backbone == "gnn":
        return mlp_head(reads, c, config.outputs)
    return nn.Sequential(nn.Linear(reads, 2 * c), nn.ReLU(), nn.Linear(2 * c, config.outputs))


def _backbone(
    space: Layered, config: Config, pairs: bool, layout: Layout | None = None
) -> GNN | Transformer:
    """`pairs`: the transformer's last layer updates its pairs too."""
    require_hidden(space, "a neural graph")
    if config.backbone not in BACKBONES:
        hint = suggest(config.backbone, list(BACKBONES))
        raise UsageError(f"neural_graphs has no backbone '{config.backbone}'", hint)
    c, layers = config.channels, config.layers
    edges = _edge_channels(config)
    entry = Entry(space, c, edges, config.fourier, config.fourier_scale, config.probes, layout)
    if config.backbone == "gnn":
        return GNN(space, c, layers, entry, config.dropout)
    if (2 * c) % config.heads:
        raise UsageError(
            f"attention of width {2 * c} has no {config.heads} equal heads",
            "choose heads that divide twice the channels",
        )
    updates = layers if pairs else layers - 1
    return Transformer(space, c, layers, config.heads, entry, config.dropout, updates)
