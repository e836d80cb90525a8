"""What dense graphs of networks of many architectures share: windows, codes of places, constants.

One window holds the kernels of all, one the flattened positions of all. A neuron's code is the sum
of three: how far it is from the inputs, how far from the outputs, and its number where it is an
input or an output, its activation where it is hidden; so a network of another depth needs no other
parameters. Entries are standardised by constants of their kind: convolution or dense map.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qemcli.errors import UnsupportedError
from qemcli.layers.features import Features
from qemcli.layers.graph import Windows
from qemcli.spaces import ACTIVATIONS, Layered

DEEPEST = 32  # layers that have a code
KINDS = (*sorted(ACTIVATIONS), None)  # of hidden neurons


@dataclass(frozen=True)
class Layout:
    """`kernel`: (height, width) of the largest; `flattened`: the most positions of a flattened
    layer; `inputs`: the most; `outputs`: of every network, since the head reads them all."""

    kernel: tuple[int, int]
    flattened: int
    inputs: int
    outputs: int

    @classmethod
    def of(cls, spaces: Sequence[Layered]) -> Layout:
        """The least that holds all of them."""
        kernels = [
            space[la.weight].unfolded[2:] for space in spaces for la in space.layers if la.conv
        ]
        height, width = (max(side) for side in zip((1, 1), *kernels, strict=True))
        positions = [la.taps for s in spaces for la in s.layers if not la.conv and la.taps > 1]
        inputs = max(space.widths[0] for space in spaces)
        return cls((height, width), max(positions, default=0), inputs, spaces[0].widths[-1])

    def check(self, space: Layered) -> None:
        """UnsupportedError where a network does not fit in."""
        own = Layout.of([space])
        fits = own.outputs == self.outputs and own.inputs <= self.inputs
        fits = fits and all(a <= b for a, b in zip(own.kernel, self.kernel, strict=True))
        if not fits or own.flattened > self.flattened or len(space.layers) >= DEEPEST:
            raise UnsupportedError(
                f"{space.title}: a neural graph that holds up to {self.inputs} inputs, kernels of "
                f"{self.kernel[0]} x {self.kernel[1]}, {self.flattened} flattened positions and "
                f"{self.outputs} outputs exactly does not hold it"
            )

    def windows(self, space: Layered) -> Windows:
        """Where the taps of each layer stand in the windows of all."""
        return Windows(space, self.kernel, self.flattened)

    def standard(self, space: Layered) -> StandardiseKinds:
        """The standardisation of a network's entries."""
        return StandardiseKinds(space)

    @property
    def codes(self) -> int:
        """How many there are."""
        return 2 * DEEPEST + len(KINDS) + self.inputs + self.outputs

    def places(self, space: Layered) -> list[list[int]]:
        """The three codes of every node."""
        n, *hidden, outputs = space.widths
        deep = len(space.layers)
        first = 2 * DEEPEST
        kind, numbers = first + KINDS.index(space.activation), first + len(KINDS)
        found = [[0, DEEPEST + deep, numbers + i] for i in range(n)]
        for l, width in enumerate(hidden, start=1):
            found += [[l, DEEPEST + deep - l, kind]] * width
        return found + [[deep, DEEPEST, numbers + self.inputs + i] for i in range(outputs)]


class StandardiseKinds(nn.Module):
    """(x - mean) / std with a pair of constants for each of the weights and biases of convolutions
    and of dense maps, set once from a training set by `fit`."""

    shift: Tensor
    scale: Tensor

    def __init__(self, space: Layered) -> None:
        super().__init__()
        self.kinds = [2 * la.conv for la in space.layers]
        self.register_buffer("shift", torch.zeros(4))
        self.register_buffer("scale", torch.ones(4))

    def fit(self, parts: Iterable[tuple[Layered, Features]]) -> None:
        """Features of one channel, of the networks of every weight space."""
        sums = torch.zeros(3, 4, dtype=torch.float64)  # how many, of x, of its square
        for space, features in parts:
            for la, pair in zip(space.layers, features, strict=True):
                for at, x in enumerate(pair, start=2 * la.conv):
                    y = x.double()
                    sums[:, at] += torch.stack(
                        [y.new_tensor(y.numel()), y.sum(), y.square().sum()]
                    ).cpu()
        mean, square = sums[1:] / sums[0].clamp_min(1)
        spread = (square - mean.square()).clamp_min(0).sqrt()
        self.shift.copy_(mean)
        self.scale.copy_(torch.where(spread > 0, spread, torch.ones_like(spread)))

    def forward(self, features: Features) -> Features:
        return [
            (
                (w - self.shift[k]) / self.scale[k],
                (b - self.shift[k + 1]) / self.scale[k + 1],
            )
            for k, (w, b) in zip(self.kinds, features, strict=True)
        ]
