"""Sums over the edges of a typed graph, block by block: reductions over axes, and no scatter.

Edges are one tensor (b, E, c), block after block, nodes another, (b, N, c), set after set.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qemcli.layers.typed_graph import TypedGraph


def joined(graph: TypedGraph, z: Tensor, sources: Tensor, targets: Tensor | None = None) -> Tensor:
    """z of every edge (b, E, c) plus what its source and its target say, (b, N, c) each; in the
    memory of z, which must not be used afterwards."""
    return _Joined.apply(graph, z, sources, targets)


def incoming_mean(graph: TypedGraph, z: Tensor) -> Tensor:
    """z of every edge (b, E, c) -> the mean over each node's incoming edges (b, N, c), zeros where
    there are none."""
    return _IncomingMean.apply(graph, z)


def blocks(graph: TypedGraph, z: Tensor) -> list[Tensor]:
    """(b, E, c) -> views (b, targets, sources, taps, c) of every block."""
    parts = z.split(graph.counts, dim=1)
    return [
        part.unflatten(1, graph.shape(block))
        for part, block in zip(parts, graph.edges, strict=True)
    ]


class _Joined(torch.autograd.Function):
    """By hand, so that nothing is copied: the gradients are sums over the axes of a block."""

    @staticmethod
    def forward(
        ctx: Any, graph: TypedGraph, z: Tensor, sources: Tensor, targets: Tensor | None
    ) -> Tensor:
        ctx.graph, ctx.nodes, ctx.both = graph, sources.shape, targets is not None
        ctx.mark_dirty(z)
        for block, part in zip(graph.edges, blocks(graph, z), strict=True):
            s = _of(graph, sources, block.source)
            pair = s[:, :, None] if block.paired else s[:, None]
            if targets is not None:
                pair = pair + _of(graph, targets, block.target)[:, :, None]
            part.add_(pair[:, :, :, None])
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        graph = ctx.graph
        sources = gradient.new_zeros(ctx.nodes)
        targets = gradient.new_zeros(ctx.nodes) if ctx.both else None
        for block, part in zip(graph.edges, blocks(graph, gradient), strict=True):
            pair = part[:, :, :, 0] if part.shape[3] == 1 else part.sum(3)
            _of(graph, sources, block.source).add_(pair[:, :, 0] if block.paired else pair.sum(1))
            if targets is not None:
                _of(graph, targets, block.target).add_(pair.sum(2))
        return None, gradient, sources, targets


class _IncomingMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: TypedGraph, z: Tensor) -> Tensor:
        ctx.graph, ctx.size = graph, z.shape
        found = z.new_zeros(len(z), graph.starts[-1], z.shape[-1])
        for block, part in zip(graph.edges, blocks(graph, z), strict=True):
            _of(graph, found, block.target).add_(part.sum((2, 3)))
        _divide(graph, found)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        graph = ctx.graph
        gradient = gradient.clone()
        _divide(graph, gradient)
        z = gradient.new_empty(ctx.size)
        for block, part in zip(graph.edges, blocks(graph, z), strict=True):
            part.copy_(_of(graph, gradient, block.target)[:, :, None, None].expand_as(part))
        return None, z


def _of(graph: TypedGraph, x: Tensor, number: int) -> Tensor:
    """The nodes of one set, (b, n, c), a view."""
    return x[:, graph.starts[number] : graph.starts[number + 1]]


def _divide(graph: TypedGraph, x: Tensor) -> None:
    for number, degree in enumerate(graph.degrees()):
        if degree > 1:
            _of(graph, x, number).div_(degree)
