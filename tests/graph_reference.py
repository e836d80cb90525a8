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

    def norm(self, target: str, roles: dict[str, Tensor], role: str, layer: int) -> None:
        """The gain and the shift of a norm, from a node each."""
        for kind, name in (("gain", role), ("shift", f"{role}_shift")):
            if name in roles:
                node = f"{kind} {role} {layer} {target}", 0
                self.nodes[node] = (layer, -1, kind)
                for i, value in enumerate(roles[name].reshape(-1)):
                    self.edges.append((node, (target, i), value, layer, kind, (0.0, 0.0)))

    def sums(self, source: str, target: str, like: Tensor, layer: int, kind: str = "sum") -> None:
        """Edges of value 1, neuron by neuron."""
        for node in [n for n in self.nodes if n[0] == source]:
            at = node, (target, node[1])
            self.edges.append((*at, like.new_ones(()), layer, kind, (0.0, 0.0)))

    def bias(self, target: str, bias: Tensor, layer: int, kind: str = "linear-bias") -> None:
        self.nodes["bias of " + target, 0] = (layer, -1, "bias")
        for i, value in enumerate(bias):
            at = ("bias of " + target, 0), (target, i)
            self.edges.append((*at, value, layer, kind, (0.0, 0.0)))


def graph_of(space: WeightSpace, w: dict[str, Tensor]) -> Graph:
    """Of one network, its tensors without a batch axis."""
    if isinstance(space, Transformer):
        return (_transformer if space.placement == "plain" else _family)(space, w)
    return _layered(space, w)


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


def _family(space, w) -> Graph:
    """Of GPT-2, BERT, ViT, Llama, Qwen2 and GPT-NeoX, from the roles of their blocks."""
    graph, wide = Graph(), space.width
    graph.stand("s0", wide, 1, "stream")
    first = True
    last, sets = "s0", {}
    inside = {place.tensor for block in space.blocks for _, place in block.places}
    for t in space.tensors:
        if t.name not in inside:
            last = _outside(graph, t.name, w[t.name], last, sets, first)
        elif first:
            first = False
            for i, roles in enumerate(space.read({k: v[None] for k, v in w.items()})):
                last = _block(graph, space, {k: v[0] for k, v in roles.items()}, i)
    return graph


def _block(graph, space, roles, i) -> str:
    """Block i from stream s{i}, in layer 1 + 4 i; returns the next one's name."""
    at, post, parallel = 1 + 4 * i, space.placement == "post", space.style.parallel
    read, end = f"s{i}", f"s{i + 1}"
    mid = end if parallel else f"m{i}"
    graph.stand(mid, space.width, at + (4 if parallel else 2), "stream")
    graph.stand(end, space.width, at + 4, "stream")
    start = read if parallel else mid
    graph.norm(mid if post else read, roles, "norm1", at + (2 if post else 1))
    graph.norm(end if post else start, roles, "norm2", at + (4 if post else 3))
    _attention(graph, space, roles, i, at)
    _attention_biases(graph, roles, i, at, space.heads[i][1])
    if "out_bias" in roles:
        _from_one(graph, f"{i} out", mid, roles["out_bias"], at + 2, "linear-bias")
    graph.sums(read, mid, roles["up"], at + 2)
    _forward(graph, roles, i, at, (start, end), space.activation or "unknown")
    if not parallel:
        graph.sums(mid, end, roles["up"], at + 4)
    return end


def _forward(graph, roles, i, at, ends, kind) -> None:
    graph.stand(f"f{i}", roles["up"].shape[1], at + 3, kind)
    for role, kind in (("up", "linear"), ("gate", "gate")):
        if role in roles:
            graph.matrix(ends[0], f"f{i}", roles[role].T, at + 3, kind)
        if f"{role}_bias" in roles:
            _from_one(graph, f"{i} {role}", f"f{i}", roles[f"{role}_bias"], at + 3, f"{kind}-bias")
    graph.matrix(f"f{i}", ends[1], roles["down"].T, at + 4, "linear")
    if "down_bias" in roles:
        _from_one(graph, f"{i} down", ends[1], roles["down_bias"], at + 4, "linear-bias")


def _attention(graph, space, roles, i, at) -> None:
    """Head by head; the queries that share keys have neurons of their own."""
    groups, queries, d, _ = space.heads[i]
    rotated, read = space.rotary.pairing != "none", f"s{i}"
    mid = f"s{i + 1}" if space.style.parallel else f"m{i}"
    for k in range(groups):
        keys = f"{i} k{k}"
        own = [keys] if queries == 1 else [f"{keys} q{q}" for q in range(queries)]
        for name in {keys, *own}:
            for j in range(d):
                graph.nodes[name, j] = (at + 1, j if rotated else -1, "attention")
        for q, name in enumerate(own):
            graph.matrix(read, name, roles["query"][k, q].T, at + 1, "query")
            graph.matrix(name, mid, roles["out"][k, q].T, at + 2, "out")
            if name != keys:
                graph.sums(keys, name, roles["query"], at + 1, "group")
        for role in ("key", "value"):
            graph.matrix(read, keys, roles[role][k].T, at + 1, role)


def _attention_biases(graph, roles, i, at, queries) -> None:
    """One node a role, and one a query head of a group."""
    for role in ("query", "key", "value"):
        if f"{role}_bias" not in roles:
            continue
        bias = roles[f"{role}_bias"]
        bias = bias if role == "query" else bias[:, None]
        for q in range(bias.shape[1]):
            graph.nodes[f"{i} {role} {q}", 0] = (at + 1, -1, "bias")
            for k in range(bias.shape[0]):
                own = f"{i} k{k} q{q}" if role == "query" and queries > 1 else f"{i} k{k}"
                for j in range(bias.shape[2]):
                    ends = (f"{i} {role} {q}", 0), (own, j)
                    graph.edges.append((*ends, bias[k, q, j], at + 1, "linear-bias", (0.0, 0.0)))


def _from_one(graph, name, target, values, layer, kind) -> None:
    graph.nodes[name, 0] = (layer, -1, "bias")
    for i, value in enumerate(values):
        graph.edges.append(((name, 0), (target, i), value, layer, kind, (0.0, 0.0)))


# What stands outside the blocks: by the end of a name, (what it is, where it leads to).
EMBEDDINGS = {
    "wte.weight": "vocabulary", "wpe.weight": "position", "embed_tokens.weight": "vocabulary",
    "embed_in.weight": "vocabulary", "word_embeddings.weight": "vocabulary",
    "embeddings.position_embeddings.weight": "position",
    "token_type_embeddings.weight": "segment", "position_embeddings": "position",
    "cls_token": "special",
}  # fmt: skip
MAPS = {
    "lm_head.weight": "output", "embed_out.weight": "output", "classifier.weight": "output",
    "pooler.dense.weight": "unknown", "transform.dense.weight": "stream",
}  # fmt: skip


def _outside(graph, name, x, last, sets, first) -> str:
    """Where the next map reads."""
    ends = [end for end in (*EMBEDDINGS, *MAPS) if name.endswith(end)]
    layer = next(node[0] for (at, _), node in graph.nodes.items() if at == last)
    if ends and ends[0] in EMBEDDINGS:
        kind = EMBEDDINGS[ends[0]]
        x = x.reshape(-1, x.shape[-1])
        graph.stand(kind, len(x), 0, kind, kind != "special")
        graph.matrix(kind, last, x.T, 1, "embedding")
    elif name.endswith("projection.weight"):
        graph.stand("pixels", x.shape[1], 0, "input", True)
        high, across = x.shape[2:]
        for i, j, u, v in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
            place = (u - (high - 1) / 2, v - (across - 1) / 2)
            graph.edges.append((("pixels", j), (last, i), x[i, j, u, v], 1, "convolution", place))
    elif ends:
        kind = MAPS[ends[0]]
        graph.stand(name, len(x), layer + 1, kind, kind == "output")
        graph.matrix(last, name, x, layer + 1, "linear")
        return name
    elif name == "cls.predictions.bias":
        _from_one(graph, name, "vocabulary", x, 0, "linear-bias")
    elif name.endswith(("dense.bias", "classifier.bias", "projection.bias")):
        kind = "convolution-bias" if first else "linear-bias"
        _from_one(graph, name, last, x, layer, kind)
    else:
        role = "norm" if name.endswith("weight") else "norm_shift"
        graph.norm(last, {role: x}, "norm", layer)
    return last


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
