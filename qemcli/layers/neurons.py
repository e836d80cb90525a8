"""Parts of the permutation-equivariant layers: a matrix a set of neurons, one for all means."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


def mean(x: Tensor, axis: int) -> Tensor:
    """The mean over one axis; as a sum, whose gradient is a view where that of `mean` is a new
    tensor.
    """
    return x.sum(axis) * (1 / x.shape[axis])


class Neurons(nn.Module):
    """The matrix of one set of neurons: from [bias | left | right] to [bias | left | right]."""

    def __init__(self, reads: tuple[int, int, int], writes: tuple[int, int, int]) -> None:
        super().__init__()
        self.reads, self.writes = reads, writes
        self.weight = nn.Parameter(torch.empty(sum(writes), sum(reads)))

    def init(self, fans: tuple[int, int, int]) -> None:
        """Uniform in +-1/sqrt(fan), one fan for each block of rows."""
        for rows, fan in zip(self.weight.split(list(self.writes)), fans, strict=True):
            uniform(rows, fan)

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(linear(x, self.weight).split(self.writes, dim=-1))


def seen(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (b, j, k, f), for `mix` and nothing else, its mean over k and its mean over j."""
    return _Seen.apply(x)


def mix(x: Tensor, weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """What `seen` gave of x (b, j, k, reads) through weight, plus left (b, j, writes), plus right
    (b, k, writes)."""
    return _Mix.apply(x, weight, left, right)


class _Seen(torch.autograd.Function):
    """By hand, so that the largest gradient there is has one place: that of `mix` is added to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, j, k, _ = x.shape
        return x.view_as(x), x.sum(2).div_(k), x.sum(1).div_(j)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, x: Tensor, over_k: Tensor, over_j: Tensor) -> Tensor:
        _, j, k, _ = x.shape
        return x.add_((over_k / k)[:, :, None]).add_((over_j / j)[:, None])


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = (left[:, :, None] + right[:, None]).contiguous()  # so that flatten is a view of it
        y.flatten(0, 2).addmm_(x.flatten(0, 2), weight.T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, 2)
        found = (rows @ weight).view(x.shape)
        return found, rows.T @ x.flatten(0, 2), gradient.sum(2), gradient.sum(1)


def uniform(x: Tensor, fan: int) -> None:
    """Fill with U(-1/sqrt(fan), 1/sqrt(fan))."""
    bound = 1 / math.sqrt(max(fan, 1))
    nn.init.uniform_(x.detach(), -bound, bound)


class Global(nn.Module):
    """One affine map from the vector of means to a constant for every tensor, redundant biases
    included.

    `copies[t]` biases beside its own are added on target t: the published layers have one on every
    sub-map that writes to the tensor. They span nothing new, and are here for equal parameter
    counts.
    """

    def __init__(self, reads: int, widths: list[int], copies: list[int]) -> None:
        super().__init__()
        self.widths, self.copies = widths, copies
        self.weight = nn.Parameter(torch.empty(sum(widths), reads))
        self.bias = nn.Parameter(torch.empty(sum(widths)))
        starts = [sum(widths[:t]) for t in range(len(widths))]
        spans = [
            torch.arange(start, start + width).repeat(n)
            for start, width, n in zip(starts, widths, copies, strict=True)
        ]
        index = torch.cat(spans)
        self.register_buffer("index", index, persistent=False)
        self.redundant = nn.Parameter(torch.empty(len(index)))

    def init(self, fans: list[int], own: list[int] | None = None) -> None:
        """`fans` bound the redundant biases, `own` (the same where absent) the map itself."""
        sizes = [w * n for w, n in zip(self.widths, self.copies, strict=True)]
        for part, fan in zip(self.redundant.split(sizes), fans, strict=True):
            uniform(part, fan)
        blocks = zip(self.weight.split(self.widths), self.bias.split(self.widths), strict=True)
        for (rows, bias), fan in zip(blocks, own or fans, strict=True):
            uniform(rows, fan)
            uniform(bias, fan)

    def forward(self, s: Tensor) -> list[Tensor]:
        bias = self.bias.index_add(0, self.index, self.redundant)  # type: ignore[arg-type]
        return list(linear(s, self.weight, bias).split(self.widths, dim=-1))
