"""Principal neighbourhood aggregation on blocks of edges: the messages of NG-GNN.

    m_ij = s(e_ij) * A [x_i, x_j] + t(e_ij)            [s, t] = Linear(D, 2D)
    x_i' = Linear(Linear([x_i, agg_i, c_i agg_i]))     agg_i = [mean, min, max, std]_j m_ij
    e_ij' = Linear(silu(Linear e_ij + Linear x_j' + Linear x_i'))

c_i = log(deg_i + 1) over its mean. A is split into the parts of i and of j, and whatever is linear
in a row is one matrix. Source: arXiv:2403.12143 and, for the aggregation, arXiv:2004.05718.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qemcli.layers.features import Features
from qemcli.layers.graph import FORWARD, REVERSED, Entry, blocks, sources
from qemcli.layers.links import Partners, across, modulated, partners
from qemcli.spaces import Layered

FLOOR = 1e-5  # of the variance


class PNA(nn.Module):
    """Node update from nodes (b, N, D) and the [s, t] of every block, (b, n_l, m_l, 2D).

    Edges of D channels; `encoder` is the map to [s, t], left to the caller. The widths are those of
    the node layers, inputs first. Where a layer has `partners` (links.py), all layers are updated.
    """

    def __init__(self, widths: Sequence[int], channels: int, partners: Partners) -> None:
        super().__init__()
        self.widths, self.partners = list(widths), partners
        ends = zip([0, *widths[:-1]], [*widths[1:], 0], partners, strict=True)
        degrees = [a + b + len(own) for a, b, own in ends]
        logs = [math.log(d + 1) for d in degrees]
        nodes = [log for n, log in zip(widths, logs, strict=True) for _ in range(n)]
        self.amplification = [log * len(nodes) / sum(nodes) for log in nodes]
        self.encoder = nn.Linear(channels, 2 * channels)
        self.pre = nn.Linear(2 * channels, channels)
        self.post = nn.Linear(9 * channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, modulation: Sequence[Tensor]) -> Tensor:
        """New nodes of the last layers, one for every block; x starts at their first source."""
        d, widths = x.shape[-1], self.widths[-len(modulation) :]
        target, source = self.pre.weight.split(d, dim=1)
        below = x.shape[1] - sum(widths)  # nodes that only send
        old = x[:, below:]
        p = F.linear(old, target, self.pre.bias).split(widths, dim=1)
        sent = F.linear(x, source).split([below, *widths] if below else widths, dim=1)
        q = sources(sent)[-len(modulation) :]
        found = []
        for l, (st, own_q) in enumerate(zip(modulation, q, strict=True)):
            if linked := self.partners[len(self.widths) - len(modulation) + l]:
                st, own_q = modulated(st, across(sent, linked), own_q)
            found.append(aggregate(st, p[l], own_q))
        agg = torch.cat(found, dim=1)
        c = agg.new_tensor(self.amplification[-sum(widths) :])[:, None]
        post = self.out.weight @ self.post.weight
        bias = self.out.weight @ self.post.bias + self.out.bias
        return F.linear(torch.cat([old, agg, c * agg], dim=-1), post, bias)


class EdgeUpdate(nn.Module):
    """e_ij' = inner-to-outer of silu(Linear e_ij + Linear x_j + Linear x_i), without a residual.

    `forward` stops before the outer Linear, which callers join to what comes next.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.edge = nn.Linear(channels, channels)
        self.source = nn.Linear(channels, channels)
        self.target = nn.Linear(channels, channels)
        self.outer = nn.Linear(channels, channels)

    def forward(
        self,
        edges: Sequence[Tensor],
        bias: Tensor,
        x: Tensor,
        widths: list[int],
        partners: Partners,
    ) -> list[Tensor]:
        """edges: Linear e by target block, its bias apart: that is added once a node. Blocks may be
        those of the last layers only; x, of these widths, starts at their first source or before.
        """
        joined = torch.cat([self.target.weight, self.source.weight])
        bias = torch.cat([self.target.bias + bias, self.source.bias])
        target, source = F.linear(x, joined, bias).chunk(2, dim=-1)
        layers, n = source.split(widths, 1), len(edges)
        found = []
        ends = zip(target.split(widths, 1)[-n:], sources(layers)[-n:], partners[-n:], strict=True)
        for e, (t, s, own) in zip(edges, ends, strict=True):
            z = e + t[:, :, None]
            if own:
                z = torch.cat(
                    [z[:, :, : -len(own)] + s[:, None], z[:, :, -len(own) :] + across(layers, own)],
                    dim=2,
                )
            else:
                z = z.add_(s[:, None])
            found.append(F.silu(z))
        return found


class NodeNorm(nn.Module):
    """(x - mean) / sqrt(variance + 1e-5) g + s: x (b, N, c), the mean and the variance of every
    network over its nodes and channels; g, s (c,).

    How large nodes are beside each other is kept, which a norm of every node by itself loses. The
    published code's is over all nodes of all networks of a batch: there answers leak between
    networks.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[1:]) * self.weight + self.bias


class GNN(nn.Module):
    """NG-GNN's backbone: networks -> nodes (b, N, D) and the weights' edges (b, n_l, n_{l-1}, D).

    Every weight is two edges, one each way; a norm and SiLU on nodes between the layers.
    """

    def __init__(
        self, space: Layered, channels: int, layers: int, entry: Entry, dropout: float
    ) -> None:
        super().__init__()
        self.partners = partners(space)
        self.widths, self.channels, self.edge_channels = list(space.widths), channels, channels
        self.entry, self.dropout = entry, nn.Dropout(dropout)
        self.convolutions = nn.ModuleList(
            PNA(space.widths, channels, self.partners) for _ in range(layers)
        )
        self.norms = nn.ModuleList(NodeNorm(channels) for _ in range(layers - 1))
        self.updates = nn.ModuleList(EdgeUpdate(channels) for _ in range(layers - 1))

    def forward(self, w: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Nodes after the last layer, and edges after the last update; [] with one layer."""
        *_, (x, inner) = self._steps(w)
        return x, self._edges(len(self.updates) - 1, inner)

    def outputs(self, w: Mapping[str, Tensor]) -> Tensor:
        """The outputs' nodes after the last layer (b, n_L, D).

        The norms between the layers read all nodes, so it is the last layer of messages alone, and
        the edges that it reads, of which the rest is not computed; all is where sums make
        neighbours of layers that are far apart.
        """
        *_, (x, _) = self._steps(w, whole=any(self.partners))
        return x[:, -self.widths[-1] :]

    def updated(self, w: Mapping[str, Tensor]) -> list[tuple[Tensor, list[Tensor]]]:
        """Nodes and edges after every layer that updates both."""
        pairs = zip(range(len(self.updates)), self._steps(w), strict=False)
        return [(x, self._edges(i, inner)) for i, (x, inner) in pairs]

    def _edges(self, i: int, inner: list[Tensor]) -> list[Tensor]:
        """Those along the weights out of update i: (b, n_l, n_{l-1}, D), l = 1..L."""
        below = zip(inner[1:], self.widths, strict=False)
        return [self.updates[i].outer(e[:, :, :n]) for e, n in below]  # type: ignore[operator]

    def _steps(
        self, w: Mapping[str, Tensor], whole: bool = True
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Nodes after every layer, and what the outer map of its edge update reads (the last has
        none: that of the one before). Maps that follow each other are joined before they meet an
        edge. Where not `whole`, only what the outputs' last nodes depend on: the last layers.
        """
        entries = self.entry.read(w)
        updates = [update for update in self.updates if isinstance(update, EdgeUpdate)]
        count, layers = len(self.convolutions), len(self.widths)
        # How many node layers each layer of messages updates.
        reach = [layers] * (count - 1) + [layers if whole else 1]
        x = self.entry.nodes(w, entries)
        inner: list[Tensor] = []
        for i, convolution in enumerate(m for m in self.convolutions if isinstance(m, PNA)):
            maps = [convolution.encoder, *(u.edge for u in updates[i : i + 1])]
            weights: list[Tensor] = [m.weight for m in maps]
            biases: list[Tensor] = [m.bias for m in maps]
            if i > 0:
                outer = updates[i - 1].outer
                biases = [w @ outer.bias + b for w, b in zip(weights, biases, strict=True)]
                weights = [w @ outer.weight for w in weights]
                seen = mapped(inner, weights, biases[0], reach[min(i + 1, count - 1)])
            else:
                seen = self._entered(entries, weights, biases, reach[0])
            x = convolution(x[:, -sum(self.widths[-reach[i] - 1 :]) :], seen[0])
            if i < len(updates):
                x = self.dropout(F.silu(self.norms[i](x)))
                edges = seen[1][-reach[i + 1] :]
                inner = updates[i](edges, biases[1], x, self.widths, self.partners)
            yield x, inner

    def _entered(
        self, entries: Features, weights: list[Tensor], biases: list[Tensor], last: int
    ) -> list[list[Tensor]]:
        """The embedded edges of the last blocks through all maps, the first with its bias."""
        if not self.entry.weight_map.few:
            plain = blocks(*self.entry.plain_edges(entries, last))
            unit = torch.eye(self.edge_channels).to(biases[0])
            edges = self._linked(plain, unit, unit.new_zeros(len(unit)))
            return mapped(edges[-last:], weights, biases[0], last)
        joined = torch.cat([biases[0], *(torch.zeros_like(b) for b in biases[1:])])
        forward, back = self.entry.edges(entries, torch.cat(weights), joined, last)
        sizes = [len(weight) for weight in weights]
        joint = self._linked(blocks(forward, back), torch.cat(weights), joined)[-last:]
        parts = [e.split(sizes, dim=-1) for e in joint]
        return [list(found) for found in zip(*parts, strict=True)]

    def _linked(self, dense: list[Tensor], weight: Tensor, bias: Tensor) -> list[Tensor]:
        """The blocks with the embedded edges of sums behind the others."""
        if not any(self.partners):
            return dense
        ways = [self.entry.links(way, weight, bias) for way in (FORWARD, REVERSED)]
        found = []
        for l, (block, own) in enumerate(zip(dense, self.partners, strict=True)):
            links = [ways[other > l].expand(*block.shape[:2], 1, -1) for other in own]
            found.append(torch.cat([block, *links], dim=2))
        return found


def mapped(
    edges: list[Tensor], weights: list[Tensor], bias: Tensor, last: int
) -> list[list[Tensor]]:
    """The blocks through an affine map; where there is a second weight, the `last` of them through
    a linear one too."""
    if len(weights) == 1:
        return [[F.linear(e, weights[0], bias) for e in edges]]
    once = [F.linear(e, weights[0], bias) for e in edges[:-last]]
    pairs = [_Maps.apply(e, weights[0], bias, weights[1]) for e in edges[-last:]]
    return [once + [a for a, _ in pairs], [b for _, b in pairs]]


class _Maps(torch.autograd.Function):
    """Two Linears of the same rows, whose gradients meet in one product that is added to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, bias: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, a, b)
        return F.linear(x, a, bias), F.linear(x, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
        x, a, b = ctx.saved_tensors
        rows, left, right = x.flatten(0, -2), left.flatten(0, -2), right.flatten(0, -2)
        found = (left @ a).addmm_(right, b)
        return found.view_as(x), left.T @ rows, left.sum(0), right.T @ rows


def aggregate(modulation: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """[mean, min, max, std] over j of s_ij (p_i + q_j) + t_ij: (b, n, 4D).

    modulation [s, t] (b, n, m, 2D), p (b, n, D), q (b, m, D). The variance has a floor of 1e-5,
    below which its gradient is 0; equal extremes share theirs.
    """
    return _Aggregate.apply(modulation, p, q)


class _Aggregate(torch.autograd.Function):
    """By hand, since autograd takes about five times as many passes over the edges on the way
    back: all four gradients are one affine map of the message, and masks.
    """

    @staticmethod
    def forward(ctx: Any, modulation: Tensor, p: Tensor, q: Tensor) -> Tensor:
        s, t = modulation.chunk(2, dim=-1)
        m = p[:, :, None] + q[:, None]
        torch.addcmul(t, s, m, out=m)
        mean = m.mean(2)
        variance = torch.mul(m, m).mean(2) - mean.square()
        parts = [mean, m.amin(2), m.amax(2), variance.clamp_min(FLOOR).sqrt()]
        out = torch.cat(parts, dim=-1)
        ctx.save_for_backward(modulation, p, q, m, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        modulation, p, q, m, out = ctx.saved_tensors
        d, n = p.shape[-1], m.shape[2]
        mean, low, high, std = out.split(d, dim=-1)
        by_mean, by_low, by_high, by_std = gradient.split(d, dim=-1)
        slope = torch.where(std > FLOOR**0.5, by_std / (n * std), torch.zeros_like(std))
        level = by_mean / n - slope * mean
        back = torch.addcmul(level[:, :, None], slope[:, :, None], m)
        hit = torch.empty_like(m)
        for extreme, by in ((low, by_low), (high, by_high)):
            torch.eq(m, extreme[:, :, None], out=hit)  # as numbers: much faster than as booleans
            back.addcmul_(hit, (by / hit.sum(2))[:, :, None])
        found = torch.empty_like(modulation)
        torch.add(p[:, :, None], q[:, None], out=hit)
        torch.mul(hit, back, out=found[..., :d])
        found[..., d:] = back
        back.mul_(modulation[..., :d])
        return found, back.sum(2), back.sum(1)
