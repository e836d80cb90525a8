"""Positive scales: incoming weights times a, outgoing divided by a, for homogeneous activations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qemcli.errors import UsageError
from qemcli.groups._element import Part
from qemcli.spaces import HOMOGENEOUS, WeightSpace
from qemcli.spaces.transformer import Transformer

UNKNOWN = "depends on the activation, which is not known here; pass --activation NAME"
LAWS = ("uniform", "log")


@dataclass(frozen=True)
class Scales:
    """The distribution of positive factors: `law` (uniform | log) on [low, high]."""

    low: float = 0.1
    high: float = 10.0
    law: str = "log"

    @classmethod
    def of(cls, scale_range: tuple[float, float], law: str | None = None) -> Scales:
        """Checked; UsageError where it is no range of positive numbers, or no law has that name."""
        low, high = (float(x) for x in scale_range)
        if not (0 < low <= high and math.isfinite(high)):
            raise UsageError(
                f"the scale range {low:g}:{high:g} is not LO:HI with 0 < LO <= HI",
                "for instance 1:100, or 0.1:10",
            )
        law = law or ("log" if low < 1 < high else "uniform")
        if law not in LAWS:
            raise UsageError(f"no law of scales is called '{law}'", f"Known: {', '.join(LAWS)}.")
        return cls(low, high, law)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Factors of the given shape, float64, on the generator's device."""
        u = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
        if self.law == "log":
            return self.low * (self.high / self.low) ** u
        return self.low + (self.high - self.low) * u


def gated(space: WeightSpace) -> bool:
    """True for SwiGLU and its like: what passes the gate is multiplied, whatever the activation."""
    return isinstance(space, Transformer) and space.gated


def refusal(space: WeightSpace) -> str | None:
    """The activation must be positively homogeneous; pooling, zero padding, flattening and the
    product with a gate are."""
    if gated(space):
        return None
    if space.activation is None:
        return f"whether positive scales are a symmetry {UNKNOWN}"
    if space.activation not in HOMOGENEOUS:
        homogeneous = ", ".join(sorted(HOMOGENEOUS))
        return (
            f"{space.activation} is not homogeneous: f(a x) is not a f(x) "
            f"(homogeneous are {homogeneous})"
        )
    return None


def draw(
    space: WeightSpace, n: int, batch: int, generator: torch.Generator, scales: Scales
) -> Part:
    """One positive factor a neuron."""
    return Part(factor=scales.draw((batch, n), generator))
