"""The order of attention heads: key/value groups, and the query heads inside each (S_Q wr S_K)."""

from __future__ import annotations

import torch

from qemcli.groups._element import Element
from qemcli.groups.general_linear import NO_ATTENTION
from qemcli.groups.scale import Scales
from qemcli.spaces import WeightSpace
from qemcli.spaces.transformer import Transformer


def refusal(space: WeightSpace) -> str | None:
    """Some block must have more than one head."""
    if not isinstance(space, Transformer):
        return NO_ATTENTION
    if all(groups * queries == 1 for groups, queries, _, _ in space.heads):
        return "every block has a single head"
    return None


def element(space: Transformer, batch: int, generator: torch.Generator, scales: Scales) -> Element:
    """Uniform over the orders of groups, and of the query heads of each."""
    index = {}
    for i, (groups, queries, _, _) in enumerate(space.heads, start=1):
        for axis, shape in ((f"k{i}", (batch, groups)), (f"q{i}", (batch, groups, queries))):
            u = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
            index[axis] = u.argsort(dim=-1)
    return Element(index, {})
