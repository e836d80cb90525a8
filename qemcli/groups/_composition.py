"""Elements of transformers one after the other, and undone.

What `g` finds on an axis stands in the order of the element before it: `_seen` reorders that. A
group of heads takes its query heads, matrices and shifts along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import overload

import torch
from torch import Tensor

from qemcli.groups._blocks import in_stream, is_stream, taken
from qemcli.groups._element import Element


def compose(g: Element, h: Element) -> Element:
    """`g` after `h`; orthogonal elements compose up to the folding of gains, which is done once."""
    index = {a: _reordered(g, h.index.get(a), a) for a in {**h.index, **g.index}}
    factor = {
        a: _both(_seen(g, h.factor.get(a), a), g.factor.get(a), torch.mul)
        for a in {**h.factor, **g.factor}
        if not (is_stream(a) and (a in g.matrix or a in h.matrix))
    }
    matrix = {a: _multiplied(g, h, a) for a in {**h.matrix, **g.matrix}}
    for a in [a for a in matrix if is_stream(a)]:
        index.pop(a, None)
    return Element(index, factor, {}, matrix, _shifted(g, h))


def inverse(g: Element) -> Element:
    """The element that undoes `g` (and leaves folded gains where they are)."""
    index = {a: p.argsort(dim=-1) for a, p in g.index.items() if a[0] != "q"}
    back = {a: _undone_heads(g, index, a) for a in g.index if a[0] == "q"}
    undo = Element(index | back, {}, {}, {}, {})
    factor = {a: _seen(undo, d, a).reciprocal() for a, d in g.factor.items()}
    matrix = {a: torch.linalg.inv(_seen(undo, m, a)) for a, m in g.matrix.items()}
    undone = replace(undo, factor=factor, matrix=matrix)
    found = compose(undone, g).shift  # what is left to take away
    return replace(undone, shift={a: -c for a, c in found.items()})


@overload
def _seen(g: Element, x: Tensor, axis: str) -> Tensor: ...
@overload
def _seen(g: Element, x: None, axis: str) -> None: ...
@overload
def _seen(g: Element, x: Tensor | None, axis: str) -> Tensor | None: ...
def _seen(g: Element, x: Tensor | None, axis: str) -> Tensor | None:
    """What an element has on the axis, in the order that `g` gives it (heads: that of groups)."""
    by = f"k{axis[1:]}" if axis[0] in "kdeq" else axis
    return x if x is None or by not in g.index else taken(x, 1, g.index[by])


def _both(x: Tensor | None, y: Tensor | None, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """join(x, y), or the one that is there."""
    if x is not None and y is not None:
        return join(x, y)
    one = x if x is not None else y
    assert one is not None  # compose asks for axes that one of the two has
    return one


def _reordered(g: Element, p: Tensor | None, axis: str) -> Tensor:
    if axis[0] == "q":
        return _both(_seen(g, p, axis), g.index.get(axis), lambda x, q: x.gather(2, q))
    return _both(_seen(g, p, axis), g.index.get(axis), lambda x, _: x)


def _undone_heads(g: Element, index: Mapping[str, Tensor], axis: str) -> Tensor:
    back = g.index[axis].argsort(dim=2)
    groups = index.get(f"k{axis[1:]}")
    return back if groups is None else taken(back, 1, groups)


def _multiplied(g: Element, h: Element, axis: str) -> Tensor:
    if is_stream(axis):
        return _both(_orthogonal(h, axis), _orthogonal(g, axis), torch.matmul)
    return _both(_seen(g, h.matrix.get(axis), axis), g.matrix.get(axis), torch.matmul)


def _orthogonal(g: Element, axis: str) -> Tensor | None:
    """What `g` does to the stream, as a matrix: x R; None where it leaves it alone."""
    some = g.index.get(axis, g.factor.get(axis))
    if some is None or axis in g.matrix:
        return g.matrix.get(axis)
    n = some.shape[1]
    eye = torch.eye(n, dtype=torch.float64, device=some.device).expand(len(some), n, n)
    moved = taken(eye, 2, g.index[axis]) if axis in g.index else eye
    return in_stream(g, axis, moved, 2)


def _shifted(g: Element, h: Element) -> dict[str, Tensor]:
    """The shifts of `h` seen through `g`, and those of `g`."""
    found = {}
    for axis in {**h.shift, **g.shift}:
        seen, m = _seen(g, h.shift.get(axis), axis), g.matrix.get(axis)
        if seen is not None and m is not None:
            by = torch.linalg.inv(m).mT if axis[0] == "d" else m
            seen = torch.einsum("bke,bkec->bkc", seen, by)
        found[axis] = _both(seen, g.shift.get(axis), torch.add)
    return found
