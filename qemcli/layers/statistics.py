"""Statistics of weights: the seven of every tensor, and standardisation by constants of a training
set.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qemcli.spaces import WeightSpace

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


def seven(x: Tensor) -> Tensor:
    """(..., n) -> (..., 7): mean, variance, quantiles 0, .25, .5, .75, 1 (linear interpolation).

    The variance is the unbiased one of the published code, 0 where n = 1 (there it is NaN). All are
    taken from the sorted values: the order of the entries does not even change the rounding.
    """
    x = x.sort(dim=-1).values
    n = x.shape[-1]
    variance = x.var(-1) if n > 1 else torch.zeros_like(x[..., 0])
    return torch.stack([x.mean(-1), variance, *(_quantile(x, q) for q in QUANTILES)], dim=-1)


def _quantile(x: Tensor, q: float) -> Tensor:
    """Of values that are sorted; no limit on their number (torch.quantile has one)."""
    place = q * (x.shape[-1] - 1)
    low = int(place)
    high = min(low + 1, x.shape[-1] - 1)
    return torch.lerp(x[..., low], x[..., high], place - low)


def tensor_statistics(space: WeightSpace, w: Mapping[str, Tensor]) -> Tensor:
    """dict of (b, *shape) -> (b, 7 T), the seven of each of the T tensors in the order of the
    space.
    """
    return torch.cat([seven(w[name].flatten(1)) for name in space.names], dim=-1)


def compressed(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|): statistics of any size, brought to the range of a network."""
    return x.sign() * x.abs().log1p()


class Standardise(nn.Module):
    """(x - mean) / std for each of n features, with constants set once from a training set by
    `fit`.

    Until then it is the identity. A std below 1e-12 of the mean's size counts as a constant feature
    (1).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n))
        self.register_buffer("std", torch.ones(n))

    def fit(self, x: Tensor) -> None:
        """x (rows, n): the training set's features."""
        mean, std = x.double().mean(0), x.double().std(0)
        still = ~(std > 1e-12 * (1e-12 + mean.abs()))
        self.mean.copy_(mean)
        self.std.copy_(torch.where(still, 1.0, std))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std
