"""Rotations and reflections of the stream, once the gains of its norms stand in their readers.

RMSNorm without gain commutes with O(D), LayerNorm with those R for which 1 R = 1 or -1. A copy has
gains of 1; that is a symmetry too, and its weights are the network's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qemcli.groups import stream
from qemcli.groups._blocks import is_gain
from qemcli.groups._element import Element
from qemcli.groups.general_linear import orthogonal
from qemcli.groups.scale import Scales
from qemcli.spaces import WeightSpace
from qemcli.spaces.transformer import Transformer


def refusal(space: WeightSpace) -> str | None:
    """Norms before what reads them, and answers that can take the last gain."""
    if reason := stream.refusal(space):
        return reason
    assert isinstance(space, Transformer)
    gains = [t for t in space.outside if is_gain(t)]
    if space.placement == "post":
        return "norms stand behind the residual sum: their gains are part of the stream"
    if space.tied and gains:
        return "the answers share the embedding, so the last norm's gain cannot be folded into them"
    if len(gains) > 1:
        return f"'{gains[0].name}' is a norm on the stream that no single map reads"
    return None


def element(space: Transformer, batch: int, generator: torch.Generator, scales: Scales) -> Element:
    """Uniform over O(D), or over what LayerNorm leaves of it, on every axis of the stream."""
    draw = _any if space.norm == "rms" else _keeping_ones
    sizes = stream.axes(space)
    return Element({}, {}, matrix={a: draw(batch, n, generator) for a, n in sizes.items()})


def _any(batch: int, n: int, generator: torch.Generator) -> Tensor:
    return orthogonal((batch, n, n), generator)


def _keeping_ones(batch: int, n: int, generator: torch.Generator) -> Tensor:
    """R in O(n) with 1 R = 1 or -1: diag(+-1, O(n - 1)) behind the reflection of e_1 onto 1."""
    device = generator.device
    inner = torch.zeros(batch, n, n, dtype=torch.float64, device=device)
    coin = torch.randint(2, (batch,), generator=generator, device=device)
    inner[:, 0, 0] = 1.0 - 2.0 * coin.double()
    if n > 1:
        inner[:, 1:, 1:] = orthogonal((batch, n - 1, n - 1), generator)
    v = torch.full((n,), -(n**-0.5), dtype=torch.float64, device=device)
    v[0] += 1
    flip = torch.eye(n, dtype=torch.float64, device=device)
    if n > 1:
        flip = flip - 2 * torch.outer(v, v) / v.square().sum()
    return flip @ inner @ flip
