"""The numbers of a token, as stored: their order, and the signs that the norms allow.

RMSNorm commutes with every sign, LayerNorm only with all of them at once. Without residual sums
every layer's output has an order of its own; with them there is one for the whole network.
"""

from __future__ import annotations

import torch

from qemcli.groups._blocks import is_stream
from qemcli.groups._element import Element
from qemcli.groups.general_linear import NO_ATTENTION
from qemcli.groups.scale import Scales
from qemcli.spaces import NamedTensor, WeightSpace
from qemcli.spaces.transformer import Transformer


def refusal(space: WeightSpace) -> str | None:
    """Every reader and writer of the stream must be known, the answers among them."""
    if not isinstance(space, Transformer):
        return NO_ATTENTION
    unplaced = [name for name, reason in space.skipped if not reason.endswith("not weights")]
    if unplaced:
        return f"'{unplaced[0]}' has no known place, and may read the stream"
    if not space.tied and not any(_answers(t) for t in space.outside):
        return "the networks answer with the stream itself: no head reads it"
    return None


def _answers(tensor: NamedTensor) -> bool:
    """True where the tensor reads something and writes answers."""
    reads = any(axis.dual for axis in tensor.axes)
    return reads and any(axis.name in "vy" for axis in tensor.axes)


def axes(space: Transformer) -> dict[str, int]:
    """The axes of the stream that may be moved, and their sizes; what no tensor writes stays."""
    sizes = {a.name: a.size for t in space.tensors for a in t.axes if is_stream(a.name)}
    return {a: n for a, n in sizes.items() if not (space.placement == "plain" and a == "r0")}


def element(space: Transformer, batch: int, generator: torch.Generator, scales: Scales) -> Element:
    """A uniform order; a coin for every number (RMSNorm), or one for all of them (LayerNorm)."""
    index, factor = {}, {}
    device = generator.device
    for axis, n in axes(space).items():
        u = torch.rand(batch, n, generator=generator, dtype=torch.float64, device=device)
        index[axis] = u.argsort(dim=1)
        coins = n if space.norm == "rms" else 1
        coin = torch.randint(2, (batch, coins), generator=generator, device=device)
        if signed(space):
            factor[axis] = (1.0 - 2.0 * coin.double()).expand(batch, n).clone()
    return Element(index, factor)


def signed(space: Transformer) -> bool:
    """False where something between two axes of the stream is not odd: BERT's answers pass an
    activation before the tied embedding."""
    return all(sum(is_stream(a.name) for a in t.axes) < 2 for t in space.outside)
