"""Bad twins: a metanetwork made to tell neurons apart, which a check of its claims must find."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qemcli.layers.metanetwork import Metanetwork
from qemcli.spaces import WeightSpace


class Twin(Metanetwork):
    """A model's bad twin: every weight is first multiplied by a constant of its own place, within
    1 +- .3, so that neurons are told apart by their numbers. It claims what the model claims, and
    no group of permutations or scales holds for it."""

    def __init__(self, model: Metanetwork, space: WeightSpace, seed: int = 0) -> None:
        super().__init__()
        self.model = model
        generator = torch.Generator().manual_seed(seed)
        self.marks = {
            name: 0.7 + 0.6 * torch.rand(shape, generator=generator, dtype=torch.float64)
            for name, shape in space.shapes.items()
        }

    def claims(self, space: WeightSpace) -> set[str]:
        """What the model claims, which is not true of the twin."""
        return self.model.claims(space)

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        return self.model({k: v * self.marks[k].to(v) for k, v in w.items()})
