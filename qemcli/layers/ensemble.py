"""Ensembles that share their linear maps: many members at the parameters of one.

Wen, Tran and Ba, BatchEnsemble, arXiv:2002.06715; behind numbers that are told of an object,
Gorishniy, Kotelnikov and Babenko, TabM, arXiv:2410.24210.

    y_m = s_m * W (r_m * x_m) + c_m,  m = 1..M         r_m, s_m, c_m a member's own, W all members'
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class SharedLinear(nn.Module):
    """(b, n) or (m, b, n) -> (m, b, k), one map a member.

    `apart`: the r_m are drawn from {-1, 1}, so that members read the same numbers differently; else
    all are 1.
    """

    def __init__(self, members: int, inputs: int, outputs: int, apart: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        signs = torch.randint(0, 2, (members, 1, inputs)) * 2.0 - 1
        self.r = nn.Parameter(signs if apart else torch.ones(members, 1, inputs))
        self.s = nn.Parameter(torch.ones(members, 1, outputs))
        self.c = nn.Parameter(_uniform(members, 1, outputs, reads=inputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.r) * self.s + self.c


class OwnLinear(nn.Module):
    """(m, b, n) -> (m, b, k): a linear map of every member's own."""

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(_uniform(members, inputs, outputs, reads=inputs))
        self.bias = nn.Parameter(_uniform(members, 1, outputs, reads=inputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


def _uniform(*shape: int, reads: int) -> Tensor:
    """torch's own start of a linear map that reads so many numbers."""
    return (2 * torch.rand(shape) - 1) / math.sqrt(reads)
