"""Batch normalisation of a trained network, folded into the layer that it stands behind.

In use its mean and variance are constants, and it is one affine map a neuron, which the layer's own
takes in:

    g (W x + b - m) / r + s = (g / r) W x + (g / r) (b - m) + s,        r = sqrt(v + eps)

the same function with fewer tensors, in the weight space of a network without norms. Names alone
say which layer a norm follows: the number before its own in an nn.Sequential (`0.weight` and
`1.running_mean`), or the same numbers under one parent (`conv2` and `bn2`). That it stands before
the activation, and torch's eps, are assumed; neither is in a state dict. Where names do not tell,
nothing is folded. Source: arXiv:1502.03167.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from qemcli.ordering import Shape, Shapes

EPS = 1e-5  # torch's
FOLDED = "batch normalisation, folded into"
_MEAN = "running_mean"
_NUMBER = re.compile(r"\d+(?!d)")  # of bn2, not of conv2d


@dataclass(frozen=True)
class BatchNorm:
    """The tensors of one norm, and those of its layer.

    Attributes:
        weight, bias: of the layer; `made` says that the file has no such bias.
        mean, variance: running statistics. gain, shift: absent where the norm learns none.
    """

    weight: str
    bias: str
    made: bool
    mean: str
    variance: str
    gain: str | None
    shift: str | None

    @property
    def own(self) -> tuple[str, ...]:
        """The norm's tensors."""
        return tuple(n for n in (self.mean, self.variance, self.gain, self.shift) if n)

    @property
    def reason(self) -> str:
        """What became of them."""
        return f"{FOLDED} '{self.weight}' (before the activation, eps {EPS:g})"

    def folded(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The layer's weight and bias with the norm in them, in float64."""

        def at(name: str | None, absent: float) -> np.ndarray:
            return np.asarray(absent if name is None else arrays[name], np.float64)

        weight, mean = at(self.weight, 0), at(self.mean, 0)
        with np.errstate(all="ignore"):  # no variance is negative: NaN is flagged, not fatal
            factor = at(self.gain, 1) / np.sqrt(at(self.variance, 1) + EPS)
            bias = factor * (at(None if self.made else self.bias, 0) - mean) + at(self.shift, 0)
            weight = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
        return {self.weight: weight, self.bias: bias}


def batch_norms(shapes: Shapes) -> tuple[BatchNorm, ...]:
    """The norms of a state dict, each with its layer; none at all where one has no layer that its
    name tells, or two have the same."""
    found = []
    for mean in (n for n in shapes if n.endswith(_MEAN)):
        stem = mean.removesuffix(_MEAN)
        weight = _layer(shapes, stem.rstrip("."), shapes[mean])
        if weight is None or f"{stem}running_var" not in shapes:
            return ()
        learned = [n if n in shapes else None for n in (f"{stem}weight", f"{stem}bias")]
        bias = weight.removesuffix("weight") + "bias"
        own = BatchNorm(weight, bias, bias not in shapes, mean, f"{stem}running_var", *learned)
        if any(shapes[name] != shapes[mean] for name in own.own):
            return ()
        found.append(own)
    return tuple(found) if len({norm.weight for norm in found}) == len(found) else ()


def without(shapes: Shapes, norms: Iterable[BatchNorm]) -> dict[str, Shape]:
    """The shapes of the network without its norms: biases that these make stand behind their
    weights."""
    norms = tuple(norms)
    gone = {name for norm in norms for name in norm.own}
    made = {norm.weight: norm.bias for norm in norms if norm.made}
    left: dict[str, Shape] = {}
    for name, shape in shapes.items():
        if name in gone:
            continue
        left[name] = shape
        if name in made:
            left[made[name]] = shape[:1]
    return left


def _layer(shapes: Shapes, norm: str, size: Shape) -> str | None:
    """The weight of the layer that a norm follows; None where names do not tell."""
    parent, _, leaf = norm.rpartition(".")
    if leaf.isdecimal():
        before = ".".join([*([parent] if parent else []), str(int(leaf) - 1)])
        rivals = [f"{before}.weight"]
    else:
        rivals = [
            n
            for n in shapes
            if n.endswith(".weight") and _place(n.removesuffix(".weight")) == _place(norm)
        ]
    fits = [n for n in rivals if len(shapes.get(n, ())) in (2, 4) and shapes[n][:1] == size]
    return fits[0] if len(fits) == 1 else None


def _place(module: str) -> tuple[str, tuple[str, ...]]:
    """The parent of a module, and the numbers in its own name."""
    parent, _, leaf = module.rpartition(".")
    return parent, tuple(_NUMBER.findall(leaf))
