"""Shifts of attention's biases that no answer sees.

Of key biases: q.c is the same for every key, and softmax takes it out. Of value biases: the
weights of attention sum to 1, so every token gets s, and the bias of the output gives it back.
"""

from __future__ import annotations

import torch

from qemcli.groups._element import Element
from qemcli.groups.general_linear import NO_ATTENTION
from qemcli.groups.scale import Scales
from qemcli.spaces import WeightSpace
from qemcli.spaces.transformer import Block, Transformer


def refusal(space: WeightSpace) -> str | None:
    """A key bias that is not rotated, or a value bias with an output bias to take it up."""
    if not isinstance(space, Transformer):
        return NO_ATTENTION
    if any(_axes(space, i, block) for i, block in enumerate(space.blocks, start=1)):
        return None
    roles = {role for block in space.blocks for role in block.roles}
    if not roles & {"key_bias", "value_bias"}:
        return "attention has no biases"
    moved = "the key bias is rotated by position, so no shift of it is the same for every key"
    kept = "the value bias has no output bias to take up its shift"
    return "; ".join([moved] * ("key_bias" in roles) + [kept] * ("value_bias" in roles))


def element(space: Transformer, batch: int, generator: torch.Generator, scales: Scales) -> Element:
    """Standard normal shifts."""
    shift = {}
    for i, block in enumerate(space.blocks, start=1):
        groups, _, keys, values = space.heads[i - 1]
        sizes = {f"d{i}": keys, f"e{i}": values}
        for axis in _axes(space, i, block):
            shape = (batch, groups, sizes[axis])
            shift[axis] = torch.randn(
                shape, generator=generator, dtype=torch.float64, device=generator.device
            )
    return Element({}, {}, shift=shift)


def _axes(space: Transformer, i: int, block: Block) -> list[str]:
    """The axes of the block whose bias may be shifted."""
    keys = "key_bias" in block.roles and not space.rotary.dims
    values = {"value_bias", "out_bias"} <= set(block.roles)
    return [f"d{i}"] * keys + [f"e{i}"] * values
