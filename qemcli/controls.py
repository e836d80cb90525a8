"""Moves of transformers that look like symmetries and are none: a test must see each of them fail.

Each is drawn with the widths and biases that the networks have; `controls(space)` names those that
make sense for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qemcli import groups
from qemcli.groups import Element
from qemcli.groups.general_linear import conditioned
from qemcli.groups.scale import Scales, gated
from qemcli.spaces import HOMOGENEOUS, Transformer

Weights = dict[str, Tensor]
Control = Callable[[Transformer, Mapping[str, Tensor], torch.Generator], Weights]
MATRICES = Scales(0.5, 2.0)
FACTORS = Scales(2.0, 4.0)


def controls(space: Transformer) -> dict[str, Control]:
    """The moves that are no symmetry of these networks, by name; one at least is always there."""
    found: dict[str, Control] = {"uncoupled": uncoupled, "unmatched": unmatched}
    if space.rotary.dims:
        found["general-linear under rotary"] = rotated
        if any("key_bias" in block.roles for block in space.blocks):
            found["key-bias shift under rotary"] = shifted
    if not gated(space) and space.activation and space.activation not in HOMOGENEOUS:
        found[f"scale under {space.activation}"] = scaled
    return found


def uncoupled(space: Transformer, w: Mapping[str, Tensor], generator: torch.Generator) -> Weights:
    """Tensors that share neurons, heads or the stream are moved by elements of their own."""
    batch = len(w[space.tensors[0].name])
    pair = [groups.act(groups.sample("all", space, batch, generator), space, w) for _ in range(2)]
    return {name: pair[i % 2][name] for i, name in enumerate(space.names)}


def unmatched(space: Transformer, w: Mapping[str, Tensor], generator: torch.Generator) -> Weights:
    """N on the values, and no inverse of it on what leaves the heads."""
    batch = len(w[space.tensors[0].name])
    matrix = {
        f"e{i}": conditioned((batch, heads), e, generator, MATRICES)
        for i, (heads, _, _, e) in enumerate(space.heads, start=1)
    }
    moved = space.read(groups.act(Element({}, {}, matrix=matrix), space, w))
    plain = space.read(dict(w))
    kept = [new | {"out": old["out"]} for new, old in zip(moved, plain, strict=True)]
    return space.write(w, kept)


def rotated(space: Transformer, w: Mapping[str, Tensor], generator: torch.Generator) -> Weights:
    """A full M on queries and keys that are rotated by position."""
    batch = len(w[space.tensors[0].name])
    matrix = {
        f"d{i}": conditioned((batch, heads), d, generator, MATRICES)
        for i, (heads, _, d, _) in enumerate(space.heads, start=1)
    }
    return groups.act(Element({}, {}, matrix=matrix), space, w)


def shifted(space: Transformer, w: Mapping[str, Tensor], generator: torch.Generator) -> Weights:
    """A shift of key biases that are rotated by position."""
    batch = len(w[space.tensors[0].name])
    shift = {}
    for i, (heads, _, d, _) in enumerate(space.heads, start=1):
        size = (batch, heads, d)
        shift[f"d{i}"] = torch.randn(size, generator=generator, dtype=torch.float64)
    return groups.act(Element({}, {}, shift=shift), space, w)


def scaled(space: Transformer, w: Mapping[str, Tensor], generator: torch.Generator) -> Weights:
    """Scales of neurons whose activation is not homogeneous."""
    batch = len(w[space.tensors[0].name])
    factor = {
        axis: FACTORS.draw((batch, n), generator)
        for axis, n in space.hidden.items()
        if axis[0] == "f"
    }
    return groups.act(Element({}, factor), space, w)
