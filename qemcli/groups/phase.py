"""SIREN's phase: a hidden bias moves by t pi / w0, outgoing weights change sign t times."""

from __future__ import annotations

import torch

from qemcli.groups._element import Part
from qemcli.groups.scale import UNKNOWN, Scales
from qemcli.spaces import Chain, WeightSpace

MOST = 3  # half turns either way; more only costs digits of the bias


def refusal(space: WeightSpace) -> str | None:
    """The activation must be sin(w0 z) with w0 known, as in a SIREN, and biases there."""
    if not isinstance(space, Chain):
        return "half turns are a symmetry of SIRENs"
    if space.activation is None:
        return f"whether half turns are a symmetry {UNKNOWN}"
    if space.activation != "sin":
        return f"{space.activation} is not periodic: half turns are a symmetry of sin only"
    if space.family != "siren" and not space.forward.known:
        return "w0 of sin(w0 z) is not known here, and a half turn is pi / w0"
    if space.forward.pooling == "max":
        return "the networks have max pooling, and max(-x) is not -max(x)"
    bare = [layer.weight for layer in space.layers[:-1] if layer.bias is None]
    if bare:
        return f"layer '{bare[0]}' has no bias that could take up a half turn"
    return None


def draw(
    space: WeightSpace, n: int, batch: int, generator: torch.Generator, scales: Scales
) -> Part:
    """Uniform over -3 ... 3 half turns a neuron."""
    shape = (batch, n)
    return Part(
        turns=torch.randint(-MOST, MOST + 1, shape, generator=generator, device=generator.device)
    )
