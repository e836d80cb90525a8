"""The door of ScaleGMN: weights and biases as the nodes and edges of a graph that has factors.

A node has the factor q_l[i], an edge q_l[i] / q_{l-1}[j], an edge read from above the reciprocal:
itself for signs, for positive scales a second set of edges. Source: arXiv:2406.10685.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qemcli.balance import balance
from qemcli.layers.features import Features
from qemcli.layers.graph import Windows, places
from qemcli.layers.images import Image, Rows, image, whole
from qemcli.layers.neurons import uniform
from qemcli.layers.scale_equivariant import (
    FIRST,
    HIDDEN,
    LAST,
    PlainEdge,
    PlainMap,
    PlainMessage,
    ScaleEdge,
    ScaleEq,
    ScaleMessage,
)
from qemcli.spaces import Chain


@dataclass
class Graph:
    """Nodes, edges, and the edges as they are read from above (the same ones, or a second set).

    `sent`: the nodes as messages read them, where some are still images.
    """

    nodes: list[Tensor]
    edges: list[Rows]
    above: list[Rows]
    sent: Sequence[Rows] = ()

    def features(self) -> Features:
        """Edges and nodes of layers 1..L."""
        pairs = zip(self.edges, self.nodes[1:], strict=True)
        return [(whole(e), x) for e, x in pairs]


@dataclass(frozen=True)
class Symmetry:
    """The maps of one group: message, update of nodes, update of edges.

    `factors`: neurons have factors, so codes multiply hidden nodes and edges instead of being
    added. `two`: the edges read from above are a second set (positive scales).
    """

    message: type[ScaleMessage] | type[PlainMessage]
    update: type[ScaleEq] | type[PlainMap]
    edge: type[ScaleEdge] | type[PlainEdge]
    factors: bool
    two: bool = False


def place(l: int, layers: int) -> int:
    """Of node layer l in 0..layers."""
    return FIRST if l == 0 else LAST if l == layers else HIDDEN


def reciprocals(space: Chain, w: Mapping[str, Tensor]) -> list[Tensor]:
    """Entries (b, n_l, n_{l-1}, taps) that carry q_{l-1} / q_l where the weights carry q_l/q_{l-1}.

    With u = d w the balanced network: u d_l / d_{l-1}, which is 1 / w but for |u|^2, finite, and 0
    where w is. (The published code reads the weights themselves: not invariant to scales.)
    """
    with torch.no_grad():
        balanced, element = balance(space, w)
    factors = [None, *element.factor.values(), None]
    found = []
    for l, (x, _) in enumerate(space.matrices(balanced)):
        below, above = factors[l], factors[l + 1]
        x = x if above is None else x * above.to(x.dtype)[:, :, None, None]
        found.append(x if below is None else x / below.to(x.dtype)[:, None, :, None])
    return found


class ScaleEntry(nn.Module):
    """Biases and weights, through maps without bias, and learned codes; the inputs' bias is 1.

    Codes: of every place of a node (each input, a hidden layer, each output), and, where
    `edge_codes`, of every kind of edge. `calibrate` divides by one size a tensor.
    """

    sizes: Tensor

    def __init__(
        self, space: Chain, channels: int, symmetry: Symmetry, both: bool, edge_codes: bool
    ) -> None:
        super().__init__()
        self.space, self.symmetry = space, symmetry
        self.second = both and symmetry.two
        self.windows, self.kinds = Windows(space), places(space)
        self.node = nn.Linear(1, channels, bias=False)
        self.weights = nn.ParameterList(torch.empty(channels, n) for n in self.windows.sizes)
        for weight in self.weights:
            uniform(weight, weight.shape[-1])
        self.codes = nn.Parameter(torch.randn(max(self.kinds) + 1, channels))
        n, *hidden, outputs = space.widths
        kinds = n + len(hidden) - 1 + outputs if edge_codes else 0
        self.edge_codes = nn.Parameter(torch.randn(kinds, channels)) if kinds else None
        self.register_buffer("sizes", torch.ones(3, len(space.layers)))

    def calibrate(self, w: Mapping[str, Tensor]) -> None:
        """The root mean square of every tensor: a positive constant, so no factor is lost."""
        weights, biases = zip(*self.space.matrices(w), strict=True)
        above = reciprocals(self.space, w) if self.second else weights
        for row, tensors in enumerate((weights, biases, above)):
            for l, x in enumerate(tensors):
                size = x.square().mean(dtype=torch.float64).sqrt()
                self.sizes[row, l] = torch.where(size > 0, size, torch.ones_like(size))

    def node_codes(self) -> list[Tensor]:
        """(n_l, c) of every node layer."""
        return list(self.codes[self.kinds].split(list(self.space.widths)))

    def forward(self, w: Mapping[str, Tensor]) -> Graph:
        weights, biases = zip(*self.space.matrices(w), strict=True)
        edges = self._edges(weights, self.sizes[0])
        second = self.second
        above = self._edges(reciprocals(self.space, w), self.sizes[2]) if second else edges
        inputs = biases[0].new_ones(len(biases[0]), self.space.widths[0])
        scaled = [x / size for x, size in zip(biases, self.sizes[1], strict=True)]
        sent = self._nodes([inputs, *scaled])
        return Graph([whole(x) for x in sent], edges, above, sent)

    def _nodes(self, biases: list[Tensor]) -> list[Rows]:
        found: list[Rows] = []
        last, first = len(biases) - 1, self.space.widths[0]
        for l, (bias, code) in enumerate(zip(biases, self.node_codes(), strict=True)):
            if self.symmetry.factors and place(l, last) == HIDDEN:
                # One code a layer.
                own = self.node.weight.T * self.codes[first + l - 1]
                found.append(Image(bias[..., None], own))
            else:
                found.append(self.node(bias[..., None]) + code)
        return found

    def _edges(self, weights: list[Tensor] | tuple[Tensor, ...], sizes: Tensor) -> list[Rows]:
        found: list[Rows] = []
        for l, code in enumerate(self._edge_codes()):
            x, table = weights[l] / sizes[l], self.windows.cut(list(self.weights), l).T
            if code is None:
                found.append(image(x, table))
            elif not self.symmetry.factors:
                found.append(x @ table + code)
            elif code.dim() == 1:  # one code a layer
                found.append(image(x, table * code))
            else:
                found.append(x @ table * code)
        return found

    def _edge_codes(self) -> list[Tensor | None]:
        """Those of the first layer (n_0, c), of the middle (c,), of the last (n_L, 1, c)."""
        if self.edge_codes is None:
            return [None] * len(self.space.layers)
        n, outputs = self.space.widths[0], self.space.widths[-1]
        first, middle, last = self.edge_codes.split([n, len(self.space.layers) - 2, outputs])
        return [first, *middle, last[:, None]]
