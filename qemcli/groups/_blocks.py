"""How an element acts on transformers: heads, feed-forward neurons and the residual stream.

In the papers' row vectors, for the heads i of a block (Tran et al., 2025, thm 4.4, with biases,
grouped queries and norms): one M and N a key/value group, one R for the stream,

    Q' = R^T Q M, b_Q' = b_Q M        K' = R^T K M^-T, b_K' = b_K M^-T + c
    V' = R^T V N, b_V' = b_V N + s    O' = N^-1 O R,   b_O' = (b_O - sum_i s_i N^-1 O_i) R

after groups and heads took their new places. Where R is a matrix the gains of the norms are folded
into the maps that read them first, since only a norm without gain commutes with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qemcli.errors import InputError
from qemcli.groups._element import Element
from qemcli.spaces import NamedTensor
from qemcli.spaces.transformer import ROLES, Block, Transformer

Roles = dict[str, Tensor]
READERS = {"norm1": ("query", "key", "value"), "norm2": ("gate", "up")}
UPWARD = ("up", "up_bias")  # what a neuron's factor multiplies; `down` is divided


def act(g: Element, space: Transformer, w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The transformers `w` moved along their orbit by `g`; computed in float64, in the dtype of w.

    Raises InputError where `g` is not an element for this batch of this space, and where a norm's
    gain that must be folded is zero.
    """
    space.check(w)
    first = w[space.tensors[0].name]
    check(g, space, len(first))
    g = g.to(first.device)
    moved: dict[str, Tensor] = {}
    for part in parts(space):
        moved |= act_on_part(g, part, w)
    return {t.name: moved[t.name] for t in space.tensors}


def parts(space: Transformer) -> Iterator[Transformer]:
    """One block after the other, then what stands outside: each can be moved on its own."""
    for block in space.blocks:
        held = {place.tensor for _, place in block.places}
        tensors = tuple(t for t in space.tensors if t.name in held)
        yield replace(space, tensors=tensors, blocks=(block,))
    yield replace(space, tensors=space.outside, blocks=())


def act_on_part(g: Element, part: Transformer, w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one of `parts`, moved; `g` was checked against the whole space."""
    exact = {t.name: w[t.name].double() for t in part.tensors}
    blocks = [
        _moved(g, part, block, dict(roles))
        for block, roles in zip(part.blocks, part.read(exact), strict=True)
    ]
    moved = part.write(exact, blocks) | _outside(g, part, exact)
    return {t.name: moved[t.name].to(w[t.name].dtype).contiguous() for t in part.tensors}


def is_stream(axis: str) -> bool:
    """True for the axes of the residual stream and of what stands between plain layers."""
    return axis[0] in "rm"


def check(g: Element, space: Transformer, batch: int) -> None:
    """InputError unless `g` is an element for `batch` networks of this space."""
    wanted = shapes(space)
    if g.turns:
        raise InputError("the group element has half turns, which transformers have not")
    for part in g.parts:
        for axis, x in part.items():
            n = wanted.get(axis)
            if n is None or len(x) != batch or x.shape[1 : 1 + len(n)] != torch.Size(n):
                raise InputError(
                    f"the group element has shape {tuple(x.shape)} on axis {axis}, "
                    f"the networks need {(batch, *(n or ()))}"
                )


def shapes(space: Transformer) -> dict[str, tuple[int, ...]]:
    """Axis -> the shape, after the batch, of what an element has there."""
    sizes: dict[str, tuple[int, ...]] = {a: (n,) for a, n in space.sizes.items()}
    for i, (groups, queries, keys, values) in enumerate(space.heads, start=1):
        sizes[f"k{i}"], sizes[f"q{i}"] = (groups,), (groups, queries)
        sizes[f"d{i}"], sizes[f"e{i}"] = (groups, keys), (groups, values)
    return sizes


def _moved(g: Element, space: Transformer, block: Block, roles: Roles) -> Roles:
    """One block, its roles as in ROLES."""
    i = number(space, block)
    stream = {role: _stream(space, place.tensor) for role, place in block.places}
    if any(axis in g.matrix for axis in stream.values() if axis):
        roles = _folded(roles, space.style.parallel)
    roles = {role: _placed(g, i, role, stream[role], x) for role, x in roles.items()}
    roles = _rescaled(g, i, roles)
    roles = _turned(g, i, roles)
    roles = _pushed(g, i, roles)
    return {role: _streamed(g, role, stream[role], x) for role, x in roles.items()}


def number(space: Transformer, block: Block) -> int:
    """Which block it is, counted from 1: the number in the names of its axes."""
    axes = space[block.roles["down"].tensor].axes
    return int(next(a.name[1:] for a in axes if a.name[0] == "f"))


def _stream(space: Transformer, tensor: str) -> str | None:
    return next((a.name for a in space[tensor].axes if is_stream(a.name)), None)


def _folded(roles: Roles, parallel: bool) -> Roles:
    """Every gain moved into the maps that read the norm, which then has gain 1."""
    new = dict(roles)
    for norm, readers in READERS.items():
        if norm not in roles:
            continue
        if parallel and "norm2" not in roles:
            readers = (*readers, *READERS["norm2"])
        gain = roles[norm]
        new[norm] = torch.ones_like(gain)
        if (shift := roles.get(f"{norm}_shift")) is not None:
            new[f"{norm}_shift"] = _unscaled(shift, gain)
        for reader in readers:
            if reader in roles:
                new[reader] = _times(roles[reader], gain, 1 + ROLES[reader].index("r"))
    return new


def _unscaled(shift: Tensor, gain: Tensor) -> Tensor:
    if bool(((gain == 0) & (shift != 0)).any()):
        raise InputError(
            "a norm has a gain of exactly 0 beside a shift: its gain cannot be folded",
            "use --group stream, which leaves gains where they are",
        )
    return torch.where(gain == 0, shift, shift / gain)


def _placed(g: Element, i: int, role: str, stream: str | None, x: Tensor) -> Tensor:
    """The role with its groups, heads, neurons and stream in their new order."""
    letters = ROLES[role]
    if f"k{i}" in g.index and "k" in letters:
        x = taken(x, 1, g.index[f"k{i}"])
    if f"q{i}" in g.index and "q" in letters:
        p = g.index[f"q{i}"]
        batch, groups = torch.arange(len(p))[:, None, None], torch.arange(p.shape[1])[:, None]
        x = x[batch.to(p.device), groups.to(p.device), p]
    for letter, axis in (("f", f"f{i}"), ("r", stream or "")):
        if letter in letters and axis in g.index:
            x = taken(x, 1 + letters.index(letter), g.index[axis])
    return x


def _rescaled(g: Element, i: int, roles: Roles) -> Roles:
    d = g.factor.get(f"f{i}")
    if d is None:
        return roles
    new = {r: _times(roles[r], d, 1 + ROLES[r].index("f")) for r in UPWARD if r in roles}
    return roles | new | {"down": _times(roles["down"], 1 / d, 1)}


def _turned(g: Element, i: int, roles: Roles) -> Roles:
    """M on queries and keys, N on values and what leaves the heads; `solve`, no inverse."""
    new = dict(roles)
    if (m := g.matrix.get(f"d{i}")) is not None:
        new["query"] = torch.einsum("bkqrd,bkdc->bkqrc", roles["query"], m)
        new["key"] = torch.linalg.solve(m, roles["key"].mT).mT
        if "query_bias" in roles:
            new["query_bias"] = torch.einsum("bkqd,bkdc->bkqc", roles["query_bias"], m)
        if "key_bias" in roles:
            new["key_bias"] = torch.linalg.solve(m, roles["key_bias"][..., None])[..., 0]
    if (n := g.matrix.get(f"e{i}")) is not None:
        new["value"] = torch.einsum("bkre,bkec->bkrc", roles["value"], n)
        out = roles["out"].transpose(2, 3)  # (b, k, e, q, r)
        solved = torch.linalg.solve(n, out.flatten(3)).unflatten(3, out.shape[3:])
        new["out"] = solved.transpose(2, 3)
        if "value_bias" in roles:
            new["value_bias"] = torch.einsum("bke,bkec->bkc", roles["value_bias"], n)
    return new


def _pushed(g: Element, i: int, roles: Roles) -> Roles:
    """c on the key bias; s on the value bias, and off the bias of what leaves the heads."""
    new = dict(roles)
    if (c := g.shift.get(f"d{i}")) is not None:
        new["key_bias"] = roles["key_bias"] + c
    if (s := g.shift.get(f"e{i}")) is not None:
        new["value_bias"] = roles["value_bias"] + s
        new["out_bias"] = roles["out_bias"] - torch.einsum("bke,bkqer->br", s, roles["out"])
    return new


def _streamed(g: Element, role: str, axis: str | None, x: Tensor) -> Tensor:
    if axis is None or role in READERS:  # a gain has no sign, and is 1 where there is a matrix
        return x
    return in_stream(g, axis, x, 1 + ROLES[role].index("r"))


def in_stream(g: Element, axis: str, x: Tensor, dim: int) -> Tensor:
    if axis in g.factor:
        x = _times(x, g.factor[axis], dim)
    if axis in g.matrix:
        x = torch.einsum("b...i,bij->b...j", x.movedim(dim, -1), g.matrix[axis]).movedim(-1, dim)
    return x


def _outside(g: Element, space: Transformer, w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Embeddings, last norm, answers: the stream on every axis of it, a classifier's neurons."""
    found = {t.name: w[t.name] for t in space.outside}
    if any(is_stream(axis) for axis in g.matrix):
        found = _folded_outside(space, found)
    for t in space.outside:
        x = found[t.name].reshape(-1, *t.unfolded)
        for dim, axis in enumerate(t.axes, start=1):
            if axis.name in g.index:
                x = taken(x, dim, g.index[axis.name])
            if is_stream(axis.name):
                x = x if is_gain(t) else in_stream(g, axis.name, x, dim)
            elif axis.name in g.factor:
                d = g.factor[axis.name]
                x = _times(x, 1 / d if axis.dual else d, dim)
        found[t.name] = x.reshape(-1, *t.shape)
    return found


def is_gain(t: NamedTensor) -> bool:
    """True for the gain of a norm outside the blocks: a weight with the stream for its one axis."""
    return len(t.axes) == 1 and is_stream(t.axes[0].name) and t.name.endswith("weight")


def _folded_outside(space: Transformer, w: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gain of the last norm moved into the answers, which read it."""
    new = dict(w)
    for norm in filter(is_gain, space.outside):
        gain = w[norm.name]
        new[norm.name] = torch.ones_like(gain)
        for t in space.outside:
            if t.dims == norm.dims and t is not norm and t.name == _shift_of(norm.name):
                new[t.name] = _unscaled(w[t.name], gain)
            for dim, axis in enumerate(t.axes, start=1):
                if axis.dual and is_stream(axis.name):
                    x = _times(w[t.name].reshape(-1, *t.unfolded), gain, dim)
                    new[t.name] = x.reshape(-1, *t.shape)
    return new


def _shift_of(gain: str) -> str:
    return gain.removesuffix("weight") + "bias"


def taken(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """x (b, ...) gathered along `dim` by index (b, n)."""
    batch = torch.arange(len(index), device=index.device)[:, None]
    return x.movedim(dim, 1)[batch, index].movedim(1, dim)


def _times(x: Tensor, factor: Tensor, dim: int) -> Tensor:
    """x (b, ...) times factor (b, n) along `dim`."""
    return x * factor.reshape(len(factor), *([1] * (dim - 1)), -1, *([1] * (x.dim() - dim - 1)))
