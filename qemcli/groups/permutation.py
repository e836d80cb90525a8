"""Permutations of the neurons of a layer: a symmetry, whatever the activation."""

from __future__ import annotations

import torch

from qemcli.groups._element import Part
from qemcli.groups.scale import Scales
from qemcli.spaces import WeightSpace


def refusal(space: WeightSpace) -> str | None:
    """Never refused: hidden neurons have no order, whatever the activation."""
    return None


def draw(
    space: WeightSpace, n: int, batch: int, generator: torch.Generator, scales: Scales
) -> Part:
    """Uniform over the permutations of n neurons, one a network."""
    u = torch.rand(batch, n, generator=generator, dtype=torch.float64, device=generator.device)
    return Part(index=u.argsort(dim=1))
