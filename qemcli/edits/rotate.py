"""Rotation about the middle, anticlockwise by an angle in degrees; what comes in is black.

Bilinear; corners are at -1 and 1, as the coordinates of the INRs are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

AMOUNT = 10.0


def target(images: Tensor, amount: float = AMOUNT) -> Tensor:
    """(b, c, h, w) in [0, 1] -> the same."""
    angle = math.radians(amount)
    cos, sin = math.cos(angle), math.sin(angle)
    height, width = images.shape[2:]
    # Coordinates run from -1 to 1 on both sides, whatever their length.
    stretch = (height - 1) / max(width - 1, 1)
    matrix = images.new_tensor([[cos, -sin * stretch, 0], [sin / (stretch or 1), cos, 0]])
    grid = affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=True)
    return torch.clamp(grid_sample(images, grid, align_corners=True), 0, 1)
