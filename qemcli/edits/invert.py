"""Inversion: black becomes white, x -> 1 - x."""

from __future__ import annotations

from torch import Tensor


def target(images: Tensor) -> Tensor:
    """(b, c, h, w) in [0, 1] -> the same."""
    return 1 - images
