"""Step by step through an architecture: what it makes of moved networks, and what it should."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qemcli.groups import Element, act
from qemcli.layers.features import Features, act_on_features
from qemcli.layers.metanetwork import Blocks, Metanetwork
from qemcli.spaces import Layered, Transformer, WeightSpace

Networks = Mapping[str, Tensor]


def steps(
    module: Metanetwork, space: WeightSpace, w: Networks, g: Element
) -> Iterator[tuple[str, Tensor, bool]]:
    """(step, error (b,), strict) after every equivariant step that the architecture shows; what is
    not strict may move by another element of the group, as quasi layers do.

    The error is the largest difference of features over the size of the tensor it is in.
    """
    with torch.no_grad():
        moved = act(g, space, w)
        if isinstance(space, Layered):
            pairs = zip(module.equivariant(w), module.equivariant(moved), strict=True)
            for (name, plain), (_, found) in pairs:
                yield name, _of_features(space, g, plain, found), _strict(module, name)
        elif isinstance(space, Transformer):
            for (name, blocks), (_, changed) in zip(
                module.roles(w), module.roles(moved), strict=True
            ):
                yield name, _of_blocks(space, g, w, blocks, changed), _strict(module, name)


def _strict(module: Metanetwork, step: str) -> bool:
    if not step.startswith("quasi"):  # of some, every step behind the quasi layer moves so
        return True
    quasi: Any = module.quasi
    return bool(getattr(quasi, "strict", quasi.keeps_invariance))


def _of_features(space: Layered, g: Element, plain: Features, found: Features) -> Tensor:
    wanted = act_on_features(space, g, plain)
    pairs = zip(wanted, found, strict=True)
    return _worst([both for pair in pairs for both in zip(*pair, strict=True)])


def _of_blocks(space: Transformer, g: Element, w: Networks, plain: Blocks, found: Blocks) -> Tensor:
    """The element acts on every channel of the roles as it does on weights."""
    channels = plain[0]["up"].shape[1]
    flat = [{role: x.flatten(0, 1) for role, x in roles.items()} for roles in plain]
    copies = {name: x.repeat_interleave(channels, 0) for name, x in w.items()}
    others = space.read(copies)
    stored = space.write(copies, [{**a, **b} for a, b in zip(others, flat, strict=True)])
    each = g.rows(torch.arange(g.batch).repeat_interleave(channels))
    wanted = space.read(act(each, space, stored))
    return _worst(
        [
            (want[role].unflatten(0, (-1, channels)), x)
            for want, have in zip(wanted, found, strict=True)
            for role, x in have.items()
        ]
    )


def _worst(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    worst = []
    for want, have in pairs:
        scale = want.flatten(1).abs().amax(dim=1).clamp_min(torch.finfo(want.dtype).tiny)
        worst.append((have - want).flatten(1).abs().amax(dim=1) / scale)
    return torch.stack(worst).amax(dim=0)
