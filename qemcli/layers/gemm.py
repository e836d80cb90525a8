"""The matrix products under the equivariant layers, on the last axis of channels-last features."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., reads) times weight (writes, reads), plus bias -> (..., writes)."""
    return F.linear(x, weight, bias)


def mix(x: Tensor, weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x (b, j, k, reads) through weight, plus left (b, j, writes), plus right (b, k, writes)."""
    y = linear(x, weight)
    return y.add_(left[:, :, None]).add_(right[:, None])
