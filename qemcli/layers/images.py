"""Features that are still a matrix times a few numbers: whatever is linear meets the matrix first.

A weight enters a graph as c channels of its t taps, a bias as c channels of one number. As long as
nothing nonlinear has been done to them, a linear map costs t multiplications a channel, not c.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Image:
    """matrix @ entries in every place: entries (..., t), matrix (c, t), and t at most c."""

    entries: Tensor
    matrix: Tensor


Rows = Tensor | Image


def image(entries: Tensor, matrix: Tensor) -> Rows:
    """An image, or its rows themselves where these have fewer channels than entries."""
    channels, t = matrix.shape
    return Image(entries, matrix) if t <= channels else F.linear(entries, matrix)


def channels(x: Rows) -> int:
    return len(x.matrix) if isinstance(x, Image) else x.shape[-1]


def mapped(x: Rows, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x through an affine map."""
    if isinstance(x, Image):
        return F.linear(x.entries, weight @ x.matrix, bias)
    return F.linear(x, weight, bias)


def whole(x: Rows) -> Tensor:
    """The rows themselves: (..., c)."""
    return F.linear(x.entries, x.matrix) if isinstance(x, Image) else x


def product(x: Rows, left: Tensor, y: Rows, right: Tensor, axis: int) -> Rows:
    """(left x) * (right y), y without the axis `axis` that x has.

    That of an image and of numbers times one vector is an image again.
    """
    if isinstance(x, Image) and isinstance(y, Image) and y.entries.shape[-1] == 1:
        return Image(x.entries * y.entries.unsqueeze(axis), (left @ x.matrix) * (right @ y.matrix))
    return mapped(x, left) * mapped(y, right).unsqueeze(axis)
