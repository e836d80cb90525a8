"""Permutations times the diagonal that the activation allows: positive scales, signs, or both."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import torch

from qemcli.groups import permutation, scale, sign
from qemcli.groups._element import Part
from qemcli.groups.scale import UNKNOWN, Scales
from qemcli.spaces import WeightSpace


def _diagonals(space: WeightSpace) -> list[ModuleType]:
    return [group for group in (scale, sign) if group.refusal(space) is None]


def refusal(space: WeightSpace) -> str | None:
    """The activation must allow more than permutations."""
    if _diagonals(space):
        return None
    if space.activation is None:
        return f"the diagonal part {UNKNOWN}"
    return (
        f"only permutations are left: no scales ({scale.refusal(space)}), "
        f"no signs ({sign.refusal(space)})"
    )


def draw(
    space: WeightSpace, n: int, batch: int, generator: torch.Generator, scales: Scales
) -> Part:
    """A permutation, and the product of the factors that the diagonal groups draw."""
    part = permutation.draw(space, n, batch, generator, scales)
    factor = torch.ones(batch, n, dtype=torch.float64, device=generator.device)
    for group in _diagonals(space):
        factor = factor * group.draw(space, n, batch, generator, scales).factor
    return replace(part, factor=factor)
