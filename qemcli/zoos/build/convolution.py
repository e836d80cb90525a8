"""The convolution of many networks at once, as one product of matrices a network.

Images are (n, p, h, v, c): network, image, height, width, channel last. Everything is laid out in
windows, so that both directions are one batched product and no gradient is scattered: for images of
a few pixels that is two to four times as fast as a grouped convolution (performance.md, section 3).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def side_after(side: int, kernel: int, stride: int, padding: int) -> int:
    """The side of a convolution's output."""
    return (side + 2 * padding - kernel) // stride + 1


def windows(x: Tensor, size: int, step: int, before: int, count: int) -> Tensor:
    """(n, p, h, v, c) -> (n, p count count, size size c): the window of every output position.

    The first window begins `before` pixels outside of the image; what lies outside reads as zeros.
    """
    n, p, height, width, c = x.shape
    side = (count - 1) * step + size
    rows, cols = min(height, side - before), min(width, side - before)
    z = x.new_zeros(n, p, side, side, c)
    z[:, :, before : before + rows, before : before + cols] = x[:, :, :rows, :cols]
    a, b, d, e, _ = z.stride()
    # A row of a window is contiguous: columns and channels are one axis.
    view = z.as_strided((n, p, count, count, size, size * c), (a, b, d * step, e * step, d, 1))
    return view.reshape(n, p * count * count, size * size * c)


@lru_cache(maxsize=64)
def _taps(kernel: int, stride: int, padding: int) -> tuple[Tensor, int, int]:
    """Which kernel tap leads from output pixel a + j to input pixel stride a + r, in both axes.

    (table (J, J, stride, stride) of flat taps, kernel^2 where none does; lowest j; J).
    """
    pairs = [
        (r, (r + padding - u) // stride, u)
        for r in range(stride)
        for u in range(kernel)
        if (r + padding - u) % stride == 0
    ]
    low = min(j for _, j, _ in pairs)
    span = max(j for _, j, _ in pairs) - low + 1
    table = torch.full((span, span, stride, stride), kernel * kernel)
    for r, j, u in pairs:
        for s, k, v in pairs:
            table[j - low, k - low, r, s] = u * kernel + v
    return table, low, span


def matrix(weight: Tensor) -> Tensor:
    """Kernels (n, o, c, k, k) -> (n, k k c, o), to be multiplied by windows."""
    n, o, c, kernel, _ = weight.shape
    return weight.permute(0, 3, 4, 2, 1).reshape(n, kernel * kernel * c, o)


class Convolution(torch.autograd.Function):
    """y[a] = b + sum_u W[u] x[stride a + u - padding] for every network on its own images."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int
    ) -> Tensor:
        n, o, _, kernel, _ = weight.shape
        side = side_after(x.shape[2], kernel, stride, padding)
        columns = windows(x, kernel, stride, padding, side)
        ctx.save_for_backward(columns, weight)
        ctx.shape, ctx.stride, ctx.padding = x.shape, stride, padding
        return torch.baddbmm(bias[:, None], columns, matrix(weight)).view(n, -1, side, side, o)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        columns, weight = ctx.saved_tensors
        (g,) = gradients
        n, o, c, kernel, _ = weight.shape
        flat = g.reshape(n, -1, o)
        taps = torch.bmm(columns.transpose(1, 2), flat).view(n, kernel, kernel, c, o)
        x = None
        if ctx.needs_input_grad[0]:
            x = _input_gradient(g, weight, ctx.shape, ctx.stride, ctx.padding)
        return x, taps.permute(0, 4, 3, 1, 2), flat.sum(1), None, None


def _input_gradient(
    g: Tensor, weight: Tensor, shape: tuple[int, ...], stride: int, padding: int
) -> Tensor:
    """The gradient by the images: stride^2 input pixels at a time, each from the windows of g."""
    n, p, height, width, c = shape
    o, kernel = weight.shape[1], weight.shape[3]
    table, low, span = _taps(kernel, stride, padding)
    taps = weight.flatten(3).permute(0, 3, 1, 2)
    taps = torch.cat([taps, taps.new_zeros(n, 1, o, c)], dim=1)[:, table.flatten()]
    taps = taps.view(n, span * span, stride * stride, o, c).transpose(2, 3)
    taps = taps.reshape(n, span * span * o, stride * stride * c)
    count = -(-max(height, width) // stride)
    blocks = torch.bmm(windows(g, span, 1, -low, count), taps)
    blocks = blocks.view(n, p, count, count, stride, stride, c).transpose(3, 4)
    return blocks.reshape(n, p, count * stride, count * stride, c)[:, :, :height, :width]
