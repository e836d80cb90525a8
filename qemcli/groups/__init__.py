"""The symmetry groups of a network's hidden neurons: sample, compose, inverse, act; who has which.

`sample("monomial", space, batch, generator)` draws one element a network; `act(g, space, w)` moves
the networks. A group is a module of this folder with `refusal(space)` and `draw(space, n, batch,
generator, scales)`.
"""

from __future__ import annotations

import torch

from qemcli import registry
from qemcli.errors import UnsupportedError
from qemcli.groups._element import Element, Part, act, assemble, compose, identity, inverse
from qemcli.groups.scale import Scales
from qemcli.spaces import WeightSpace

__all__ = [
    "ALL",
    "Element",
    "act",
    "allowed",
    "applicable",
    "compose",
    "identity",
    "inverse",
    "names",
    "sample",
]

ALL = "all"
NO_NEURONS = "the network has one layer, so no hidden neurons to act on"


def names() -> list[str]:
    """Every group by name, `all` last."""
    return [*registry.names("groups"), ALL]


def allowed(name: str, space: WeightSpace) -> str | None:
    """None where the group is a symmetry of these networks, else the reason why not."""
    refusal = None if name == ALL else registry.load("groups", name).refusal(space)
    return refusal if space.hidden else NO_NEURONS


def applicable(space: WeightSpace) -> list[str]:
    """The groups that are symmetries of these networks, without `all`."""
    return [name for name in registry.names("groups") if allowed(name, space) is None]


def sample(
    name: str,
    space: WeightSpace,
    batch: int,
    generator: torch.Generator,
    scale_range: tuple[float, float] = (0.1, 10.0),
    law: str | None = None,
) -> Element:
    """One random element for each of `batch` networks; float64, on the generator's device.

    Args:
        scale_range: lowest and highest factor of positive scalings.
        law: "uniform", as the papers' U[1, 10^i], or "log" (log-uniform); by default log where the
            range has 1 in its inside, so that shrinking is as likely as growing.

    Raises UnsupportedError with the reason where the group is no symmetry of these networks,
    UsageError for an unknown name or a scale range that is none.
    """
    if reason := allowed(name, space):
        raise UnsupportedError(f"group '{name}': {reason}", f"these hold: {_list(space)}")
    scales = Scales.of(scale_range, law)
    modules = [registry.load("groups", n) for n in (_factors(space) if name == ALL else [name])]
    parts = {}
    for axis, neurons in space.hidden.items():
        parts[axis] = Part()
        for module in modules:
            drawn = module.draw(space, neurons, batch, generator, scales)
            parts[axis] = parts[axis].filled(drawn)
    return assemble(space, batch, parts)


def _list(space: WeightSpace) -> str:
    return ", ".join(applicable(space)) or "none"


def _factors(space: WeightSpace) -> list[str]:
    """The groups whose product is all that applies; monomial holds permutation, scale, sign."""
    known = applicable(space)
    inside = {"permutation", "scale", "sign"} if "monomial" in known else set()
    return [name for name in known if name not in inside]
