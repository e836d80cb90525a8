"""A transformer over all pairs of neurons, with features of the pairs: the layers of NG-T.

    score_ij = (q_i + q(e_ij)) (k_j + k(e_ij)) / sqrt(width)       over ALL j, edge or not
    x_i <- LN(x_i + Linear(sum_j softmax_j(score_ij) (v_j * m(e_ij) + v(e_ij))))
    x   <- LN(x + MLP x)
    e_ij <- LN(e_ij + MLP([e_ij, e_ji], x_i, x_j)),     e <- LN(e + MLP e)

Pairs without a weight take part with the embedding of an absent one; the score is divided by the
root of the whole width, not of a head's. Both as published: arXiv:2403.12143. A residual sum is
added to the pair of the two neurons, as an identity is to a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qemcli.layers.graph import FORWARD, REVERSED, Entry
from qemcli.layers.links import partners
from qemcli.spaces import Layered


def _linear(reads: int, writes: int, bias: bool = True) -> nn.Linear:
    made = nn.Linear(reads, writes, bias)
    nn.init.xavier_uniform_(made.weight)
    if bias:
        nn.init.zeros_(made.bias)
    return made


def _mlp(channels: int, dropout: float) -> nn.Sequential:
    """Linear without bias, GELU, Linear, dropout; twice as wide within."""
    inner = _linear(channels, 2 * channels, bias=False)
    return nn.Sequential(inner, nn.GELU(), _linear(2 * channels, channels), nn.Dropout(dropout))


class Attention(nn.Module):
    """Relational attention of width 2 * nodes: x (b, N, nodes), e (b, N, N, edges) -> like x."""

    def __init__(self, nodes: int, edges: int, heads: int) -> None:
        super().__init__()
        self.heads, self.width = heads, 2 * nodes
        self.node = _linear(nodes, 3 * self.width, bias=False)
        self.edge = _linear(edges, 4 * self.width, bias=False)
        self.out = _linear(self.width, nodes)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        q, k, v = (self._split(y) for y in self.node(x).chunk(3, dim=-1))
        by_q, by_k, by_v, gate = self.edge.weight.chunk(4)
        pair_q, pair_k = self._split(F.linear(e, by_q)), self._split(F.linear(e, by_k))
        left, right = q[:, :, None] + pair_q, k[:, None] + pair_k
        scores = torch.einsum("bijhd,bijhd->bijh", left, right) / self.width**0.5
        a = scores.softmax(dim=2)
        gated = v[:, None] * self._split(F.linear(e, gate))
        # The sum goes before the map of e: N rows instead of N^2.
        seen = torch.einsum("bijh,bije->bihe", a, e)
        values = torch.einsum("bihe,hde->bihd", seen, by_v.unflatten(0, (self.heads, -1)))
        values = values + torch.einsum("bijh,bijhd->bihd", a, gated)
        return self.out(values.flatten(2))

    def _split(self, y: Tensor) -> Tensor:
        return y.unflatten(-1, (self.heads, -1))


class PairUpdate(nn.Module):
    """The update of e from both directions of a pair and its two nodes."""

    def __init__(self, nodes: int, edges: int, dropout: float) -> None:
        super().__init__()
        self.pair = _linear(2 * edges, 2 * edges)
        self.source, self.target = _linear(nodes, 2 * edges), _linear(nodes, 2 * edges)
        self.outer, self.dropout = _linear(2 * edges, edges), nn.Dropout(dropout)
        self.mlp = _mlp(edges, dropout)
        self.norms = nn.ModuleList([nn.LayerNorm(edges), nn.LayerNorm(edges)])

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        own, other = self.pair.weight.chunk(2, dim=1)
        z = F.linear(e, own, self.pair.bias) + F.linear(e, other).transpose(1, 2)
        z = z + self.source(x)[:, :, None] + self.target(x)[:, None]
        e = self.norms[0](e + self.dropout(self.outer(F.gelu(z))))
        return self.norms[1](e + self.mlp(e))


class RelationalLayer(nn.Module):
    """Attention and MLP on nodes, each with a residual and LayerNorm behind it."""

    def __init__(self, nodes: int, edges: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(nodes, edges, heads)
        self.after, self.dropout = _linear(nodes, nodes), nn.Dropout(dropout)
        self.mlp = _mlp(nodes, dropout)
        self.norms = nn.ModuleList([nn.LayerNorm(nodes), nn.LayerNorm(nodes)])

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        x = self.norms[0](x + self.dropout(self.after(self.attention(x, e))))
        return self.norms[1](x + self.mlp(x))


class Transformer(nn.Module):
    """NG-T's backbone: networks -> nodes (b, N, D) and the weights' edges (b, n_l, n_{l-1}, D/2).

    `updates`: how many layers update the pairs too (all but the last where only nodes are read).
    """

    def __init__(
        self,
        space: Layered,
        channels: int,
        layers: int,
        heads: int,
        entry: Entry,
        dropout: float,
        updates: int,
    ) -> None:
        super().__init__()
        self.widths, edges = list(space.widths), channels // 2
        self.partners = partners(space)
        self.entry = entry
        self.layers = nn.ModuleList(
            RelationalLayer(channels, edges, heads, dropout) for _ in range(layers)
        )
        self.updates = nn.ModuleList(PairUpdate(channels, edges, dropout) for _ in range(updates))

    def forward(self, w: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Nodes after the last layer, and edges after the last update."""
        *_, (x, e) = self._steps(w)
        return x, self._edges(e)

    def outputs(self, w: Mapping[str, Tensor]) -> Tensor:
        """The outputs' nodes after the last layer (b, n_L, c)."""
        *_, (x, _) = self._steps(w)
        return x[:, -self.widths[-1] :]

    def updated(self, w: Mapping[str, Tensor]) -> list[tuple[Tensor, list[Tensor]]]:
        """Nodes and edges after every layer that updates both."""
        pairs = zip(self.updates, self._steps(w), strict=False)
        return [(x, self._edges(e)) for _, (x, e) in pairs]

    def _edges(self, e: Tensor) -> list[Tensor]:
        """Pairs along the weights: (b, n_l, n_{l-1}, c), l = 1..L."""
        rows = [row.split(self.widths, dim=2) for row in e.split(self.widths, dim=1)]
        return [rows[l - 1][l].transpose(1, 2) for l in range(1, len(rows))]

    def _steps(self, w: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Nodes and pairs (b, N, N, c), source first, after every layer."""
        entries = self.entry.read(w)
        x, e = self.entry.nodes(w, entries), self._pairs(*self.entry.plain_edges(entries))
        for i, layer in enumerate(self.layers):
            x = layer(x, e)
            if i < len(self.updates):
                e = self.updates[i](x, e)
            yield x, e

    def _link(self, way: int, n: int) -> Tensor:
        """(n, n, c): what a sum adds to the pair of a neuron and the one that it is added to."""
        entry = self.entry.edge_in
        still = torch.eye(len(entry.bias), dtype=entry.bias.dtype, device=entry.bias.device)
        own = self.entry.links(way, still, torch.zeros_like(entry.bias)) - self.entry.absent()
        return torch.eye(n, dtype=own.dtype, device=own.device)[:, :, None] * own

    def _pairs(self, forward: list[Tensor], back: list[Tensor]) -> Tensor:
        """Embedded edges in their places among all pairs, source first; the rest is absent."""
        absent = self.entry.absent()
        rows = []
        for i, n in enumerate(self.widths):
            row = [absent.expand(len(forward[0]), n, m, -1) for m in self.widths]
            if i:
                row[i - 1] = back[i - 1].transpose(1, 2)
            if i < len(forward):
                row[i + 1] = forward[i].transpose(1, 2)
            for l in self.partners[i]:
                row[l] = row[l] + self._link(FORWARD if l > i else REVERSED, n)
            rows.append(torch.cat(row, dim=2))
        return torch.cat(rows, dim=1)
