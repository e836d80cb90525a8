"""Invertible matrices inside attention heads: M on queries and keys, N on values and outputs.

One M and N a key/value group. Where queries and keys are rotated by position, M must commute with
every rotation: with distinct frequencies it is a rotation and a positive scale for each pair of
numbers, and free only on the numbers that are not rotated (math of RoPE: Su et al.,
arXiv:2104.09864). The scale range is that of the singular values, so HI / LO bounds the condition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qemcli.groups._element import Element
from qemcli.groups.scale import Scales
from qemcli.spaces import WeightSpace
from qemcli.spaces.transformer import Rotary, Transformer

NO_ATTENTION = "the networks have no attention"


def refusal(space: WeightSpace) -> str | None:
    """Attention must be there; rotations leave a subgroup, which is what is drawn."""
    return None if isinstance(space, Transformer) else NO_ATTENTION


def element(space: Transformer, batch: int, generator: torch.Generator, scales: Scales) -> Element:
    """M and N of every key/value group of every block."""
    matrix = {}
    for i, (groups, _, keys, values) in enumerate(space.heads, start=1):
        shape = (batch, groups)
        matrix[f"d{i}"] = commuting(space.rotary, shape, keys, generator, scales)
        matrix[f"e{i}"] = conditioned(shape, values, generator, scales)
    return Element({}, {}, matrix=matrix)


def conditioned(
    shape: tuple[int, ...], n: int, generator: torch.Generator, scales: Scales
) -> Tensor:
    """(*shape, n, n) U diag(s) V^T with uniform U and V and s from the law of scales."""
    u, v = (orthogonal((*shape, n, n), generator) for _ in range(2))
    return u * scales.draw((*shape, 1, n), generator) @ v


def orthogonal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """(*shape) uniform orthogonal matrices: QR of normal numbers, the signs of R taken out."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
    q, r = torch.linalg.qr(x)
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]


def commuting(
    rotary: Rotary, shape: tuple[int, ...], n: int, generator: torch.Generator, scales: Scales
) -> Tensor:
    """(*shape, n, n) matrices that commute with the rotations of positions; any where none are."""
    if not rotary.dims:
        return conditioned(shape, n, generator, scales)
    pairs = rotary.dims // 2
    device = generator.device
    turn = torch.rand((*shape, pairs), generator=generator, dtype=torch.float64, device=device)
    turn, size = 2 * torch.pi * turn, scales.draw((*shape, pairs), generator)
    j = torch.arange(pairs, device=device)
    a, b = (j, j + pairs) if rotary.pairing == "half" else (2 * j, 2 * j + 1)
    m = torch.zeros((*shape, n, n), dtype=torch.float64, device=device)
    m[..., a, a] = m[..., b, b] = size * turn.cos()
    m[..., a, b], m[..., b, a] = size * turn.sin(), -size * turn.sin()
    if n > rotary.dims:
        free = conditioned(shape, n - rotary.dims, generator, scales)
        m[..., rotary.dims :, rotary.dims :] = free
    return m
