"""ScaleGMN's readouts: nodes of every layer (b, n_l, c) -> invariant answers (b, outputs).

Source: arXiv:2406.10685 and its released code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qemcli.layers.scale_equivariant import ScaleInv, Style
from qemcli.spaces import Chain


class OutputsReadout(nn.Module):
    """An MLP of the output neurons: what is left after messages from below."""

    def __init__(self, space: Chain, channels: int, outputs: int, style: Style) -> None:
        super().__init__()
        self.head = style.perceptron(space.widths[-1] * channels, outputs)
        self.read = {len(space.layers)}  # the node layers that are read

    def forward(self, nodes: list[Tensor]) -> Tensor:
        return self.head(nodes[-1].flatten(1))


class EndsReadout(nn.Module):
    """Linear of the inputs beside Linear of the outputs, then an MLP: after messages both ways."""

    def __init__(self, space: Chain, channels: int, outputs: int, style: Style) -> None:
        super().__init__()
        self.first = nn.Linear(space.widths[0] * channels, channels)
        self.last = nn.Linear(space.widths[-1] * channels, channels)
        self.head = style.perceptron(2 * channels, outputs)
        self.read = {0, len(space.layers)}

    def forward(self, nodes: list[Tensor]) -> Tensor:
        return self.head(self.last(nodes[-1].flatten(1)), self.first(nodes[0].flatten(1)))


class GraphReadout(nn.Module):
    """The sum over hidden neurons of an invariant, beside every input and output; then an MLP.

    The published module has the map of the ends, with its parameters, and does not call it.
    """

    def __init__(self, space: Chain, channels: int, outputs: int, style: Style) -> None:
        super().__init__()
        self.ends = style.perceptron(channels, style.width)
        self.hidden = ScaleInv(channels, style.width, style)
        count = 1 + space.widths[0] + space.widths[-1]
        self.head = style.perceptron(count * style.width, outputs)
        self.read = set(range(len(space.widths)))

    def forward(self, nodes: list[Tensor]) -> Tensor:
        first, *hidden, last = nodes
        total = self.hidden(torch.cat(hidden, dim=1)).sum(1)
        ends = self.ends(torch.cat([first, last], dim=1)).flatten(1)
        return self.head(total, ends)


class PlainReadout(nn.Module):
    """An MLP of the sum over all neurons of an MLP (GMN)."""

    def __init__(self, space: Chain, channels: int, outputs: int, style: Style) -> None:
        super().__init__()
        self.local = style.perceptron(channels, style.width)
        self.head = style.perceptron(style.width, outputs)
        self.read = set(range(len(space.widths)))

    def forward(self, nodes: list[Tensor]) -> Tensor:
        return self.head(self.local(torch.cat(nodes, dim=1)).sum(1))
