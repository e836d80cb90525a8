"""Layers that hold their own parameters for every block of a transformer: the first axis of all
that passes through them counts the blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BlockLinear(nn.Module):
    """x W_l + b_l: (l, n, inputs) -> (l, n, outputs); W lies as (l, inputs, outputs)."""

    def __init__(self, blocks: int, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(blocks, outputs)) if bias else None
        nn.init.normal_(self.weight, std=inputs**-0.5)

    def share(self, sources: list[int], terms: int | None = None) -> None:
        """Draw anew: each of the sources, runs of inputs, gives 1 / `terms` of unit variance."""
        for part in self.weight.data.split(sources, dim=1):
            nn.init.normal_(part, std=((terms or len(sources)) * part.shape[1]) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return torch.bmm(x, self.weight)
        return torch.baddbmm(self.bias[:, None], x, self.weight)


class BlockNorm(nn.Module):
    """A layer norm with its own gain and shift a block: (l, n, features)."""

    def __init__(self, blocks: int, features: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(blocks, features))
        self.shift = nn.Parameter(torch.zeros(blocks, features))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:])
        return torch.addcmul(self.shift[:, None], x, self.gain[:, None])


class BlockStandard(nn.Module):
    """(x - mean) / std of every feature of every block, with constants set once from a training
    set by `fit`; the identity until then, and for good unless `on`.

    A std below 1e-12 of the mean's size counts as a constant feature (1).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, blocks: int, features: int, on: bool) -> None:
        super().__init__()
        self.on = on
        shape = (blocks, 1, features) if on else (0,)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    def fit(self, x: Tensor) -> None:
        """x (l, n, features): those of the training set."""
        if self.on:
            mean, std = (f(x.double(), dim=1, keepdim=True) for f in (torch.mean, torch.std))
            still = ~(std > 1e-12 * (1e-12 + mean.abs()))
            self.mean.copy_(mean)
            self.std.copy_(torch.where(still, 1.0, std))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std if self.on else x
