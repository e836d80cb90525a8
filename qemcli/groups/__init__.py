"""The symmetry groups of networks: sample, compose, inverse, act; who has which.

`sample("monomial", space, batch, generator)` draws one element a network; `act(g, space, w)` moves
the networks. A group is a module of this folder (`general-linear` is general_linear.py) with
`refusal(space)` and either `draw(space, n, batch, generator, scales)`, for the neurons of one axis,
or `element(space, batch, generator, scales)`, for heads and the stream of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from qemcli import registry
from qemcli.errors import UnsupportedError, UsageError
from qemcli.groups import _blocks, _composition, _element
from qemcli.groups._blocks import act_on_part, check, parts
from qemcli.groups._element import Element, Part, assemble, identity
from qemcli.groups.scale import Scales
from qemcli.spaces import WeightSpace
from qemcli.spaces.transformer import Transformer

__all__ = [
    "ALL",
    "Element",
    "act",
    "act_on_part",
    "allowed",
    "applicable",
    "check",
    "compose",
    "identity",
    "inverse",
    "names",
    "parts",
    "sample",
]

ALL = "all"
NO_NEURONS = "the network has one layer, so no hidden neurons to act on"


# What another group holds already, where both are there.
HELD = {"monomial": {"permutation", "scale", "sign"}, "orthogonal": {"stream"}}


def names() -> list[str]:
    """Every group by name, `all` last."""
    return [*_modules(), ALL]


def _modules() -> list[str]:
    return sorted(name.replace("_", "-") for name in registry.names("groups"))


def _load(name: str) -> ModuleType:
    if name not in _modules():
        raise UsageError(f"no group is called '{name}'", registry.suggest(name, names()))
    return registry.load("groups", name.replace("-", "_"))


def allowed(name: str, space: WeightSpace) -> str | None:
    """None where the group is a symmetry of these networks, else the reason why not."""
    refusal = None if name == ALL else _load(name).refusal(space)
    return refusal if space.hidden else NO_NEURONS


def applicable(space: WeightSpace) -> list[str]:
    """The groups that are symmetries of these networks, without `all`."""
    return [name for name in _modules() if allowed(name, space) is None]


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
        scale_range: lowest and highest factor of positive scalings, and singular value of matrices
            in heads: their quotient is the largest condition.
        law: "uniform", as the papers' U[1, 10^i], or "log" (log-uniform); by default log where the
            range has 1 in its inside, so that shrinking is as likely as growing.

    Raises UnsupportedError with the reason where the group is no symmetry of these networks,
    UsageError for an unknown name or a scale range that is none.
    """
    if reason := allowed(name, space):
        raise UnsupportedError(f"group '{name}': {reason}", f"these hold: {_list(space)}")
    scales = Scales.of(scale_range, law)
    modules = [_load(n) for n in (_factors(space) if name == ALL else [name])]
    drawn = [
        module.element(space, batch, generator, scales)
        for module in modules
        if hasattr(module, "element")
    ]
    parts = {}
    for axis, neurons in space.hidden.items():
        parts[axis] = Part()
        for module in (m for m in modules if not hasattr(m, "element")):
            parts[axis] = parts[axis].filled(module.draw(space, neurons, batch, generator, scales))
    return _joined([assemble(space, batch, parts, generator.device), *drawn])


def _joined(elements: list[Element]) -> Element:
    """One element of elements that move different things."""
    both: list[dict[str, Tensor]] = [{}, {}, {}, {}, {}]
    for g in elements:
        for found, part in zip(both, g.parts, strict=True):
            found.update(part)
    return Element(*both)


def act(g: Element, space: WeightSpace, w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The networks `w` moved along their orbit by `g`, one element a network; the dtype is kept.

    Raises InputError where `g` is not an element for this batch of this space.
    """
    by = _blocks if isinstance(space, Transformer) else _element
    return by.act(g, space, w)


def compose(g: Element, h: Element) -> Element:
    """`g` after `h`: act(compose(g, h), w) is act(g, act(h, w))."""
    return (_element if g.chained and h.chained else _composition).compose(g, h)


def inverse(g: Element) -> Element:
    """The element that undoes `g`."""
    return (_element if g.chained else _composition).inverse(g)


def _list(space: WeightSpace) -> str:
    return ", ".join(applicable(space)) or "none"


def _factors(space: WeightSpace) -> list[str]:
    """The groups whose product is all that applies."""
    known = applicable(space)
    inside = {name for holder, held in HELD.items() if holder in known for name in held}
    return [name for name in known if name not in inside]
