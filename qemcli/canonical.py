"""The canonical form: one network of every orbit, and the ties among biases that it met.

Balance removes scales, signs and half turns. Then every hidden layer is put in the order of its
balanced biases (argsort, the canonisation of networks in general position), ties broken by incoming
norm, outgoing norm, sums of weights and of their cubes, and at last by the weights themselves, read
in the order of the layers that are already sorted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qemcli.balance import balance
from qemcli.groups import Element, act, compose, identity
from qemcli.residual_balance import balance_residual
from qemcli.spaces import Chain, Layered, Residual, chain_of

ROUNDINGS = 32  # a gap between keys of so many eps of the layer's largest is no gap

Pair = tuple[Tensor, Tensor]  # W (b, j, k, f) and bias (b, j)


def canonicalise(
    space: Layered, w: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Element, Tensor]:
    """The canonical networks, the element that carries `w` there, and the ties met, (b,).

    Constant on orbits of every group that applies, idempotent, in the orbit (but for dead neurons,
    which become zeros: balance). A tie is a hidden neuron whose balanced bias is, to
    rounding, an earlier neuron's, so that other keys decided.
    Raises InputError where `w` is not of this space.
    """
    if isinstance(space, Residual):
        balanced, moved = balance_residual(space, w)
    else:
        balanced, moved = balance(chain_of(space, "canonical forms"), w)
    order = identity(space, moved.batch, w[space.tensors[0].name].device)
    eps = torch.finfo(w[space.tensors[0].name].dtype).eps
    met = w[space.tensors[0].name].new_zeros(len(w[space.tensors[0].name]), dtype=torch.int64)
    pairs = [(weight.double(), bias.double()) for weight, bias in space.matrices(balanced)]
    rows = [space[la.weight].axes[0].name for la in space.layers]
    for axis in space.hidden:
        # A sum's layers have one order: that of the first, which reads layers that have theirs.
        l, *later = (i for i, row in enumerate(rows) if row == axis)
        below = order.index[rows[l - 1]] if l else None
        added = [pairs[i] for i in later]
        index, classes = _sorted(pairs[l], pairs[l + 1], added, below, l + 2 == len(pairs), eps)
        order.index[axis] = index
        met = met + space.hidden[axis] - classes
    return act(order, space, balanced), compose(order, moved), met


def ties(space: Chain, w: Mapping[str, Tensor]) -> Tensor:
    """(b,) int64: hidden neurons whose bias equals, bit for bit, an earlier one of their layer.

    0 is general position. The biases are read as they are; absent ones are zeros, all equal.
    """
    space.check(w)
    pairs = space.matrices(w)
    met = torch.zeros(len(pairs[0][0]), dtype=torch.int64, device=pairs[0][0].device)
    for _, bias in pairs[:-1]:
        ranked = bias.sort(dim=1).values
        met = met + (ranked[:, 1:] == ranked[:, :-1]).sum(dim=1)
    return met


def _sorted(
    layer: Pair, above: Pair, added: Sequence[Pair], below: Tensor | None, last: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """The order of a hidden layer (b, n), and how many different biases it has (b,); `added` are
    the later layers of its sums."""
    weight, bias = layer
    if below is not None:
        weight = weight.gather(2, below[:, None, :, None].expand_as(weight))
    classes = _refined(torch.zeros_like(bias, dtype=torch.int64), bias[..., None], eps)
    distinct = classes.amax(dim=1) + 1
    keys = _keys(weight, above[0].transpose(1, 2), last)
    keys += [key for w, b in added for key in (b[..., None], w.flatten(2).square())]
    for key in keys:
        if int(classes.amax(dim=1).min()) + 1 == classes.shape[1]:
            break
        classes = _refined(classes, key, eps)
    return classes.argsort(dim=1, stable=True), distinct


def _keys(weight: Tensor, leaving: Tensor, last: bool) -> list[Tensor]:
    """What decides after the bias, each (b, n, terms) to be summed; `leaving` is (b, n, i, f).

    Outputs have an order of their own, hidden neurons above have none yet: of those, only sums.
    """
    row, column = weight.flatten(2), leaving.flatten(2)
    named = column if last else leaving.sum(dim=2)
    sums = [row.square(), column.square(), row, row**3, column, column**3]
    return [*sums, row * _mixing(row), named * _mixing(named)]


def _mixing(x: Tensor) -> Tensor:
    """Fixed numbers without relations, so that different rows have different sums."""
    return torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device).sqrt().cos()


def _refined(classes: Tensor, terms: Tensor, eps: float) -> Tensor:
    """Classes (b, n), split at the gaps of a key that are wider than rounding; ranks are kept."""
    key, size = terms.sum(dim=2), terms.abs().sum(dim=2)
    order = key.argsort(dim=1, stable=True)
    order = order.gather(1, classes.gather(1, order).argsort(dim=1, stable=True))
    ranked, held = key.gather(1, order), classes.gather(1, order)
    slack = ROUNDINGS * eps * size.amax(dim=1, keepdim=True)
    split = (held[:, 1:] != held[:, :-1]) | (ranked[:, 1:] - ranked[:, :-1] > slack)
    rank = torch.cat([torch.zeros_like(held[:, :1]), split.long().cumsum(dim=1)], dim=1)
    return torch.empty_like(classes).scatter(1, order, rank)
