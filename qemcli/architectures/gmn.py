"""Graph metanetworks: message passing on the typed graph of a network of any architecture.

Lim, Maron, Law, Lorraine and Lucas, Graph Metanetworks for Processing Diverse Neural Architectures,
arXiv:2312.04501.

    x_i = A [layer, index, type](i)      e_ij = B [value, layer, type, place](ij)
    u_ij = relu(C [x_i, x_j, e_ij])      of normed x and e
    v_i  = relu(F [x_i, mean_j relu(D [x_j, u_ij])])
    e_ij += G silu(u_ij),   x_i += H silu(v_i)                 (the last block updates edges only)
    y = MLP(mean_ij relu(R norm(e_ij)))

Numbers are embedded by sin(Linear(.)), types by a table. The graph is layers/typed_graph.py: an
edge a parameter, parallel ones a kernel tap, so the parameters here depend on no architecture and
one predictor reads many. Values are divided by the root mean square of their type in the training
set. Hidden neurons have no number: what has no order may be permuted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qemcli.groups import allowed, stream
from qemcli.layers import quasi
from qemcli.layers.features import Features, door
from qemcli.layers.message_passing import blocks, incoming_mean, joined
from qemcli.layers.metanetwork import Metanetwork, Mixed
from qemcli.layers.presets import Preset
from qemcli.layers.typed_graph import EDGES, NODES, TypedGraph, typed_graph
from qemcli.spaces import Chain, Residual, Transformer, WeightSpace

READS = (Chain, Residual, Transformer)


@dataclass(frozen=True)
class Config:
    """`channels` of every node and edge; `layers`: blocks of message passing, 1 or more; `dropout`
    in [0, 1) of what a block adds.

    `quasi`: none | paper | released | exact, on the networks' own weights, its `eps` at the start,
    in (-.999, .999), and whether it is learned.
    """

    channels: int = 64
    layers: int = 4
    dropout: float = 0.0
    quasi: str = "none"
    eps: float = 0.01
    eps_learned: bool = True
    outputs: int = 1


PRESETS = {
    "gmn": Preset(
        Config(), None, "arXiv:2312.04501: the released blocks, 4 of them; widths are not released"
    ),
    "gmn-small": Preset(Config(channels=16, layers=3), None, "ours: what two cores train"),
}


class Sines(nn.Module):
    """Numbers (..., n) -> sin(Linear(n, c))."""

    def __init__(self, numbers: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(numbers, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sin()


class Entry(nn.Module):
    """A graph and its values -> embedded nodes (1, N, c) and edges (b, E, c)."""

    scale: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = c = channels
        self.node_layer, self.node_index = Sines(1, c), Sines(1, c)
        self.node_type = _types(len(NODES), 19, c)
        self.node = nn.Linear(3 * c, c)
        self.value, self.edge_layer, self.place = Sines(1, c), Sines(1, c), Sines(2, c)
        self.edge_type = _types(len(EDGES), 10, c)
        self.edge = nn.Linear(4 * c, c)
        self.register_buffer("scale", torch.ones(len(EDGES)))
        self.register_load_state_dict_pre_hook(_with_new_types)

    def fit(self, parts: Sequence[tuple[TypedGraph, Mapping[str, Tensor]]]) -> None:
        """The root mean square of the values of every type; 1 where there are none."""
        squares = torch.zeros(len(EDGES), dtype=torch.float64)
        counts = torch.zeros(len(EDGES), dtype=torch.float64)
        for graph, w in parts:
            for block, x in zip(graph.edges, graph.values(w), strict=True):
                at = EDGES.index(block.kind)
                squares[at] += x.square().sum(dtype=torch.float64)
                counts[at] += x.numel()
        found = (squares / counts.clamp_min(1)).sqrt()
        self.scale.copy_(torch.where(found > 0, found, torch.ones_like(found)))

    def nodes(self, graph: TypedGraph) -> Tensor:
        """(1, N, c): nothing of it depends on the weights."""
        like = self.node_type.weight
        sizes = torch.tensor([n.size for n in graph.nodes], device=like.device)
        layers = like.new_tensor([float(n.layer) for n in graph.nodes])
        kinds = torch.tensor([NODES.index(n.kind) for n in graph.nodes], device=like.device)
        numbers = torch.tensor([number for n in graph.nodes for number in n.numbers])
        parts = [
            self.node_layer(layers[:, None]).repeat_interleave(sizes, 0),
            self.node_index(numbers.to(like)[:, None]),
            self.node_type(kinds).repeat_interleave(sizes, 0),
        ]
        return self.node(torch.cat(parts, dim=-1))[None]

    def edges(self, graph: TypedGraph, w: Mapping[str, Tensor]) -> Tensor:
        """(b, E, c). What is the same for all edges of a tap is mapped once."""
        by_value, by_rest = self.edge.weight.split([self.channels, 3 * self.channels], dim=1)
        flat = [
            (x / self.scale[EDGES.index(block.kind)]).flatten(1)
            for block, x in zip(graph.edges, graph.values(w), strict=True)
        ]
        seen = F.linear(self.value(torch.cat(flat, dim=1)[..., None]), by_value)
        return seen + self._codes(graph, by_rest)

    def _codes(self, graph: TypedGraph, weight: Tensor) -> Tensor:
        """(E, c): layer, type and place of every edge."""
        like = self.edge_type.weight
        taps = [len(block.taps) for block in graph.edges]
        repeats = torch.tensor(taps, device=like.device)
        layers = like.new_tensor([float(block.layer) for block in graph.edges])
        kinds = torch.tensor([EDGES.index(e.kind) for e in graph.edges], device=like.device)
        places = like.new_tensor([tap for block in graph.edges for tap in block.taps])
        parts = [
            self.edge_layer(layers[:, None]).repeat_interleave(repeats, 0),
            self.edge_type(kinds).repeat_interleave(repeats, 0),
            self.place(places),
        ]
        codes = F.linear(torch.cat(parts, dim=-1), weight, self.edge.bias).split(taps)
        pairs = zip(graph.edges, codes, strict=True)
        return torch.cat(
            [
                code.expand(*graph.shape(block)[:2], *code.shape).flatten(0, 2)
                for block, code in pairs
            ]
        )


def _types(count: int, first: int, channels: int) -> nn.Embedding:
    """The table of types, those after the `first` drawn by themselves: a graph without them starts,
    with one seed, as when there were no others."""
    weight = nn.Embedding(first, channels).weight.detach()
    generator = torch.Generator().manual_seed(first)
    more = torch.randn(count - first, channels, generator=generator, device="cpu")
    return nn.Embedding.from_pretrained(torch.cat([weight, more.to(weight)]), freeze=False)


def _with_new_types(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """What was saved when there were fewer types has no rows for the new ones: they stay as drawn,
    and no graph that it was trained on has them."""
    own = module.state_dict()
    for name in ("node_type.weight", "edge_type.weight", "scale"):
        saved = state.get(prefix + name)
        if saved is not None and len(saved) < len(own[name]):
            state[prefix + name] = torch.cat([saved, own[name][len(saved) :].to(saved)])


class Block(nn.Module):
    """One step of message passing; `last`: of the edges only."""

    def __init__(self, channels: int, last: bool, dropout: float) -> None:
        super().__init__()
        c, self.last = channels, last
        self.edge_norm, self.edge = nn.LayerNorm(c), nn.Linear(3 * c, c)
        self.edge_out, self.dropout = nn.Linear(c, c), nn.Dropout(dropout)
        if not last:
            self.node_norm, self.message = nn.LayerNorm(c), nn.Linear(2 * c, c)
            self.node, self.node_out = nn.Linear(2 * c, c), nn.Linear(c, c)

    def forward(self, graph: TypedGraph, x: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Nodes (b, N, c), edges (b, E, c)."""
        c = x.shape[-1]
        h = x if self.last else self.node_norm(x)
        source, target, own = self.edge.weight.split(c, dim=1)
        z = F.linear(self.edge_norm(e), own)
        z = joined(graph, z, F.linear(h, source), F.linear(h, target, self.edge.bias))
        u = torch.relu_(z)
        if not self.last:
            source, own = self.message.weight.split(c, dim=1)
            said = F.linear(h, source, self.message.bias)
            heard = incoming_mean(graph, torch.relu_(joined(graph, F.linear(u, own), said)))
            v = torch.relu(self.node(torch.cat([h, heard], dim=-1)))
            x = x + self.node_out(F.silu(self.dropout(v)))
        return x, e + self.edge_out(F.silu(self.dropout(u)))


class Mixture(Mixed):
    """One graph metanetwork for networks of any architectures."""

    def __init__(self, spaces: Sequence[WeightSpace], config: Config = Config()) -> None:
        super().__init__()
        if len(spaces) > 1:
            quasi.refuse_many(config.quasi)
        c, self.config = config.channels, config
        self.entry = Entry(c)
        lasts = [i == config.layers - 1 for i in range(config.layers)]
        self.blocks = nn.ModuleList(Block(c, last, config.dropout) for last in lasts)
        self.norm, self.read = nn.LayerNorm(c), nn.Linear(c, c)
        self.head = nn.Sequential(nn.Linear(c, c), nn.ReLU(), nn.Linear(c, config.outputs))
        for space in spaces:
            self.on(space)  # what has no graph is refused before anything is trained

    def bind(self, space: WeightSpace) -> Metanetwork:
        """The networks of one weight space; UnsupportedError where it has no typed graph."""
        return Read(self, space)

    def calibrate(self, parts: Sequence[tuple[WeightSpace, Mapping[str, Tensor]]]) -> None:
        """Set the size of the values of every type from the training set."""
        self.entry.fit([(typed_graph(space), w) for space, w in parts])

    def steps(self, graph: TypedGraph, w: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Nodes (b, N, c) and edges (b, E, c) after every block."""
        e = self.entry.edges(graph, w)
        x = self.entry.nodes(graph).expand(len(e), -1, -1)
        for block in self.blocks:
            x, e = block(graph, x, e)
            yield x, e

    def answer(self, graph: TypedGraph, w: Mapping[str, Tensor]) -> Tensor:
        """Raw outputs (b, outputs)."""
        *_, (_, e) = self.steps(graph, w)
        return self.head(torch.relu(self.read(self.norm(e))).mean(1))


class Read(Metanetwork):
    """dict of (b, *shape) -> raw outputs (b, outputs), of one of the architectures."""

    def __init__(self, shared: Mixture, space: WeightSpace) -> None:
        super().__init__()
        self.shared, self.space, self.graph = shared, space, typed_graph(space)
        c = shared.config
        self.quasi = quasi.make(c.quasi, space, 1, 1, c.eps, c.eps_learned)

    def claims(self, space: WeightSpace) -> set[str]:
        """Permutations of hidden neurons, unless a quasi layer ties its scales to their indices;
        of a transformer's heads too, and of its stream where that has no signs."""
        if not quasi.keeps(self.quasi):
            return set()
        plain = isinstance(space, Transformer) and not stream.signed(space)
        also = ("heads", "stream") if plain else ("heads",)
        return {"permutation"} | {name for name in also if allowed(name, space) is None}

    def calibrate(self, w: Mapping[str, Tensor]) -> None:
        """Set the size of the values of every type from the training set."""
        self.shared.calibrate([(self.space, w)])

    def equivariant(self, w: Mapping[str, Tensor]) -> list[tuple[str, Features]]:
        """Of a chain, edges after every block; those of the biases beside the nodes."""
        if not isinstance(self.space, Chain):
            return []
        seen = quasi.entered(self.quasi, self.space, w)
        first = [("quasi", door(self.space, seen))] if self.quasi is not None else []
        steps = enumerate(self.shared.steps(self.graph, seen), start=1)
        return [*first, *((f"block{i}", _features(self.graph, *step)) for i, step in steps)]

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        return self.shared.answer(self.graph, quasi.entered(self.quasi, self.space, w))


def Model(space: WeightSpace, config: Config = Config()) -> Read:
    """Of one architecture: the same parameters, read through its graph."""
    return Read(Mixture((space,), config), space)


def _features(graph: TypedGraph, x: Tensor, e: Tensor) -> Features:
    """Weights (b, n_l, n_{l-1}, c taps) and, in the place of the biases, [node, bias's edge]."""
    found: Features = []
    for block, part in zip(graph.edges, blocks(graph, e), strict=True):
        n, m, _ = graph.shape(block)
        if block.kind.endswith("bias"):
            weight, node = found[-1]
            found[-1] = (weight, torch.cat([node, part[:, :, 0, 0]], dim=-1))
        else:
            start = graph.starts[block.target]
            weight = part.transpose(-1, -2).reshape(len(e), n, m, -1)
            found.append((weight, x[:, start : start + n]))
    return found
