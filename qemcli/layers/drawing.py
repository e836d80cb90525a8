"""Typed graphs and how they are drawn: sets of neurons, and dense blocks of edges between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from qemcli.spaces import ACTIVATIONS, WeightSpace

Picked = Mapping[str, int]
ALL: Picked = MappingProxyType({})
NO_NUMBER = -1  # of neurons that have no order
SOURCES = "xvtso"  # first letters of the axes that embeddings read, which no star marks

# Types have rows in a learned table: new ones go to the end.
ENDS = ("input", "output", "bias", "unknown", "attention", "stream")
NODES = (
    *ENDS, *sorted(ACTIVATIONS),
    "gain", "shift", "vocabulary", "position", "segment", "special",
)  # fmt: skip
EDGES = (
    "linear", "linear-bias", "convolution", "convolution-bias", "flattened", "sum",
    "query", "key", "value", "out",
    "gain", "shift", "gate", "gate-bias", "group", "embedding",
)  # fmt: skip


@dataclass(frozen=True)
class Nodes:
    """`size` neurons of one type in one layer; `ordered`: inputs and outputs, told apart by their
    number; `repeats`: so many times over, as those of attention's heads where they are rotated."""

    size: int
    kind: str
    layer: int
    ordered: bool = False
    repeats: int = 1

    @property
    def numbers(self) -> list[int]:
        """What each is told apart by."""
        if not self.ordered:
            return [NO_NUMBER] * self.size
        return [i % (self.size // self.repeats) for i in range(self.size)]


@dataclass(frozen=True)
class Edges:
    """A block of edges from set `source` to set `target` (numbers of sets).

    Values are those of `tensor` with its axes, taken apart, at `picked` (axis, index) of those that
    stand for several blocks, the others in the order `axes`, which makes it (b, targets, sources,
    taps); without a tensor they are 1, from each neuron to its own. `taps` are the places of the
    parallel edges.
    """

    kind: str
    layer: int
    source: int
    target: int
    tensor: str | None = None
    unfolded: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()
    taps: tuple[tuple[float, float], ...] = ((0.0, 0.0),)
    picked: tuple[tuple[int, int], ...] = ()

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
            for axis, index in reversed(block.picked):
                x = x.select(1 + axis, index)
            kept = sorted(block.axes)
            x = x.permute(0, *(1 + kept.index(a) for a in block.axes))
            found.append(x.reshape(len(x), *self.shape(block)))
        return found


class Drawing:
    """A graph in the making: sets of neurons by the names of their axes, and blocks."""

    def __init__(self, space: WeightSpace, taps: str) -> None:
        self.space, self.taps = space, taps
        self.nodes: list[Nodes] = []
        self.edges: list[Edges] = []

    def stand(
        self, size: int, kind: str, layer: int, ordered: bool = False, repeats: int = 1
    ) -> int:
        """The number of a new set."""
        self.nodes.append(Nodes(size, kind, layer, ordered, repeats))
        return len(self.nodes) - 1

    def tensor(
        self, name: str, kind: str, layer: int, source: int, target: int, picked: Picked = ALL
    ) -> None:
        """The block of a tensor: what it writes, what it reads, and what is parallel; of one that
        holds several, the one at `picked`, by the first letters of axes."""
        t = self.space[name]
        chosen = tuple((i, picked[a.name[0]]) for i, a in enumerate(t.axes) if a.name[0] in picked)
        taken = dict(chosen)
        rest = [i for i in range(len(t.axes)) if i not in taken]
        parallel = [i for i in rest if t.axes[i].name in self.taps]
        inner = [i for i in rest if i not in parallel]
        read = [i for i in inner if t.axes[i].dual or t.axes[i].name[0] in SOURCES]
        written = [i for i in inner if i not in read]
        order, places = (*written, *read, *parallel), _places([t.axes[i].size for i in parallel])
        block = Edges(kind, layer, source, target, name, t.unfolded, order, places, chosen)
        self.edges.append(block)

    def vector(
        self,
        name: str | None,
        kind: str,
        layer: int,
        target: int,
        picked: Picked = ALL,
        source: str = "bias",
    ) -> None:
        """The block of a bias, a gain or a shift, from a node of its own; nothing where there is
        none."""
        if name is not None:
            self.tensor(name, kind, layer, self.stand(1, source, layer), target, picked)

    def same(self, kind: str, layer: int, source: int, target: int) -> None:
        """Edges of value 1, from each neuron to the one of its number."""
        self.edges.append(Edges(kind, layer, source, target))

    def done(self) -> TypedGraph:
        return TypedGraph(tuple(self.nodes), tuple(self.edges))


def _places(sizes: Sequence[int]) -> tuple[tuple[float, float], ...]:
    """Where parallel edges stand: taps from the middle of their kernel, positions by number."""
    rows, columns = (1, 1, *sizes)[-2:]
    middle = [(n - 1) / 2 for n in (rows, columns)] if len(sizes) == 2 else [0, 0]
    return tuple((i - middle[0], j - middle[1]) for i in range(rows) for j in range(columns))
