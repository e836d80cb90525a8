"""The layers of a state dict in order: which bias belongs to which weight, and which layer reads
what another one writes, from names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from qemcli.errors import InputError, UnsupportedError

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


def unsupported(name: str, reason: str) -> UnsupportedError:
    """The refusal of a tensor whose layer qem does not act on."""
    return UnsupportedError(
        f"tensor '{name}': {reason}; qem acts on chains of dense and convolutional layers",
        "give a plain MLP, CNN (global pooling or flatten) or SIREN",
    )


def _prefix(name: str) -> str:
    return name[: max(name.rfind("."), name.rfind("/"), 0)]


def _stem(name: str) -> str:
    """The name with what says weight or bias taken out: equal for the two tensors of a layer."""
    tail = name[len(_prefix(name)) :]
    word = r"(?<![a-z])(weights?|bias(es)?|kernel|w|b)(?![a-z])"
    return _prefix(name) + re.sub(word, "", tail, flags=re.IGNORECASE)


def paired(shapes: Shapes) -> dict[str, str | None]:
    """Weight -> bias, or None for a layer without; raises InputError where it cannot be told."""
    weights = [n for n, s in shapes.items() if len(s) > 1]
    biases = [n for n, s in shapes.items() if len(s) == 1]
    if not weights:
        raise InputError("it holds no weight of two or four dimensions")
    found: dict[str, str | None] = dict.fromkeys(weights)
    for key in (_stem, _prefix):
        _pair_by_name(shapes, found, biases, key)
    taken = set(found.values())
    left = [n for n in biases if n not in taken]
    if left:
        _pair_by_size(shapes, found, left)
    return found


def _grouped(names: Iterable[str], key: Callable[[str], Any]) -> dict[Any, list[str]]:
    groups: dict[Any, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return groups


def _pair_by_name(
    shapes: Shapes, found: dict[str, str | None], biases: list[str], key: Callable[[str], str]
) -> None:
    """Pair what alone has its key and size."""
    taken = set(found.values())
    left = _grouped((n for n in biases if n not in taken), lambda n: (key(n), shapes[n][0]))
    for alike, weights in _grouped((w for w, b in found.items() if b is None), key).items():
        fits = left.get((alike, shapes[weights[0]][0]), [])
        if len(fits) == 1 and len(weights) == 1:
            found[weights[0]] = fits[0]


def _pair_by_size(shapes: Shapes, found: dict[str, str | None], left: list[str]) -> None:
    open_weights = _grouped((w for w, b in found.items() if b is None), lambda w: shapes[w][0])
    for size, rivals in _grouped(left, lambda b: shapes[b][0]).items():
        fits, bias = open_weights.get(size, []), rivals[0]
        if not fits:
            raise InputError(f"tensor '{bias}' {shapes[bias]} is the bias of no layer")
        # As many biases as layers of that size: they belong together in their natural order.
        if len(fits) != len(rivals):
            raise InputError(
                f"tensor '{bias}' {shapes[bias]}: of which layer it is the bias cannot be told "
                f"({', '.join(fits)})",
                "name weight and bias of a layer alike, e.g. 0.weight and 0.bias",
            )
        pairs = zip(sorted(fits, key=_natural), sorted(rivals, key=_natural), strict=True)
        found.update(pairs)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key under which layer2 comes before layer10."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts if p]


def _follows(shapes: Shapes, first: str, then: str) -> bool:
    """True where layer `then` can read what layer `first` writes."""
    a, b = shapes[first], shapes[then]
    if len(a) == 4 and len(b) == 2:
        return b[1] % a[0] == 0
    return len(a) == len(b) and a[0] == b[1]


def _chains(shapes: Shapes, order: Sequence[str]) -> bool:
    return all(_follows(shapes, a, b) for a, b in pairwise(order))


def in_order(shapes: Shapes, ordered: bool) -> list[str]:
    """The weights from input to output; InputError where no order or more than one is possible."""
    given = sorted(shapes, key=lambda n: -len(shapes[n]))  # stable: convolutions first
    natural = sorted(shapes, key=lambda n: (-len(shapes[n]), _natural(n)))
    numbered = all(
        len({re.sub(r"\d+", "#", n) for n in shapes if len(shapes[n]) == dims}) <= 1
        for dims in (2, 4)
    )
    if numbered and _chains(shapes, natural):
        return natural
    if ordered and _chains(shapes, given):
        return given
    found = list(_search(shapes))
    if len(found) == 1:
        return found[0]
    if not found:
        raise _no_chain(shapes, natural)
    raise InputError(
        f"the order of its layers is ambiguous: both {' > '.join(found[0])} and "
        f"{' > '.join(found[1])} fit",
        "number the layers in their names, or save with torch.save, which keeps their order",
    )


def _hopeless(shapes: Shapes) -> bool:
    """True where two layers can only be the first, or two only the last: no need to search."""
    alike = _grouped(shapes, lambda n: shapes[n])
    first, last = set(), set()
    for shape, names in alike.items():
        others = [m[0] for s, m in alike.items() if s != shape]
        others += names[1:2]  # of layers of one shape only another one counts
        if not any(_follows(shapes, m, names[0]) for m in others):
            first |= set(names)
        if not any(_follows(shapes, names[0], m) for m in others):
            last |= set(names)
    alone = bool(first & last) and len(shapes) > 1
    return alone or len(first) > 1 or len(last) > 1


def _search(shapes: Shapes, budget: int = 5_000) -> Iterator[list[str]]:
    """At most two chains through all layers, depth first; nothing where the budget runs out."""
    if _hopeless(shapes):
        return
    names = sorted(shapes, key=_natural, reverse=True)[::-1]
    most = [n for n in names if len(shapes[n]) == 4]
    readers: dict[Shape, list[str]] = {}  # of what a layer of this shape writes
    path: list[str] = []
    used: set[str] = set()
    levels, found = [iter(names)], 0
    while levels and found < 2 and budget:
        dims = 4 if len(path) < len(most) else 2  # all convolutions stand before the dense layers
        name = next((n for n in levels[-1] if n not in used and len(shapes[n]) == dims), None)
        if name is None:
            levels.pop()
            used -= set(path[-1:])
            path[-1:] = []
            continue
        budget -= 1
        path.append(name)
        used.add(name)
        if len(path) == len(shapes):
            found += 1
            yield list(path)
        shape = shapes[name]
        if shape not in readers:
            readers[shape] = [n for n in names if _follows(shapes, name, n)]
        levels.append(iter(readers[shape]))


def _no_chain(shapes: Shapes, order: Sequence[str]) -> InputError:
    """Why the layers do not follow one another, as well as it can be told."""
    for first, then in pairwise(order):
        a, b = shapes[first], shapes[then]
        if _follows(shapes, first, then):
            continue
        if len(a) == len(b) == 4 and a[0] % b[1] == 0:
            kind = "depthwise" if b[1] == 1 else f"grouped ({a[0] // b[1]} groups)"
            return unsupported(then, f"a {kind} convolution, if it follows '{first}'")
        return InputError(
            f"its layers are no chain: tensor '{then}' {b} does not read what '{first}' {a} writes",
            "branches and additions are not supported; a chain of layers is",
        )
    return InputError("its layers are no chain")
