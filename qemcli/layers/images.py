"""Features that are still few numbers times a table: whatever is linear meets the table first.

A weight enters a graph as c channels of its t taps, a bias as c channels of one number. As long as
nothing nonlinear has been done to them, a linear map costs t multiplications a channel, not c.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Image:
    """entries @ table in every place: entries (..., t), table (t, c), and t at most c."""

    entries: Tensor
    table: Tensor


@dataclass(frozen=True)
class Choice:
    """One of few rows in every place: `chosen` (..., k) is 1 there and 0 elsewhere, table (k, c).

    What is the same map of every row has to be taken of the table only.
    """

    chosen: Tensor
    table: Tensor

    def rows(self) -> Tensor:
        """(..., c)."""
        return self.chosen @ self.table

    @staticmethod
    def of_pairs(left: Choice, right: Choice, table: Tensor) -> Choice:
        """On every pair of left (b, n, k) and right (b, m, l), by a table (k, l, c)."""
        chosen = left.chosen[:, :, None, :, None] * right.chosen[:, None, :, None]
        return Choice(chosen.flatten(3), table.flatten(0, 1))


Rows = Tensor | Image


def image(entries: Tensor, table: Tensor) -> Rows:
    """An image, or its rows themselves where these have fewer channels than entries."""
    t, channels = table.shape
    return Image(entries, table) if t <= channels else entries @ table


def channels(x: Rows) -> int:
    return x.table.shape[1] if isinstance(x, Image) else x.shape[-1]


def mapped(x: Rows, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x through an affine map."""
    if not isinstance(x, Image):
        return F.linear(x, weight, bias)
    # Not F.linear: the gradient of a tall and narrow matrix takes it three times as long.
    table = x.table @ weight.T
    if bias is None:
        return x.entries @ table
    return torch.addmm(bias, x.entries.flatten(0, -2), table).view(
        *x.entries.shape[:-1], len(weight)
    )


def whole(x: Rows) -> Tensor:
    """The rows themselves: (..., c)."""
    return x.entries @ x.table if isinstance(x, Image) else x


def product(x: Rows, left: Tensor, y: Rows, right: Tensor, axis: int) -> Rows:
    """(left x) * (right y), y without the axis `axis` that x has.

    That of an image and of numbers times one vector is an image again.
    """
    if isinstance(x, Image) and isinstance(y, Image) and len(y.table) == 1:
        table = (x.table @ left.T) * (y.table @ right.T)
        return Image(x.entries * y.entries.unsqueeze(axis), table)
    return mapped(x, left) * mapped(y, right).unsqueeze(axis)
