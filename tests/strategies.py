"""What hypothesis draws: weight spaces of every family on distinct widths, and networks in them."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from qemcli.functions import image_shape
from qemcli.spaces import ACTIVATIONS, Chain, Forward, cnn, mlp, siren

FAMILIES = ("mlp", "cnn pool", "cnn flatten", "siren")


@st.composite
def draw_widths(draw: st.DrawFn, hidden: int) -> list[int]:
    """Inputs, `hidden` hidden widths and outputs, no two of them equal; one neuron is drawn too."""
    return draw(st.permutations(range(1, 10)))[: hidden + 2]


@st.composite
def draw_space(
    draw: st.DrawFn,
    family: str | None = None,
    activation: str | None = None,
    least: int = 1,
) -> Chain:
    """A weight space with `least` to three hidden layers; activation any, unless it is said."""
    family = family or draw(st.sampled_from(FAMILIES))
    widths = draw(draw_widths(draw(st.integers(least, 3))))
    if family == "siren":
        return siren(widths, w0=draw(st.sampled_from([1.0, 6.5, 30.0])), convention="dws")
    activation = activation or draw(st.sampled_from(sorted(ACTIVATIONS)))
    if family == "mlp":
        return mlp(widths, activation, bias=draw(st.booleans()))
    pooling = draw(st.sampled_from(["none", "average", "max"]))
    return draw_cnn(widths, activation, pooling, flatten=family == "cnn flatten")


def draw_cnn(widths: list[int], activation: str, pooling: str, flatten: bool) -> Chain:
    """A CNN that reads 9x9 images, with two dense layers where it has hidden layers enough."""
    junction = "flatten" if flatten else "pool"
    forward = Forward(1, 1, pooling, junction, image=(widths[0], 9, 9), known=True)
    side = 9
    for _ in widths[1:-1]:
        side = side if pooling == "none" else side // 2
    positions = side * side if flatten else 1
    space = cnn(widths[:-1], widths[-1], 3, activation, positions, forward)
    assert image_shape(space) == (widths[0], 9, 9)
    return replace(space, activation=activation)


def draw_networks(
    space: Chain, batch: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """`batch` networks whose answers keep an ordinary size; biases are not zero."""
    generator = torch.Generator().manual_seed(seed)
    w = {}
    for name, shape in space.shapes.items():
        fan = torch.Size(shape[1:]).numel() if len(shape) > 1 else 4
        w[name] = torch.randn(batch, *shape, generator=generator, dtype=dtype) * (2 / fan) ** 0.5
    return w
