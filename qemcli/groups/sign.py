"""Signs: incoming and outgoing weights of a neuron change sign, for odd activations."""

from __future__ import annotations

import torch

from qemcli.groups._element import Part
from qemcli.groups.scale import UNKNOWN, Scales, gated
from qemcli.spaces import ODD, Chain, WeightSpace


def refusal(space: WeightSpace) -> str | None:
    """The activation must be odd, f(-x) = -f(x), and so must everything up to the next weights;
    what passes a gate may change its sign whatever the activation."""
    if gated(space):
        return None
    if space.activation is None:
        return f"whether signs are a symmetry {UNKNOWN}"
    if space.activation not in ODD:
        return (
            f"{space.activation} is not odd: f(-x) is not -f(x) (odd are {', '.join(sorted(ODD))})"
        )
    if isinstance(space, Chain) and space.forward.pooling == "max":
        return "the networks have max pooling, and max(-x) is not -max(x)"
    return None


def draw(
    space: WeightSpace, n: int, batch: int, generator: torch.Generator, scales: Scales
) -> Part:
    """A fair coin a neuron: factors 1 and -1."""
    coin = torch.randint(2, (batch, n), generator=generator, device=generator.device)
    return Part(factor=1.0 - 2.0 * coin.double())
