"""Axes that have names, and the notation for tensors made of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One named axis; `dual` where its neurons are read from rather than written to."""

    name: str
    size: int
    dual: bool = False

    @property
    def hidden(self) -> bool:
        return self.name[0] == "h" and self.name[1:].isdigit()


@dataclass(frozen=True)
class NamedTensor:
    """A tensor of the space: its checkpoint key and, for each dimension, its axis or axes."""

    name: str
    dims: tuple[tuple[Axis, ...], ...]

    @property
    def axes(self) -> tuple[Axis, ...]:
        return tuple(axis for dim in self.dims for axis in dim)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(axis.size for axis in dim) for dim in self.dims)

    @property
    def unfolded(self) -> tuple[int, ...]:
        """The shape with composite dimensions taken apart: one entry an axis."""
        return tuple(axis.size for axis in self.axes)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return " ".join(_dim_text(dim) for dim in self.dims)


def _dim_text(dim: tuple[Axis, ...]) -> str:
    star = "*" if dim[0].dual else ""
    names = " ".join(axis.name for axis in dim)
    return f"({names}){star}" if len(dim) > 1 else f"{names}{star}"


def parse(name: str, pattern: str, sizes: Iterable[int]) -> NamedTensor:
    """Read the notation: `parse("fc.weight", "y (h3 s)*", [10, 16, 4])`, one size an axis."""
    left = iter(sizes)
    dims = []
    for word in re.findall(r"\([^)]*\)\*?|\S+", pattern):
        inner = word.rstrip("*").strip("()").split()
        dims.append(tuple(Axis(n, next(left), word.endswith("*")) for n in inner))
    return NamedTensor(name, tuple(dims))
