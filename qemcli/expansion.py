"""Output capacity expansion: k branches that answer with their mean, merged exactly into one
network.

The mean of k networks of one shape is one ordinary network of k times their width, because an
activation acts on every neuron alone. Source: arXiv:2602.01083.

    W_1 = [W_1^1; ..; W_1^k]       W_l = diag(W_l^1, .., W_l^k)       W_L = [W_L^1, .., W_L^k] / k
    b_l = [b_l^1; ..; b_l^k],  l < L                                  b_L = mean_j b_L^j
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qemcli.errors import InputError, UnsupportedError
from qemcli.signals import render
from qemcli.spaces import Chain, chain

Branches = Mapping[str, Tensor]  # (b, k, *shape) for every tensor of a space


def folded(branches: Branches) -> dict[str, Tensor]:
    """(b, k, *shape) -> (b k, *shape): every branch a network of its own."""
    return {name: x.flatten(0, 1) for name, x in branches.items()}


def shown(space: Chain, branches: Branches, size: tuple[int, int] | None = None) -> Tensor:
    """The mean of what the branches show: (b, c, h, w) on the [0, 1] scale, differentiable."""
    k = branches[space.names[0]].shape[1]
    return render(space, folded(branches), size).unflatten(0, (-1, k)).mean(dim=1)


def widened(space: Chain, k: int) -> Chain:
    """The space of the merged networks: the same keys and the same way of being run, hidden layers
    k times as wide. UnsupportedError where a layer is a convolution."""
    if any(layer.conv or layer.taps > 1 for layer in space.layers):
        raise UnsupportedError(
            f"branches of a {space.family} cannot be merged", "only networks of dense layers can"
        )
    last = len(space.layers) - 1
    layers = [
        replace(layer, rows=layer.rows * (k if l < last else 1), cols=layer.cols * (k if l else 1))
        for l, layer in enumerate(space.layers)
    ]
    return chain(layers, space.family, None, space.activation, space.forward)


def merge(space: Chain, branches: Branches) -> tuple[Chain, dict[str, Tensor]]:
    """k branches (b, k, *shape) -> (their `widened` space, networks (b, *shape)) that answer with
    the branches' mean, exactly but for rounding; between branches the weights are exactly 0.

    Raises InputError where the tensors do not have the same branches, UnsupportedError as
    `widened`.
    """
    counts = {tuple(branches[name].shape[:2]) for name in space.names if name in branches}
    if len(counts) != 1:
        raise InputError(f"branches (b, k) of different numbers cannot be merged: {sorted(counts)}")
    space.check(folded(branches))
    ((_, k),) = counts
    wide = widened(space, k)
    last = len(space.layers) - 1
    merged: dict[str, Tensor] = {}
    for l, layer in enumerate(space.layers):
        weight = branches[layer.weight]
        if last == 0:
            merged[layer.weight] = weight.mean(dim=1)
        elif l == 0:
            merged[layer.weight] = weight.flatten(1, 2)
        elif l == last:
            merged[layer.weight] = weight.transpose(1, 2).flatten(2) / k
        else:
            merged[layer.weight] = _diagonal(weight)
        if layer.bias:
            bias = branches[layer.bias]
            merged[layer.bias] = bias.mean(dim=1) if l == last else bias.flatten(1)
    return wide, merged


def _diagonal(blocks: Tensor) -> Tensor:
    """(b, k, rows, cols) -> (b, k rows, k cols), the blocks on the diagonal."""
    b, k, rows, cols = blocks.shape
    out = blocks.new_zeros(b, k, rows, k, cols)
    at = torch.arange(k, device=blocks.device)
    out[:, at, :, at] = blocks.transpose(0, 1)
    return out.reshape(b, k * rows, k * cols)
