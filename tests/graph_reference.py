"""The typed graph edge by edge, and message passing by scatter: the slow and obvious oracle of GMN.

One network at a time, from its matrices, without layers/typed_graph.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qemcli.architectures import gmn
from qemcli.layers.typed_graph import EDGES, NODES
from qemcli.spaces import Residual, Transformer, WeightSpace

Node = tuple[float, float, str]  # layer, number or -1, type


class Graph:
    """Nodes by a name of theirs; edges (source, target, value, layer, type, place)."""

    def __init__(self) -> None:
        self.nodes: dict[tuple, Node] = {}
        self.edges: list[tuple[tuple, tuple, Tensor, float, str, tuple[float, float]]] = []

    def stand(self, name: str, size: int, layer: int, kind: str, ordered: bool = False) -> None:
        for i in range(size):
            self.nodes[name, i] = (layer, i if ordered else -1, kind)

    def matrix(self, source: str, target: str, weight: Tensor, layer: int, kind: str) -> None:
        """weight (targets, sources)."""
        for i in range(weight.shape[0]):
            for j in range(weight.shape[1]):
                at = (source, j), (target, i)
                self.edges.append((*at, weight[i, j], layer, kind, (0.0, 0.0)))

    def bias(self, target: str, bias: Tensor, layer: int, kind: str = "linear-bias") -> None:
        self.nodes["bias of " + target, 0] = (layer, -1, "bias")
        for i, value in enumerate(bias):
            at = ("bias of " + target, 0), (target, i)
            self.edges.append((*at, value, layer, kind, (0.0, 0.0)))


def graph_of(space: WeightSpace, w: dict[str, Tensor]) -> Graph:
    """Of one network, its tensors without a batch axis."""
    return _transformer(space, w) if isinstance(space, Transformer) else _layered(space, w)


def _layered(space, w) -> Graph:
    graph = Graph()
    graph.stand("0", space.layers[0].cols, 0, "input", True)
    added = space.added if isinstance(space, Residual) else [-1] * len(space.layers)
    for l, layer in enumerate(space.layers, start=1):
        last = l == len(space.layers)
        kind = "output" if last else space.activation or "unknown"
        graph.stand(str(l), layer.rows, l, kind, last)
        for i in range(layer.rows):
            for j in range(layer.cols):
                at = (str(l - 1), j), (str(l), i)
                for value, kind, place in _parallel(layer, w[layer.weight], i, j):
                    graph.edges.append((*at, value, l, kind, place))
        if layer.bias:
            kind = "convolution-bias" if layer.conv else "linear-bias"
            graph.bias(str(l), w[layer.bias], l, kind)
        if added[l - 1] >= 0:
            for i in range(layer.rows):
                at = (str(added[l - 1] + 1), i), (str(l), i)
                one = torch.ones((), dtype=w[layer.weight].dtype)
                graph.edges.append((*at, one, l, "sum", (0.0, 0.0)))
    return graph


def _parallel(layer, weight, i, j):
    """The edges from neuron j to neuron i: (value, type, place)."""
    if layer.conv:
        high, wide = weight.shape[2:]
        for u in range(high):
            for v in range(wide):
                place = (u - (high - 1) / 2, v - (wide - 1) / 2)
                yield weight[i, j, u, v], "convolution", place
        return
    for s in range(layer.taps):
        kind = "linear" if layer.taps == 1 else "flattened"
        yield weight[i, j * layer.taps + s], kind, (0.0, float(s))


def _transformer(space, w) -> Graph:
    """Of a small transformer whose patches are single pixels of several channels, or of text."""
    graph, wide = Graph(), space.width
    graph.stand("r0", wide, 1, "stream", True)
    if "embedding.conv1.weight" in w:
        weight = w["embedding.conv1.weight"]
        graph.stand("x", weight.shape[1], 0, "input", True)
        high, across = weight.shape[2:]
        for i in range(wide):
            for j in range(weight.shape[1]):
                for u in range(high):
                    for v in range(across):
                        place = (u - (high - 1) / 2, v - (across - 1) / 2)
                        edge = (("x", j), ("r0", i), weight[i, j, u, v], 1, "convolution", place)
                        graph.edges.append(edge)
        graph.bias("r0", w["embedding.conv1.bias"], 1, "convolution-bias")
    for b in range(len(space.blocks)):
        at, layer = f"encoder.{b}.", 1 + 4 * b
        graph.stand(f"a{b}", wide, layer + 1, "attention")
        for role, kind in (("queries", "query"), ("keys", "key"), ("values", "value")):
            weight = w[f"{at}attention.{role}.weight"]
            graph.matrix(f"r{b}", f"a{b}", weight, layer + 1, kind)
        graph.stand(f"m{b}", wide, layer + 2, "stream")
        out = w[f"{at}attention.out_projection.weight"]
        graph.matrix(f"a{b}", f"m{b}", out, layer + 2, "out")
        graph.stand(f"f{b}", len(w[f"{at}fc1.bias"]), layer + 3, "relu")
        graph.matrix(f"m{b}", f"f{b}", w[f"{at}fc1.weight"], layer + 3, "linear")
        graph.bias(f"f{b}", w[f"{at}fc1.bias"], layer + 3)
        graph.stand(f"r{b + 1}", wide, layer + 4, "stream")
        graph.matrix(f"f{b}", f"r{b + 1}", w[f"{at}fc2.weight"], layer + 4, "linear")
        graph.bias(f"r{b + 1}", w[f"{at}fc2.bias"], layer + 4)
    layer, last = 1 + 4 * len(space.blocks), f"r{len(space.blocks)}"
    graph.stand("h", wide, layer + 1, "relu")
    graph.matrix(last, "h", w["classifier.fc1.weight"], layer + 1, "linear")
    graph.bias("h", w["classifier.fc1.bias"], layer + 1)
    graph.stand("y", len(w["classifier.fc2.bias"]), layer + 2, "output", True)
    graph.matrix("h", "y", w["classifier.fc2.weight"], layer + 2, "linear")
    graph.bias("y", w["classifier.fc2.bias"], layer + 2)
    return graph


def answer(model: gmn.Mixture, space: WeightSpace, w: dict[str, Tensor]) -> Tensor:
    """The model's parameters on the graph of one network: (outputs,)."""
    graph = graph_of(space, w)
    values = torch.stack([value for _, _, value, *_ in graph.edges])
    return scattered(model, graph, values[None])[0]


def scattered(model: gmn.Mixture, graph: Graph, values: Tensor) -> Tensor:
    """The model's parameters on networks of one graph, with their values (b, edges): (b, outputs).

    Every edge gathers its nodes and scatters to its target, as graph libraries do it.
    """
    entry = model.entry
    places = {name: i for i, name in enumerate(graph.nodes)}
    like = entry.node_type.weight
    layer, number, kinds = zip(*graph.nodes.values(), strict=True)
    parts = [
        entry.node_layer(like.new_tensor(layer)[:, None]),
        entry.node_index(like.new_tensor(number)[:, None]),
        entry.node_type(torch.tensor([NODES.index(k) for k in kinds])),
    ]
    x = entry.node(torch.cat(parts, dim=1)).expand(len(values), -1, -1)
    sources, targets, _, layers, types, taps = zip(*graph.edges, strict=True)
    kind = torch.tensor([EDGES.index(k) for k in types])
    coded = [
        entry.edge_layer(like.new_tensor(layers)[:, None]),
        entry.edge_type(kind),
        entry.place(like.new_tensor(taps)),
    ]
    seen = entry.value((values / entry.scale[kind])[..., None])
    same = torch.cat(coded, dim=1).expand(len(values), -1, -1)
    e = entry.edge(torch.cat([seen, same], dim=-1))
    source = torch.tensor([places[s] for s in sources])
    target = torch.tensor([places[t] for t in targets])
    for block in model.blocks:
        x, e = _step(block, x, e, source, target)
    return model.head(F.relu(model.read(model.norm(e))).mean(1))


def _step(block, x, e, source, target):
    h = x if block.last else block.node_norm(x)
    ends = [h[:, source], h[:, target]]
    u = F.relu(block.edge(torch.cat([*ends, block.edge_norm(e)], dim=-1)))
    if not block.last:
        m = F.relu(block.message(torch.cat([ends[0], u], dim=-1)))
        heard = torch.zeros_like(h).index_add(1, target, m)
        degree = torch.zeros_like(h[:, :, :1]).index_add(1, target, torch.ones_like(m[:, :, :1]))
        heard = heard / degree.clamp_min(1)
        v = F.relu(block.node(torch.cat([h, heard], dim=-1)))
        x = x + block.node_out(F.silu(v))
    return x, e + block.edge_out(F.silu(u))
