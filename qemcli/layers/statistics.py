"""Statistics of weights: the seven of every tensor, and standardisation by constants of a training
set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from qemcli.layers.features import Features
from qemcli.spaces import ACTIVATIONS, Chain, Layered, WeightSpace

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
CODED = tuple(sorted(ACTIVATIONS))  # the activations that have a feature of their own
POOLED = 2 * 5 * 7 + 5 + len(CODED)


def seven(x: Tensor) -> Tensor:
    """(..., n) -> (..., 7): mean, variance, quantiles 0, .25, .5, .75, 1 (linear interpolation).

    The variance is the unbiased one of the published code, 0 where n = 1 (there it is NaN). All are
    taken from the sorted values: the order of the entries does not even change the rounding.
    """
    x = _sorted(x)
    n = x.shape[-1]
    variance = x.var(-1) if n > 1 else torch.zeros_like(x[..., 0])
    return torch.stack([x.mean(-1), variance, *(_quantile(x, q) for q in QUANTILES)], dim=-1)


def _sorted(x: Tensor) -> Tensor:
    # numpy sorts with SIMD, several times as fast; only torch can be differentiated through.
    if x.requires_grad or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return x.sort(dim=-1).values
    return torch.from_numpy(np.sort(x.numpy(), axis=-1))


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


def pooled_statistics(space: WeightSpace, w: Mapping[str, Tensor]) -> Tensor:
    """dict of (b, *shape) -> (b, POOLED), whatever the depth and the widths.

    The seven of every tensor: of the first map, of the last, and their mean, least and largest
    over all maps; the same of the biases and other vectors (zeros where there are none). Beside
    them what the space itself says: logarithms of the number of tensors, of parameters, of the
    mean and the largest width, of the taps of a kernel, and the activation.
    """
    maps = [t for t in space.tensors if len(t.axes) > 1]
    vectors = [t for t in space.tensors if len(t.axes) == 1]
    first = w[space.tensors[0].name]
    parts = []
    for group in (maps, vectors):
        if not group:
            parts.append(first.new_zeros(len(first), 35))
            continue
        found = torch.stack([seven(w[t.name].flatten(1)) for t in group])
        ends = [found[0], found[-1], found.mean(0), found.amin(0), found.amax(0)]
        parts.append(torch.cat(ends, dim=-1))
    sizes = [axis.size for t in maps for axis in t.axes if axis.name in "uvs"]
    widths = space.widths[1:] or (1,)
    said = [len(space.tensors), space.size, sum(widths) / len(widths), max(widths)]
    said.append(sum(sizes) / len(sizes) if sizes else 1)
    told = [math.log(number) for number in said]
    told += [float(space.activation == name) for name in CODED]
    return torch.cat([*parts, first.new_tensor(told).expand(len(first), -1)], dim=-1)


def neuron_statistics(space: Layered, w: Mapping[str, Tensor]) -> Tensor:
    """dict of (b, *shape) -> (b, n): what every layer's neurons are like, whatever their order.

    For W (rows, cols, taps) and b of a layer, in this order: norms of what enters each row and of
    what leaves each column, the biases, the mean size of an entry, and the singular values of
    W (rows, cols taps). Those of hidden neurons stand sorted, those of inputs and outputs in place.
    """
    parts = []
    for layer, (weight, bias) in enumerate(space.matrices(w)):
        first, last = layer == 0, layer == space.depth - 1
        rows, cols = weight.flatten(2).norm(dim=2), weight.transpose(1, 2).flatten(2).norm(dim=2)
        parts += [x if last else x.sort(1).values for x in (rows, bias)]
        parts += [cols if first else cols.sort(1).values, weight.flatten(1).abs().mean(1, True)]
        parts.append(torch.linalg.svdvals(weight.flatten(2)))
    return torch.cat(parts, dim=1)


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


class StandardiseTensors(nn.Module):
    """(x - mean) / std with one pair of constants for each tensor of the features, set once from a
    training set by `fit`; the identity unless `on`.

    A constant an entry would break the symmetry of neurons: one a tensor does not.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, space: Layered, on: bool) -> None:
        super().__init__()
        self.on = on
        sizes = (2 * len(space.layers),) if on else (0,)
        self.register_buffer("shift", torch.zeros(sizes))
        self.register_buffer("scale", torch.ones(sizes))

    def fit(self, features: Features) -> None:
        """Features of one channel, of the whole training set."""
        if not self.on:
            return
        flat = [x for pair in features for x in pair]
        shift = [x.mean(dtype=torch.float64) for x in flat]
        spread = [_spread(x, m) for x, m in zip(flat, shift, strict=True)]
        self.shift.copy_(torch.stack(shift))
        self.scale.copy_(torch.stack(spread))

    def forward(self, features: Features) -> Features:
        if not self.on:
            return features
        pairs = zip(features, self.shift.view(-1, 2), self.scale.view(-1, 2), strict=True)
        return [((w - m[0]) / s[0], (b - m[1]) / s[1]) for (w, b), m, s in pairs]


class ScaleTensors(nn.Module):
    """x / rms with one constant for each tensor of the features, set once from a training set by
    `fit`; the identity unless `on`.

    Nothing is shifted, so signs and scales of neurons keep commuting with it.
    """

    scale: Tensor

    def __init__(self, space: Chain, on: bool) -> None:
        super().__init__()
        self.on = on
        self.register_buffer("scale", torch.ones(2 * len(space.layers) if on else 0))

    def fit(self, features: Features) -> None:
        """Features of one channel, of the whole training set."""
        if self.on:
            zero = torch.zeros((), dtype=torch.float64)
            sizes = [_spread(x, zero) for pair in features for x in pair]
            self.scale.copy_(torch.stack(sizes))

    def forward(self, features: Features) -> Features:
        if not self.on:
            return features
        pairs = zip(features, self.scale.view(-1, 2), strict=True)
        return [(w / s[0], b / s[1]) for (w, b), s in pairs]


def _spread(x: Tensor, mean: Tensor) -> Tensor:
    """The standard deviation of a tensor's entries, 1 where they are all the same."""
    std = (x - mean).square().mean(dtype=torch.float64).sqrt()
    return torch.where(std > 0, std, torch.ones_like(std))
