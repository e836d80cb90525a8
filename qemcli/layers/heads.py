"""Multilayer heads, and gates: what stands behind an invariant vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def mlp_head(inputs: int, hidden: int, outputs: int, dropout: float = 0.0) -> nn.Sequential:
    """Linear, ReLU, Linear, ReLU, Linear: (b, inputs) -> (b, outputs) raw; the head of every
    published model.
    """

    def block(reads: int) -> list[nn.Module]:
        return [nn.Linear(reads, hidden), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]

    return nn.Sequential(*block(inputs), *block(hidden), nn.Linear(hidden, outputs))


class Gated(nn.Module):
    """O((V p + v) * sigmoid(G p + g)) + o, Xavier weights: the gated map of the quasi layer (width
    32).
    """

    def __init__(self, inputs: int, outputs: int, hidden: int = 32) -> None:
        super().__init__()
        self.value = nn.Linear(inputs, hidden)
        self.gate = nn.Linear(inputs, hidden)
        self.out = nn.Linear(hidden, outputs)
        for part in (self.value, self.gate, self.out):
            nn.init.xavier_uniform_(part.weight)

    def forward(self, p: Tensor) -> Tensor:
        return self.out(self.value(p) * torch.sigmoid(self.gate(p)))
