"""An element of a weight space's symmetry group, and its action on neurons: no matrices are formed.

On every hidden axis an element has an index vector p, a factor d != 0 and, for SIRENs, a number t
of half turns (what it has on the heads and the stream of transformers: _blocks.py):

    W'[j, k] = d_l[j] / d_{l-1}[k] * (-1)^t_{l-1}[k] * W[p_l[j], p_{l-1}[k]]
    b'[j]    = d_l[j] * b[p_l[j]] + t_l[j] * pi / w0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qemcli.errors import InputError
from qemcli.spaces import Axis, NamedTensor, WeightSpace, layered_of


@dataclass(frozen=True)
class Part:
    """What a group draws on one hidden axis, each (b, n); None where it leaves that part alone."""

    index: Tensor | None = None
    factor: Tensor | None = None
    turns: Tensor | None = None

    def filled(self, other: Part) -> Part:
        """What is None here, from `other`."""
        mine = {k: v for k, v in vars(self).items() if v is not None}
        return replace(other, **mine)


@dataclass(frozen=True)
class Element:
    """One group element for each network of a batch; every dict is keyed by an axis' name.

    On the axes h1, h2, ... of chains index and factor are always there. On those of transformers
    what is absent is the identity: neurons `f1`, `h1`; groups of heads `k1`, query heads `q1`
    (b, K, Q), counted within their new group; numbers of a head `d1`, `e1`; the stream `r`.

    Attributes:
        index: (b, n) int64; neuron j of the result is neuron index[j] of the source.
        factor: (b, n) float64, not zero; of the stream: signs.
        turns: (b, n) int64 half turns of SIREN's phase; empty where there are none.
        matrix: `d1`, `e1`: (b, K, n, n) float64, invertible; the stream: (b, D, D), orthogonal.
        shift: (b, K, n) float64, added to the biases of keys (`d1`) and values (`e1`).
    """

    index: dict[str, Tensor]
    factor: dict[str, Tensor]
    turns: dict[str, Tensor] = field(default_factory=dict)
    matrix: dict[str, Tensor] = field(default_factory=dict)
    shift: dict[str, Tensor] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """How many networks it acts on; 0 where there is nothing to act on."""
        return next((len(x) for part in self.parts for x in part.values()), 0)

    @property
    def parts(self) -> tuple[dict[str, Tensor], ...]:
        """Index, factor, turns, matrix and shift."""
        return self.index, self.factor, self.turns, self.matrix, self.shift

    @property
    def chained(self) -> bool:
        """True where it moves nothing but the neurons of a chain."""
        return all(axis[0] == "h" for part in self.parts for axis in part)

    def rows(self, positions: Tensor | slice) -> Element:
        """The elements of some networks; a repeated position repeats an element."""
        return self._each(lambda x: x[positions])

    def to(self, device: torch.device | str) -> Element:
        """The same element on another device."""
        return self._each(lambda x: x.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Element:
        return Element(*({k: change(v) for k, v in part.items()} for part in self.parts))


def identity(space: WeightSpace, batch: int, device: torch.device | str = "cpu") -> Element:
    """The element that changes nothing."""
    index = {
        h: torch.arange(n, device=device).expand(batch, n).clone() for h, n in space.hidden.items()
    }
    factor = {
        h: torch.ones(batch, n, dtype=torch.float64, device=device) for h, n in space.hidden.items()
    }
    return Element(index, factor)


def assemble(
    space: WeightSpace, batch: int, parts: Mapping[str, Part], device: torch.device | str
) -> Element:
    """An element from what was drawn on each hidden axis."""
    plain = identity(space, batch, device)
    index = {h: p.index if p.index is not None else plain.index[h] for h, p in parts.items()}
    factor = {h: p.factor if p.factor is not None else plain.factor[h] for h, p in parts.items()}
    turns = {h: p.turns for h, p in parts.items() if p.turns is not None}
    return Element(index, factor, turns)


def compose(g: Element, h: Element) -> Element:
    """`g` after `h`: act(compose(g, h), w) is act(g, act(h, w)).

    Half turns and signs do not commute (an infinite dihedral group a neuron): t = t_g + d_g * t_h.
    """
    index = {a: h.index[a].gather(1, g.index[a]) for a in g.index}
    factor = {a: g.factor[a] * h.factor[a].gather(1, g.index[a]) for a in g.index}
    turns = {}
    for a in {**g.turns, **h.turns}:
        turned = torch.zeros_like(g.index[a])
        if a in h.turns:
            turned = h.turns[a].gather(1, g.index[a]) * g.factor[a].sign().long()
        turns[a] = turned + g.turns[a] if a in g.turns else turned
    return Element(index, factor, turns)


def inverse(g: Element) -> Element:
    """The element that undoes `g`."""
    index = {a: p.argsort(dim=1) for a, p in g.index.items()}
    factor = {a: 1 / g.factor[a].gather(1, p) for a, p in index.items()}
    turns = {a: -factor[a].sign().long() * t.gather(1, index[a]) for a, t in g.turns.items()}
    return Element(index, factor, turns)


def act(g: Element, space: WeightSpace, w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The networks `w` moved along their orbit by `g`, one element a network.

    Products are formed in each tensor's own dtype, or in float64 where it cannot hold the factors.
    Raises
    InputError where `g` is not an element for this batch of this space: nothing is broadcast.
    """
    space.check(w)
    _check(g, space, len(w[space.tensors[0].name]))
    if not g.index:
        return {t.name: w[t.name] for t in space.tensors}
    g = g.to(w[space.tensors[0].name].device)
    shift = math.pi / layered_of(space, "this element").forward.w0
    return {t.name: _moved(g, t, w[t.name], shift) for t in space.tensors}


def _check(g: Element, space: WeightSpace, batch: int) -> None:
    if set(g.index) != set(space.hidden):
        raise InputError(
            f"the group element acts on the axes {sorted(g.index)}, "
            f"the weight space has {sorted(space.hidden)}"
        )
    if g.matrix or g.shift:
        raise InputError("the group element is one of transformers; these networks have no heads")
    for part in (g.index, g.factor, g.turns):
        for axis, value in part.items():
            if tuple(value.shape) != (batch, space.hidden[axis]):
                raise InputError(
                    f"the group element has shape {tuple(value.shape)} on axis {axis}, "
                    f"the networks need {(batch, space.hidden[axis])}"
                )


def _moved(g: Element, t: NamedTensor, x: Tensor, shift: float) -> Tensor:
    """One tensor: gathered on all hidden axes at once, scaled, and shifted if it is a bias."""
    moving = [i for i, axis in enumerate(t.axes) if axis.name in g.index]
    if not moving:
        return x
    moved = _gathered(g, t, x, moving[-1] + 1)
    factors = [_placed(_factor(g, t.axes[i]), i, len(t.axes)) for i in moving]
    if not all(bool((d == 1).all()) for d in factors):
        moved = _times(moved, factors)
    if len(t.axes) == 1 and t.axes[0].name in g.turns:
        moved = moved + shift * g.turns[t.axes[0].name].double()
    return moved.to(x.dtype).reshape(x.shape)


def _factor(g: Element, axis: Axis) -> Tensor:
    """(b, n): what the axis multiplies by; the dual one divides, and half turns change its sign."""
    d = g.factor[axis.name]
    if not axis.dual:
        return d
    return 1 / d if axis.name not in g.turns else (1 - 2 * (g.turns[axis.name] % 2)) / d


def _times(x: Tensor, factors: list[Tensor]) -> Tensor:
    """x times all factors, in the memory of x where its dtype holds them, else in float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)  # half precision holds few scales
    limits = torch.finfo(dtype)
    sizes = [d.abs() for d in factors if d.numel()]
    smallest = math.prod(min(1.0, float(size.min())) for size in sizes)
    largest = math.prod(max(1.0, float(size.max())) for size in sizes)
    if not (limits.tiny <= smallest and largest <= limits.max):
        dtype = torch.float64
    scale = math.prod((d.to(dtype) for d in factors[1:]), start=factors[0].to(dtype))
    return x.to(dtype).mul_(scale)  # x is a copy, made by _gathered


def _gathered(g: Element, t: NamedTensor, x: Tensor, depth: int) -> Tensor:
    """x as (b, *axes), hidden axes reordered; axes from `depth` on are copied in whole blocks."""
    sizes = [axis.size for axis in t.axes[:depth]]
    batch = len(x)
    at = torch.arange(batch, device=x.device).reshape(batch, *([1] * depth)) * math.prod(sizes)
    for i, axis in enumerate(t.axes[:depth]):
        index = g.index.get(axis.name)
        if index is None:
            index = torch.arange(axis.size, device=x.device)[None]
        at = at + _placed(index, i, depth) * math.prod(sizes[i + 1 :])
    blocks = x.reshape(batch * math.prod(sizes), -1)
    if blocks.shape[1] == 1:  # a row of one number costs three times the number itself
        blocks = blocks[:, 0]
    return blocks.index_select(0, at.reshape(-1)).reshape(batch, *t.unfolded)


def _placed(x: Tensor, i: int, axes: int) -> Tensor:
    """(b, n) -> (b, 1, .., n, .., 1) with n at axis i of `axes`."""
    return x.reshape(len(x), *([1] * i), x.shape[1], *([1] * (axes - i - 1)))
