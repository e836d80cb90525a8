"""Weight-space features: what flows between equivariant layers, and how a group acts on it.

A feature is one pair a layer of the chain, input first:

    weight (b, j, k, c*f)   rows j = n_l, columns k = n_{l-1}, channels outer and kernel taps inner
    bias   (b, j, c)

Channels are last, so every map is a GEMM on the last axis. The last layer's weight lies in memory
as (b, k, j, c*f), seen transposed: there the free axis j folds into the channels without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from qemcli.errors import UnsupportedError
from qemcli.groups import Element
from qemcli.spaces import Chain, Layered

Features = list[tuple[Tensor, Tensor]]


def require_hidden(space: Layered, what: str) -> None:
    """UnsupportedError unless the network has a hidden layer (L >= 2)."""
    if len(space.layers) < 2:
        raise UnsupportedError(
            f"{what} needs at least two layers; this network has {len(space.layers)}",
            "use --architecture statnn or flat_mlp",
        )


def door(space: Layered, w: Mapping[str, Tensor]) -> Features:
    """dict of (b, *shape) -> one-channel features; an absent bias reads as zeros."""
    pairs = space.matrices(w)
    features = [(weight, bias[..., None]) for weight, bias in pairs]
    last, bias = features[-1]
    features[-1] = (last.transpose(1, 2).contiguous().transpose(1, 2), bias)
    return features


def exit_door(space: Chain, features: Features) -> dict[str, Tensor]:
    """The inverse of `door`: one-channel features -> dict of (b, *shape)."""
    return space.from_matrices([(w.contiguous(), b[..., 0]) for w, b in features])


def pointwise(function: Callable[[Tensor], Tensor], features: Features) -> Features:
    """Apply one function to every entry of every tensor."""
    return [(function(w), function(b)) for w, b in features]


def relu(x: Tensor) -> Tensor:
    """max(x, 0), in the memory of x where that is free: x must not be used afterwards."""
    # On a view, autograd would pay for the saved memory with a copy of the gradient.
    return torch.relu(x) if x._is_view() else torch.relu_(x)


def act_on_features(space: Layered, g: Element, features: Features) -> Features:
    """The group's action on features, the same on every channel and tap.

        W'[j,k] = factor_l[j] / factor_{l-1}[k] * W[index_l[j], index_{l-1}[k]]
        b'[j] = factor_l[j] * b[index_l[j]]

    Half turns of SIREN's phase do not act on features.
    """
    index, factor = g.index, g.factor
    moved: Features = []
    axes = ("x", *space.axes)
    for col, row, (weight, bias) in zip(axes, axes[1:], features, strict=False):
        if row in index:
            rows = index[row]
            weight = weight.gather(1, rows[:, :, None, None].expand_as(weight))
            bias = bias.gather(1, rows[:, :, None].expand_as(bias))
            scale = factor[row].to(weight.dtype)
            weight, bias = weight * scale[:, :, None, None], bias * scale[:, :, None]
        if col in index:
            weight = weight.gather(2, index[col][:, None, :, None].expand_as(weight))
            weight = weight / factor[col].to(weight.dtype)[:, None, :, None]
        moved.append((weight, bias))
    return moved


class ChannelDropout(nn.Module):
    """Drops whole channels of a sample, in weights and biases alike, so that it stays equivariant.

    The published code drops single entries of the biases, which is equivariant in distribution
    only.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, features: Features) -> Features:
        if not self.training or self.p == 0:
            return features
        return [(w * self._mask(w), b * self._mask(b)) for w, b in features]

    def _mask(self, x: Tensor) -> Tensor:
        kept = x.new_full((x.shape[0], *([1] * (x.dim() - 2)), x.shape[-1]), 1 - self.p)
        return torch.bernoulli(kept) / (1 - self.p)
