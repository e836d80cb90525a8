"""Contrast: every value is moved away from the picture's mean m,  m + f (x - m),  and clipped.

The factor f is the amount; below 1 it flattens. Plain arithmetic: the published target is `clahe`.
"""

from __future__ import annotations

from torch import Tensor

AMOUNT = 1.5


def target(images: Tensor, amount: float = AMOUNT) -> Tensor:
    """(b, c, h, w) in [0, 1] -> the same; the mean is over pixels and channels."""
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (mean + amount * (images - mean)).clamp(0, 1)
