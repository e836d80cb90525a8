"""What an edited network shows: an editor with the renderer behind it, as training sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from qemcli import signals
from qemcli.expansion import folded
from qemcli.functions import respond
from qemcli.layers.metanetwork import Metanetwork
from qemcli.spaces import Chain, WeightSpace


class Glimpse(NamedTuple):
    """Some pixels of pictures: values (b, c, m) on the [0, 1] scale, at places (m,) of the grid."""

    values: Tensor
    at: Tensor


class Shown(Metanetwork):
    """dict of (b, *shape) -> the picture of each edited network, (b, c h w) on the [0, 1] scale.

    That is the mean over branches j of what w + delta_j shows. The picture is the network's
    function, so it is invariant to what the editor is equivariant to. In training it is a Glimpse
    of `pixels` places drawn for every batch (0: all): an unbiased loss at a fraction of the cost.
    """

    def __init__(self, space: Chain, editor: Metanetwork, pixels: int = 0) -> None:
        super().__init__()
        self.space, self.editor, self.pixels = space, editor, pixels
        _, *self.size = signals.check(space)

    @contextmanager
    def drawn_at(self, height: int, width: int) -> Iterator[None]:
        """Meanwhile the pictures have this size: fewer places are enough to tell functions
        apart."""
        whole, self.size = self.size, [height, width]
        try:
            yield
        finally:
            self.size = whole

    def claims(self, space: WeightSpace) -> set[str]:
        """What the editor is equivariant to."""
        return self.editor.claims(space)

    def calibrate(self, w: Mapping[str, Tensor]) -> None:
        """The editor's constants, where it has some."""
        self.editor.calibrate(w)

    def branches(self, w: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The edited networks: dict of (b, k, *shape)."""
        deltas = self.editor(w)
        return {name: w[name][:, None] + deltas[name] for name in self.space.names}

    def forward(self, w: Mapping[str, Tensor]) -> Tensor | Glimpse:
        branches = self.branches(w)
        first = branches[self.space.names[0]]
        height, width = self.size
        grid = signals.coordinates(self.space, height, width, first.dtype).to(first.device)
        at = torch.arange(len(grid), device=grid.device)
        if self.training and self.pixels:
            at = torch.randperm(len(grid), device=grid.device)[: self.pixels]
        outputs = (
            respond(self.space, folded(branches), grid[at]).unflatten(0, first.shape[:2]).mean(1)
        )
        black, white = self.space.forward.levels
        values = ((outputs - black) / (white - black)).transpose(1, 2)
        return Glimpse(values, at) if self.training else values.flatten(1)
