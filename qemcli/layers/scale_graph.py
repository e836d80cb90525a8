"""ScaleGMN's way through a network: layers of messages one way or both, behind the entry.

    x_i <- U([x_i, sum_j message(j -> i) from below (, and from above)])      e_ij <- E(e_ij, x)

Nodes are a list (b, n_l, c), l = 0..L; edges a list (b, n_l, n_{l-1}, c), l = 1..L. A node has the
factor q_l[i], an edge q_l[i] / q_{l-1}[j], an edge read from above the reciprocal: itself for
signs, for positive scales a second set of edges. Source: arXiv:2406.10685.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set

import torch
from torch import Tensor, nn

from qemcli.layers.images import Rows
from qemcli.layers.scale_entry import Graph, ScaleEntry, Symmetry, place
from qemcli.layers.scale_equivariant import (
    PlainEdge,
    PlainMap,
    PlainMessage,
    ScaleEdge,
    ScaleEq,
    ScaleMessage,
    Style,
)

PERMUTATION = Symmetry(PlainMessage, PlainMap, PlainEdge, factors=False)
SIGN = Symmetry(ScaleMessage, ScaleEq, ScaleEdge, factors=True)
SCALE = Symmetry(ScaleMessage, ScaleEq, ScaleEdge, factors=True, two=True)


class Direction(nn.Module):
    """Messages from below (source axis 2), or from above (1): a sum on every node layer."""

    def __init__(
        self, source: int, channels: int, symmetry: Symmetry, style: Style, codes: int
    ) -> None:
        super().__init__()
        self.source = source
        self.message = symmetry.message(channels, style, codes)

    def forward(
        self,
        nodes: Sequence[Rows],
        edges: list[Rows],
        codes: list[Tensor] | None,
        targets: Set[int],
    ) -> list[Tensor | None]:
        """None on the layer that nothing comes to, and on those that are no targets."""
        last, below = len(nodes) - 1, self.source == 2
        found: list[Tensor | None] = [None] * len(nodes)
        for l, e in enumerate(edges, start=1):
            to, start = (l, l - 1) if below else (l - 1, l)
            own = [] if codes is None else [codes[start]]
            if to in targets:
                found[to] = self.message(place(to, last), self.source, e, nodes[start], *own)
        return found


class ScaleLayer(nn.Module):
    """One layer: messages, update of the nodes to `writes` channels, and of the edges to `edges`
    channels (0: they stay as they are).
    """

    def __init__(
        self,
        channels: int,
        writes: int,
        edges: int,
        symmetry: Symmetry,
        style: Style,
        both: bool,
        codes: int,
    ) -> None:
        super().__init__()
        ways = (2, 1) if both else (2,)
        self.directions = nn.ModuleList(
            Direction(way, channels, symmetry, style, codes) for way in ways
        )
        self.update = symmetry.update((1 + len(ways)) * channels, writes, style, codes)
        self.edge = symmetry.edge(channels, edges, style) if edges else None
        again = bool(edges) and both and symmetry.two
        self.edge_above = symmetry.edge(channels, edges, style) if again else None

    def forward(
        self, graph: Graph, codes: list[Tensor] | None, targets: Set[int], wanted: Set[int]
    ) -> Graph:
        """Nodes of the layers `targets` and the `wanted` edges (0: those between layers 0 and 1)
        anew; the others as they were."""
        nodes, last = graph.nodes, len(graph.nodes) - 1
        sent = graph.sent or nodes
        seen = [
            direction(sent, edges, codes, targets)
            for direction, edges in zip(self.directions, (graph.edges, graph.above), strict=False)
        ]
        updated = list(nodes)
        for l in targets:
            came = [torch.zeros_like(nodes[l]) if way[l] is None else way[l] for way in seen]
            own = [] if codes is None else [codes[l]]
            updated[l] = self.update(place(l, last), torch.cat([nodes[l], *came], -1), *own)
        if self.edge is None:
            return Graph(updated, graph.edges, graph.above)
        edges = self.edge(graph.edges, sent, wanted)
        above = edges if self.edge_above is None else self.edge_above(graph.above, sent, wanted)
        return Graph(updated, edges, above)


class ScaleStack(nn.Module):
    """Networks -> the graph after the entry and after every layer.

    `skips` linear skips around the first layers; `inner_codes`: messages and updates read the
    codes; dropout on nodes, and where `bare` not behind the last layer, whose nodes are deltas.
    """

    def __init__(
        self,
        entry: ScaleEntry,
        layers: Sequence[ScaleLayer],
        skips: int,
        inner_codes: bool,
        dropout: float,
        bare: bool,
    ) -> None:
        super().__init__()
        c = entry.codes.shape[1]
        self.entry, self.layers = entry, nn.ModuleList(layers)
        self.skips = nn.ModuleList(nn.Linear(c, c, bias=False) for _ in range(skips))
        self.inner_codes, self.dropout = inner_codes, nn.Dropout(dropout)
        self.dropped = len(layers) - bare

    def forward(
        self,
        w: Mapping[str, Tensor],
        read: Set[int] | None = None,
        put: Callable[[Graph], Graph] | None = None,
    ) -> list[Graph]:
        """`read`: the node layers that are read after the last layer (None: all, and edges); what
        they do not depend on is left as it was. `put`: what is done to the graph that enters."""
        graph = self.entry(w) if put is None else put(self.entry(w))
        codes = self.entry.node_codes() if self.inner_codes else None
        steps = [graph]
        for i, (targets, wanted) in enumerate(self._reach(len(graph.nodes), read)):
            before, graph = graph.nodes, self.layers[i](graph, codes, targets, wanted)
            if i < len(self.skips):
                graph.nodes = [
                    x + self.skips[i](old) if l in targets else x
                    for l, (x, old) in enumerate(zip(graph.nodes, before, strict=True))
                ]
            if i < self.dropped:
                graph.nodes = [
                    self.dropout(x) if l in targets else x for l, x in enumerate(graph.nodes)
                ]
            steps.append(graph)
        return steps

    def _reach(self, count: int, read: Set[int] | None) -> list[tuple[Set[int], Set[int]]]:
        """The node layers that each layer updates, and the edges, of `count` node layers."""
        whole = range(count)
        if read is None:
            return [(set(whole), set(whole[:-1]))] * len(self.layers)
        found: list[tuple[Set[int], Set[int]]] = []
        targets, wanted = set(read), set[int]()
        ways = len(self.layers[0].directions)  # type: ignore[arg-type]
        for _ in self.layers:
            found.insert(0, (set(targets), wanted))
            # What comes to the targets, on which edges: from below, and perhaps from above.
            wanted = {l - 1 for l in targets} | (set(targets) if ways > 1 else set())
            wanted &= set(whole[:-1])
            targets |= wanted | {l + 1 for l in wanted}
        return found
