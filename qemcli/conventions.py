"""Conventions of SIRENs: the same picture from a network that is run in another way.

sin(w0 (W x + b)) = sin(v0 (W' x + b'))         W' = W w0 / v0, b' = b w0 / v0
black and white of the one are those of the other: the last layer, scaled and shifted
row and column change places: the columns of the first weight
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from qemcli.errors import InputError
from qemcli.spaces import WeightSpace, chain_of

WHAT = "a convention of SIRENs"


def same(space: WeightSpace, other: WeightSpace) -> bool:
    """True where both are run in the same way; the size of the picture is not asked."""
    space, other = chain_of(space, WHAT), chain_of(other, WHAT)
    return replace(space.forward, image=None) == replace(other.forward, image=None)


def text(space: WeightSpace) -> str:
    """How SIRENs are run, in words."""
    run = chain_of(space, WHAT).forward
    return f"w0 {run.w0:g}, axes {run.axes}, levels {run.levels[0]:g} to {run.levels[1]:g}"


def express(space: WeightSpace, own: WeightSpace, flat: Tensor) -> Tensor:
    """(n, D) SIRENs that are run as `space` says -> (n, D) that show the same, run as `own` says.

    Exact up to rounding. Raises InputError where it is not known how either is run.
    """
    if same(space, own):
        return flat
    space, own = chain_of(space, WHAT), chain_of(own, WHAT)
    for each in (space, own):
        if each.family != "siren" or not each.forward.known or not each.forward.axes:
            raise InputError(
                "how the SIREN is run is not known: w0, axes and levels",
                "pass --w0 30 --convention nfn or dws",
            )
    mine, theirs = own.forward, space.forward
    pairs = space.matrices(space.unflatten(flat))
    weight, bias = pairs[0]
    pairs[0] = (weight if mine.axes == theirs.axes else weight.flip(2), bias)
    ratio = theirs.w0 / mine.w0
    pairs[:-1] = [(weight * ratio, bias * ratio) for weight, bias in pairs[:-1]]
    # (y + offset - black) / (white - black) is the grey that both must show.
    gain = (mine.levels[1] - mine.levels[0]) / (theirs.levels[1] - theirs.levels[0])
    shift = mine.levels[0] - mine.offset + gain * (theirs.offset - theirs.levels[0])
    if shift and not own.layers[-1].bias:
        raise InputError("a SIREN without a last bias cannot take the other convention's levels")
    weight, bias = pairs[-1]
    pairs[-1] = (gain * weight, gain * bias + shift)
    return own.flatten(own.from_matrices(pairs))
