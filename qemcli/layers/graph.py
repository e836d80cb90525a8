"""A network as a graph of dense blocks: a node a neuron, inputs included; an edge a weight.

Nodes are one tensor (b, N, c), layer after layer, n_0 first. Edges stand in blocks of their target
layer l = 0..L, with the sources below before those above:

    block l: (b, n_l, n_{l-1} + n_{l+1}, c)      [ W_l[i, j] | W_{l+1}[k, i] reversed ]

so every aggregation is a reduction over axis 2, without gather or scatter, and the batch is free.
The edge of a convolution carries its kernel taps, that of a flattened junction its positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qemcli.errors import UnsupportedError
from qemcli.functions import FUNCTIONS
from qemcli.layers.features import Features, door
from qemcli.layers.neurons import uniform
from qemcli.layers.statistics import StandardiseTensors
from qemcli.spaces import Layered, Residual

if TYPE_CHECKING:
    from qemcli.layers.shared_graph import Layout

MIDDLE = -1  # the place of a residual sum in the windows
FORWARD, REVERSED, BOTH = 0, 1, 2  # raw channels of an edge: (w, 0, w), reversed (0, w, w)
Embedding = Callable[[Tensor, int, int], Tensor]  # of entries, a layer and a way


class Windows:
    """Where the taps of each layer stand in a window shared by all: kernels centred (the odd one
    left over goes behind), a single tap in the middle; a flattened junction has its own window.

    `sizes` are the taps of the windows; `cut` takes a layer's taps (last axis) out of them, and as
    the last of `places` stands the middle, the kernel of a residual sum. A
    larger `kernel` leaves room for those of other networks, `flattened` puts all such junctions at
    the beginning of one window of that size.
    """

    def __init__(
        self, space: Layered, kernel: tuple[int, int] | None = None, flattened: int = 0
    ) -> None:
        kernels = [space[la.weight].unfolded[2:] if la.conv else (1, 1) for la in space.layers]
        height, width = kernel or (max(side) for side in zip(*kernels, strict=True))
        self.sizes, self.places = [height * width], []
        if flattened:
            self.sizes.append(flattened)
        for la, (h, w) in zip(space.layers, kernels, strict=True):
            if la.conv or la.taps == 1:
                top, left = (height - h) // 2, (width - w) // 2
                place = [(top + i) * width + left + j for i in range(h) for j in range(w)]
                self.places.append((0, place))
            elif flattened:
                self.places.append((1, list(range(la.taps))))
            else:
                self.places.append((len(self.sizes), list(range(la.taps))))
                self.sizes.append(la.taps)
        self.places.append((0, [(height - 1) // 2 * width + (width - 1) // 2]))

    def cut(self, windows: Sequence[Tensor], l: int) -> Tensor:
        """The taps of layer l (0 is the first) out of `windows`, one (..., size) for each size."""
        window, place = self.places[l]
        whole = len(place) == self.sizes[window]
        return windows[window] if whole else windows[window][..., place]

    def branches(self, edges: Sequence[Tensor], count: int) -> list[Tensor]:
        """Edges (b, n_l, n_{l-1}, count * largest window) -> (..., count * taps) of each layer."""
        parts = [e.unflatten(-1, (count, -1)) for e in edges]
        windows = [[e[..., :n] for n in self.sizes] for e in parts]
        return [self.cut(own, l).flatten(-2) for l, own in enumerate(windows)]

    @property
    def largest(self) -> int:
        return max(self.sizes)


class RawEdges(nn.Module):
    """An affine map of the entries themselves: Linear(3 taps, c) of (forward, reversed, sum)."""

    few = True  # numbers an edge: what follows is best joined to the map of them

    def __init__(self, windows: Windows, channels: int) -> None:
        super().__init__()
        self.windows = windows
        self.weights = nn.ParameterList(torch.empty(channels, 3, n) for n in windows.sizes)
        self.bias = nn.Parameter(torch.empty(channels))
        for weight in self.weights:
            uniform(weight, 3 * weight.shape[-1])
        uniform(self.bias, 3 * windows.sizes[0])

    def then(self, weight: Tensor, bias: Tensor) -> Embedding:
        """The embedding of entries x (b, i, j, taps) of layer l, and then weight and bias."""
        end = weight @ self.bias + bias

        def embedded(x: Tensor, l: int, way: int) -> Tensor:
            own = self.windows.cut(list(self.weights), l)
            return F.linear(x, weight @ (own[:, way] + own[:, BOTH]), end)

        return embedded

    def absent(self) -> Tensor:
        """(c,): the embedding of an edge that is not there."""
        return self.bias


class FourierEdges(nn.Module):
    """Random Fourier features of (forward, reversed, sum), then Linear(2 frequencies, c).

    The frequencies are drawn once, with standard deviation `spread`, saved, and not trained.
    """

    few = False  # more than channels: what follows is best mapped behind them

    def __init__(self, windows: Windows, channels: int, frequencies: int, spread: float) -> None:
        super().__init__()
        self.windows = windows
        for i, n in enumerate(windows.sizes):
            self.register_buffer(f"frequencies{i}", spread * torch.randn(frequencies, 3, n))
        self.linear = nn.Linear(2 * frequencies, channels)

    def then(self, weight: Tensor, bias: Tensor) -> Embedding:
        """The embedding of entries x (b, i, j, taps) of layer l, and then weight and bias."""
        windows = [self.get_buffer(f"frequencies{i}") for i in range(len(self.windows.sizes))]
        cosines, sines = (weight @ self.linear.weight).chunk(2, dim=1)
        end = weight @ self.linear.bias + bias

        def embedded(x: Tensor, l: int, way: int) -> Tensor:
            own = self.windows.cut(windows, l)
            rows = x.reshape(-1, x.shape[-1])
            angle = F.linear(rows, 2 * math.pi * (own[:, way] + own[:, BOTH]))
            # Two products, which is cheaper than to copy the waves beside each other.
            y = torch.addmm(end, angle.cos(), cosines.T).addmm_(angle.sin(), sines.T)
            return y.view(*x.shape[:-1], len(weight))

        return embedded

    def absent(self) -> Tensor:
        """(c,): the embedding of an edge that is not there."""
        still = _waves(self.linear.bias.new_zeros(1), self.get_buffer("frequencies0")[:, 0, :1])
        return self.linear(still)


class FourierNodes(nn.Module):
    """Random Fourier features of a bias, then Linear(2 frequencies, c)."""

    frequencies: Tensor

    def __init__(self, channels: int, frequencies: int, spread: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", spread * torch.randn(frequencies, 1))
        self.linear = nn.Linear(2 * frequencies, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(_waves(x, self.frequencies))


def _waves(x: Tensor, frequencies: Tensor) -> Tensor:
    """x (..., taps), frequencies (f, taps) -> (..., 2 f)."""
    angle = F.linear(x, 2 * math.pi * frequencies)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Probes(nn.Module):
    """Every neuron's values at p learned inputs in [-1, 1]: Linear(p, c) and LayerNorm, a layer.

    The inputs' own values are the coordinates, the outputs' those of the network with its offset.
    Dense networks only (UnsupportedError).
    """

    def __init__(self, space: Layered, count: int, channels: int) -> None:
        super().__init__()
        sums = isinstance(space, Residual)
        if space.layers[0].conv or space.activation is None or sums:
            raise UnsupportedError(
                "probe features run dense networks without sums whose activation is known",
                "leave them out: probes = 0",
            )
        self.space = space
        self.points = nn.Parameter(2 * torch.rand(count, space.widths[0]) - 1)
        self.maps = nn.ModuleList(
            nn.Sequential(nn.Linear(count, channels), nn.LayerNorm(channels)) for _ in space.widths
        )

    def values(self, w: Mapping[str, Tensor]) -> list[Tensor]:
        """(b, n_l, p) of every layer, inputs first."""
        space, run = self.space, self.space.forward
        pairs = space.matrices(w)
        values = [self.points.T.expand(len(pairs[0][0]), -1, -1)]
        for la, (weight, bias) in zip(space.layers, pairs, strict=True):
            z = torch.baddbmm(bias[..., None], weight.flatten(2), values[-1])
            if la is space.layers[-1]:
                values.append(z + run.offset)
            else:
                z = run.w0 * z if space.activation == "sin" else z
                values.append(FUNCTIONS[space.activation or ""](z))
        return values

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        """(b, N, c)."""
        return torch.cat([m(v) for m, v in zip(self.maps, self.values(w), strict=True)], dim=1)


class Entry(nn.Module):
    """Networks -> embedded nodes and edges: standardised entries, and learned codes of places.

    A code an input neuron, one a hidden layer, one an output neuron: those tell apart what may not
    change places. Source: arXiv:2403.12143, with `calibrate` setting one mean and std a tensor.
    """

    def __init__(
        self,
        space: Layered,
        nodes: int,
        edges: int,
        fourier: int,
        spread: float,
        probes: int,
        layout: Layout | None = None,
    ) -> None:
        """`layout`: what is shared with networks of other architectures, in the place of codes and
        constants of this one's own."""
        super().__init__()
        self.space = space
        windows = layout.windows(space) if layout else Windows(space)
        self.standard = layout.standard(space) if layout else StandardiseTensors(space, True)
        self.bias_map: nn.Module
        self.weight_map: RawEdges | FourierEdges
        if fourier:
            self.bias_map = FourierNodes(nodes, fourier, spread)
            self.weight_map = FourierEdges(windows, edges, fourier, spread)
        else:
            self.bias_map, self.weight_map = nn.Linear(1, nodes), RawEdges(windows, edges)
        self.probes = Probes(space, probes, nodes) if probes else None
        self.node_in, self.edge_in = nn.Linear(nodes, nodes), nn.Linear(edges, edges)
        self.kinds = layout.places(space) if layout else [[kind] for kind in places(space)]
        codes = layout.codes if layout else 1 + self.kinds[-1][0]
        self.codes = nn.Parameter(torch.randn(codes, nodes))

    def calibrate(self, w: Mapping[str, Tensor]) -> None:
        """One mean and one std a tensor, from the training set: no symmetry is broken."""
        if isinstance(self.standard, StandardiseTensors):
            self.standard.fit(door(self.space, w))

    def read(self, w: Mapping[str, Tensor]) -> Features:
        """The entries, standardised."""
        return self.standard(door(self.space, w))

    def nodes(self, w: Mapping[str, Tensor], entries: Features) -> Tensor:
        """(b, N, nodes); the inputs have no bias and read as zeros."""
        biases = [bias for _, bias in entries]
        inputs = biases[0].new_zeros(len(biases[0]), self.space.widths[0], 1)
        x = self.bias_map(torch.cat([inputs, *biases], dim=1))
        if self.probes is not None:
            x = x + self.probes(w)
        kinds = torch.tensor(self.kinds, device=self.codes.device)
        return self.node_in(x) + self.codes[kinds].sum(1)

    def edges(
        self, entries: Features, weight: Tensor, bias: Tensor, last: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The embedded edges through one more affine map (o, edges): forward and reversed copies.

        Forward (b, n_l, n_{l-1}, o), reversed (b, n_{l-1}, n_l, o), l = 1..L, with as many more as
        are 0 wide in their targets where these are not among the `last` node layers. Handing over
        the map saves the embedding itself: affine maps are joined before they meet an edge.
        """
        return self._embedded(
            entries, weight @ self.edge_in.weight, self.edge_in.bias @ weight.T + bias, last
        )

    def plain_edges(
        self, entries: Features, last: int | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The embedded edges themselves, as `edges` gives them; of all node layers without
        `last`."""
        layers = last or len(entries) + 1
        return self._embedded(entries, self.edge_in.weight, self.edge_in.bias, layers)

    def _embedded(
        self, entries: Features, weight: Tensor, bias: Tensor, last: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        embedded = self.weight_map.then(weight, bias)
        first = len(entries) + 1 - last  # node layer whose edges are asked for
        forward, back = [], []
        for l, (x, _) in enumerate(entries):
            below, above = x, x.transpose(1, 2)
            to = below if l + 1 >= first else below[:, :0]
            fro = above if l >= first else above[:, :0]
            forward.append(embedded(to, l, FORWARD))
            back.append(embedded(fro, l, REVERSED))
        return forward, back

    def links(self, way: int, weight: Tensor, bias: Tensor) -> Tensor:
        """(o,): the embedded edge of a residual sum through one more affine map, as in `edges`."""
        one = weight.new_ones(1)
        bias = self.edge_in.bias @ weight.T + bias
        return self.weight_map.then(weight @ self.edge_in.weight, bias)(one, MIDDLE, way)

    def absent(self) -> Tensor:
        """(edges,): the embedding of an edge that is not there."""
        return self.edge_in(self.weight_map.absent())


def places(space: Layered) -> list[int]:
    """The kind of every node: each input its own, one a hidden layer, each output its own."""
    n, *hidden, outputs = space.widths
    kinds = list(range(n))
    for width in hidden:
        kinds += [kinds[-1] + 1] * width
    return kinds + [kinds[-1] + 1 + i for i in range(outputs)]


def blocks(forward: list[Tensor], back: list[Tensor]) -> list[Tensor]:
    """Edges by target layer, 0..L: the sources below, then those above."""
    last = len(forward)
    parts = [
        ([forward[l - 1]] if l else []) + ([back[l]] if l < last else []) for l in range(last + 1)
    ]
    return [torch.cat(part, dim=2) if len(part) > 1 else part[0] for part in parts]


def sources(layers: Sequence[Tensor]) -> list[Tensor]:
    """Node features (b, n_l, c) of every layer -> those of each block's sources (b, m_l, c)."""
    last = len(layers) - 1
    parts = [layers[max(l - 1, 0) : l] + layers[l + 1 : l + 2] for l in range(last + 1)]  # type: ignore[operator]
    return [torch.cat(list(part), dim=1) for part in parts]
