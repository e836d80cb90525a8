"""A network of any architecture as one typed graph: its neurons, and blocks of edges between them.

    nodes   a set for every place that neurons stand in: (how many, type, layer number)
    edges   a block for every tensor: each of m sources to each of n targets, one edge a kernel tap
            beside the other; biases from a node of their own; sums with an earlier layer as edges
            of value 1, each neuron to its own

Sets and blocks follow from the named axes: the axis that a tensor writes and the one that it reads
are the sets, kernel taps and flattened positions are parallel edges. Blocks are dense, so every sum
over the edges of a node is a reduction over an axis, without gather or scatter.
Source of the graph: Lim et al., arXiv:2312.04501.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from qemcli.errors import UnsupportedError
from qemcli.spaces import (
    ACTIVATIONS,
    Chain,
    Layer,
    NamedTensor,
    Residual,
    Transformer,
    WeightSpace,
)
from qemcli.spaces.residual import NONE

# Types have rows in a learned table: new ones go to the end.
ENDS = ("input", "output", "bias", "unknown", "attention", "stream")
NODES = (*ENDS, *sorted(ACTIVATIONS))
EDGES = (
    "linear", "linear-bias", "convolution", "convolution-bias", "flattened", "sum",
    "query", "key", "value", "out",
)  # fmt: skip


@dataclass(frozen=True)
class Nodes:
    """`size` neurons of one type in one layer; `ordered`: inputs and outputs, told apart by their
    number."""

    size: int
    kind: str
    layer: int
    ordered: bool = False


@dataclass(frozen=True)
class Edges:
    """A block of edges from set `source` to set `target` (numbers of sets).

    Values are those of `tensor` with its axes, taken apart, in the order `axes`, which makes it
    (b, targets, sources, taps); without a tensor they are 1, from each neuron to its own. `taps`
    are the places of the parallel edges.
    """

    kind: str
    layer: int
    source: int
    target: int
    tensor: str | None = None
    unfolded: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()
    taps: tuple[tuple[float, float], ...] = ((0.0, 0.0),)

    @property
    def paired(self) -> bool:
        """True where each source has one edge, to the target of its own number."""
        return self.tensor is None


@dataclass(frozen=True)
class TypedGraph:
    """The graph of a weight space."""

    nodes: tuple[Nodes, ...]
    edges: tuple[Edges, ...]
    starts: tuple[int, ...] = field(init=False)  # of every set among the nodes

    def __post_init__(self) -> None:
        starts = [0]
        for nodes in self.nodes:
            starts.append(starts[-1] + nodes.size)
        object.__setattr__(self, "starts", tuple(starts))

    def shape(self, block: Edges) -> tuple[int, int, int]:
        """(targets, sources, taps); of paired edges (n, 1, 1)."""
        targets, sources = self.nodes[block.target].size, self.nodes[block.source].size
        return (targets, 1, 1) if block.paired else (targets, sources, len(block.taps))

    @property
    def counts(self) -> list[int]:
        """How many edges every block has."""
        return [math.prod(self.shape(block)) for block in self.edges]

    def degrees(self) -> list[int]:
        """How many edges come into each node of every set."""
        found = [0] * len(self.nodes)
        for block in self.edges:
            _, sources, taps = self.shape(block)
            found[block.target] += sources * taps
        return found

    def values(self, w: Mapping[str, Tensor]) -> list[Tensor]:
        """(b, targets, sources, taps) of every block; of paired edges ones (b, n, 1, 1)."""
        some = next(iter(w.values()))
        found = []
        for block in self.edges:
            if block.tensor is None:
                found.append(some.new_ones(len(some), *self.shape(block)))
                continue
            x = w[block.tensor].reshape(-1, *block.unfolded)
            x = x.permute(0, *(1 + a for a in block.axes))
            found.append(x.reshape(len(x), *self.shape(block)))
        return found


def typed_graph(space: WeightSpace) -> TypedGraph:
    """The graph of an MLP, a CNN, a SIREN, one with residual sums, or a small transformer.

    Raises UnsupportedError for every other network.
    """
    if isinstance(space, Chain):
        return _layered(space, space.layers, [NONE] * len(space.layers))
    if isinstance(space, Residual):
        return _layered(space, space.layers, space.added)
    if isinstance(space, Transformer) and space.placement == "plain":
        return _of_transformer(space)
    raise UnsupportedError(
        f"no typed graph is known of {space.title}",
        "known: MLPs, CNNs, SIRENs, residual networks, transformers without residual sums",
    )


class _Drawing:
    """A graph in the making: sets of neurons by the names of their axes, and blocks."""

    def __init__(self, space: WeightSpace, taps: str) -> None:
        self.space, self.taps = space, taps
        self.nodes: list[Nodes] = []
        self.edges: list[Edges] = []

    def stand(self, size: int, kind: str, layer: int, ordered: bool = False) -> int:
        """The number of a new set."""
        self.nodes.append(Nodes(size, kind, layer, ordered))
        return len(self.nodes) - 1

    def tensor(self, name: str, kind: str, layer: int, source: int, target: int) -> None:
        """The block of a tensor: what it writes, what it reads, and what is parallel."""
        t = self.space[name]
        written, read, parallel = self._sides(t)
        sizes = [t.axes[i].size for i in parallel]
        order = (*written, *read, *parallel)
        block = Edges(kind, layer, source, target, name, t.unfolded, order, _places(sizes))
        self.edges.append(block)

    def vector(self, name: str | None, kind: str, layer: int, target: int) -> None:
        """The block of a bias, from a node of its own; nothing where there is none."""
        if name is not None:
            source = self.stand(1, "bias", layer)
            n = len(self.space[name].axes)
            block = Edges(
                kind, layer, source, target, name, self.space[name].unfolded, tuple(range(n))
            )
            self.edges.append(block)

    def _sides(self, t: NamedTensor) -> tuple[list[int], list[int], list[int]]:
        places = range(len(t.axes))
        parallel = [i for i in places if t.axes[i].name in self.taps]
        reads = [i for i in places if t.axes[i].dual or t.axes[i].name == "x"]
        read = [i for i in reads if i not in parallel]
        return [i for i in places if i not in read and i not in parallel], read, parallel

    def done(self) -> TypedGraph:
        return TypedGraph(tuple(self.nodes), tuple(self.edges))


def _places(sizes: Sequence[int]) -> tuple[tuple[float, float], ...]:
    """Where parallel edges stand: taps from the middle of their kernel, positions by number."""
    rows, columns = (1, 1, *sizes)[-2:]
    middle = [(n - 1) / 2 for n in (rows, columns)] if len(sizes) == 2 else [0, 0]
    return tuple((i - middle[0], j - middle[1]) for i in range(rows) for j in range(columns))


def _layered(space: Chain | Residual, layers: Sequence[Layer], added: Sequence[int]) -> TypedGraph:
    """Layer by layer; what is added to layer l comes from the neurons of an earlier one."""
    drawing = _Drawing(space, "uvs")
    sets = [drawing.stand(layers[0].cols, "input", 0, True)]
    for l, (layer, earlier) in enumerate(zip(layers, added, strict=True), start=1):
        last = l == len(layers)
        kind = "output" if last else space.activation or "unknown"
        sets.append(drawing.stand(layer.rows, kind, l, last))
        shape = "convolution" if layer.conv else "linear" if layer.taps == 1 else "flattened"
        drawing.tensor(layer.weight, shape, l, sets[-2], sets[-1])
        of_bias = "convolution-bias" if layer.conv else "linear-bias"
        drawing.vector(layer.bias, of_bias, l, sets[-1])
        if earlier != NONE:
            drawing.edges.append(Edges("sum", l, sets[earlier + 1], sets[-1]))
    return drawing.done()


def _of_transformer(space: Transformer) -> TypedGraph:
    """Query, key and value edges lead to the same neurons of attention, one a number of a head."""
    drawing, sizes = _Drawing(space, "uw"), space.sizes
    if any("norm1" in block.roles for block in space.blocks):
        raise UnsupportedError("no typed graph is known of norms with parameters")
    outside = {t.name: t for t in space.outside}
    patch = next((name for name, t in outside.items() if "x" in [a.name for a in t.axes]), None)
    # What attention reads first has an order: the positions that are added to it are fixed.
    stream = drawing.stand(space.width, "stream", 1, True)
    if patch is not None:
        inputs = drawing.stand(sizes["x"], "input", 0, True)
        drawing.tensor(patch, "convolution", 1, inputs, stream)
        drawing.vector(_bias_of(outside, patch), "convolution-bias", 1, stream)
    layer = 1
    for block, (groups, queries, d, e) in zip(space.blocks, space.heads, strict=True):
        if queries != 1 or d != e:
            raise UnsupportedError("no typed graph is known of heads that share keys")
        places = {role: place.tensor for role, place in block.roles.items()}
        heads = drawing.stand(groups * d, "attention", layer + 1)
        for role in ("query", "key", "value"):
            drawing.tensor(places[role], role, layer + 1, stream, heads)
            drawing.vector(places.get(f"{role}_bias"), "linear-bias", layer + 1, heads)
        middle = drawing.stand(space.width, "stream", layer + 2)
        drawing.tensor(places["out"], "out", layer + 2, heads, middle)
        drawing.vector(places.get("out_bias"), "linear-bias", layer + 2, middle)
        size = space[places["up"]].size // space.width
        wide = drawing.stand(size, space.activation or "unknown", layer + 3)
        drawing.tensor(places["up"], "linear", layer + 3, middle, wide)
        drawing.vector(places.get("up_bias"), "linear-bias", layer + 3, wide)
        layer += 4
        stream = drawing.stand(space.width, "stream", layer)
        drawing.tensor(places["down"], "linear", layer, wide, stream)
        drawing.vector(places.get("down_bias"), "linear-bias", layer, stream)
    return _answers(drawing, outside, stream, layer)


def _answers(
    drawing: _Drawing, outside: Mapping[str, NamedTensor], stream: int, layer: int
) -> TypedGraph:
    """The maps behind the blocks: a classifier's hidden neurons, where it has some, and outputs."""
    for axis, kind in (("h1", drawing.space.activation or "unknown"), ("y", "output")):
        name = next(
            (n for n, t in outside.items() if t.axes[0].name == axis and len(t.axes) > 1), None
        )
        if name is not None:
            layer += 1
            size = outside[name].axes[0].size
            nodes = drawing.stand(size, kind, layer, kind == "output")
            drawing.tensor(name, "linear", layer, stream, nodes)
            drawing.vector(_bias_of(outside, name), "linear-bias", layer, nodes)
            stream = nodes
    return drawing.done()


def _bias_of(outside: Mapping[str, NamedTensor], name: str) -> str | None:
    """The vector that stands beside a map."""
    bias = name.removesuffix("weight") + "bias"
    return bias if bias in outside else None
