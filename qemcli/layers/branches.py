"""The ends of small transformers, each read by a branch of its own: embedding, blocks, classifier.

The blocks have the symmetries; what embeds and what classifies is read beside them (Tran et al.,
arXiv:2410.04209).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from qemcli.errors import UsageError
from qemcli.layers.statistics import Standardise
from qemcli.spaces import Transformer

SMALL = "small-transformer"  # of larger families only the blocks are read
CLASSIFIERS = ("flat", "set")


def ends(space: Transformer) -> tuple[list[str], list[str]]:
    """The tensors that embed and those that classify; none of a family that is not small."""
    if space.family != SMALL:
        return [], []
    outside = {t.name: {axis.name for axis in t.axes} for t in space.outside}
    classify = [name for name, axes in outside.items() if axes & {"h1", "y"}]
    return [name for name in outside if name not in classify], classify


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear and ReLU after one another, ReLU last."""
    parts = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*parts)


class Flat(nn.Module):
    """Some tensors in a row through `body`: dict of (b, *shape) -> (b, .)."""

    def __init__(
        self, space: Transformer, names: Sequence[str], body: nn.Module, standard: bool
    ) -> None:
        super().__init__()
        self.names, self.body = list(names), body
        size = sum(space[name].size for name in names)
        self.standard = Standardise(size) if standard else nn.Identity()

    def _flat(self, w: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([w[name].flatten(1) for name in self.names], dim=1)

    def fit(self, w: Mapping[str, Tensor]) -> None:
        """Set the constants of the training set, where there are any."""
        if isinstance(self.standard, Standardise):
            self.standard.fit(self._flat(w))

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        return self.body(self.standard(self._flat(w)))


class Neurons(nn.Module):
    """A classifier read as a set of hidden neurons, whose order does not count (ours).

    mean_j relu(A [W_1[j], b_1[j], W_2[., j]] + a), and b_2, through a map of their own.
    """

    def __init__(self, space: Transformer, names: Sequence[str], widths: Sequence[int]) -> None:
        super().__init__()
        self.axes = {name: [axis.name for axis in space[name].axes] for name in names}
        self.shapes = {name: space[name].unfolded for name in names}
        neuron = sum(space[n].size for n, axes in self.axes.items() if "h1" in axes)
        neuron //= space.hidden["h1"]
        rest = sum(space[n].size for n, axes in self.axes.items() if "h1" not in axes)
        self.standard = nn.ModuleList(Standardise(n) for n in (neuron, rest))
        self.each = mlp([neuron, widths[0]])
        self.whole = mlp([widths[0] + rest, *widths[1:]])

    def _read(self, w: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(b, neurons, .) and (b, .)."""
        neuron, rest = [], []
        for name, axes in self.axes.items():
            x = w[name].reshape(-1, *self.shapes[name])
            if "h1" in axes:
                neuron.append(
                    x.movedim(1 + axes.index("h1"), 1).flatten(2) if x.dim() > 2 else x[..., None]
                )
            else:
                rest.append(x.flatten(1))
        return torch.cat(neuron, dim=2), torch.cat(rest, dim=1)

    def fit(self, w: Mapping[str, Tensor]) -> None:
        """Set the constants of the training set, the same for every neuron."""
        neuron, rest = self._read(w)
        for standard, x in zip(self.standard, (neuron.flatten(0, 1), rest), strict=True):
            cast("Standardise", standard).fit(x)

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        neuron, rest = (s(x) for s, x in zip(self.standard, self._read(w), strict=True))
        return self.whole(torch.cat([self.each(neuron).mean(1), rest], dim=1))


def classifier(
    kind: str, space: Transformer, names: Sequence[str], widths: Sequence[int], standard: bool
) -> Flat | Neurons:
    """The branch of a classifier: `flat`, as published, or a `set` of neurons."""
    if kind == "flat":
        size = sum(space[name].size for name in names)
        return Flat(space, names, mlp([size, *widths]), standard)
    if kind == "set":
        return Neurons(space, names, widths)
    raise UsageError(
        f"no branch reads a classifier as '{kind}'", f"choose {' or '.join(CLASSIFIERS)}"
    )
