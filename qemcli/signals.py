"""Signals: what image INRs show, on the scale where black is 0 and white is 1."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qemcli.errors import InputError
from qemcli.functions import respond
from qemcli.spaces import CONVENTIONS, Chain, WeightSpace, chain_of

CHANNELS = (1, 3)


def check(space: WeightSpace, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
    """(channels, height, width) of what the networks show; `size` (height, width) goes before the
    space's own. InputError where they are no image INRs, or where it is not known how they are
    run."""
    space = chain_of(space, "a picture")
    inputs, outputs = space.layers[0].cols, space.layers[-1].rows
    described = f"a network of {inputs} inputs and {outputs} outputs"
    if inputs != 2 or outputs not in CHANNELS:
        raise InputError(
            f"{described} shows no image",
            "an image INR reads 2 coordinates and gives 1 or 3 values",
        )
    if space.family != "siren" or space.activation != "sin":
        known = (
            f"a network with {space.activation}" if space.activation else "it is not known to be"
        )
        raise InputError(
            f"not a SIREN: {known}{'' if space.activation else ' one'}",
            f"if it is one, say how it is run: --w0 30 --convention {'|'.join(CONVENTIONS)}",
        )
    if not space.forward.known or space.forward.axes not in ("ij", "xy"):
        lacking = "axes and levels" if space.forward.known else "w0, axes and levels"
        raise InputError(
            f"how the SIREN is run is not known: {lacking}",
            f"pass --w0 30 --convention {'|'.join(CONVENTIONS)}",
        )
    channels, *own = space.forward.image or (outputs,)
    if channels != outputs:
        raise InputError(f"{described}, but its image is said to have {channels} channels")
    height, width = size or own or (0, 0)
    if height < 1 or width < 1:
        raise InputError("the size of the image is not known", "pass --size HEIGHTxWIDTH")
    return channels, height, width


def coordinates(
    space: Chain, height: int, width: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The inputs of an image's pixels, row by row: (height * width, 2), both ends in [-1, 1].

    The first coordinate is the row (`forward.axes` "ij") or the column ("xy").
    """
    rows = torch.linspace(-1, 1, height, dtype=dtype)
    columns = torch.linspace(-1, 1, width, dtype=dtype)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    return grid if space.forward.axes == "ij" else grid.flip(1)


def render(
    space: WeightSpace, w: Mapping[str, Tensor], size: tuple[int, int] | None = None
) -> Tensor:
    """What b networks show: (b, channels, height, width), in the dtype of `w`; differentiable.

    0 is black and 1 is white in every convention; nothing is clipped. `size` is (height, width),
    else the space's own. Raises InputError as `check`.
    """
    _, height, width = check(space, size)
    space = chain_of(space, "a picture")
    dtype = w[space.layers[0].weight].dtype
    outputs = respond(space, w, coordinates(space, height, width, dtype).to(device(w)))
    black, white = space.forward.levels
    return ((outputs - black) / (white - black)).transpose(1, 2).unflatten(2, (height, width))


def device(w: Mapping[str, Tensor]) -> torch.device:
    """Where the weights lie."""
    return next(iter(w.values())).device


def psnr(image: Tensor, truth: Tensor) -> Tensor:
    """-10 log10 of the mean squared error in dB: (b, c, h, w) twice, or `truth` (c, h, w) -> (b,).

    Both on the [0, 1] scale, unclipped; equal images give inf.
    """
    return -10 * torch.log10((image - truth).square().flatten(1).mean(dim=1))
