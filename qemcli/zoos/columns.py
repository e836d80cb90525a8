"""Columns of an array in another order, moved as strided blocks: a transposed kernel is one copy
and not a gather of its numbers one by one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ROWS = 256  # at a time: what they hold stays in the cache
MANY = 64  # blocks; more than these are gathered faster


@dataclass(frozen=True)
class Block:
    """Columns `start` + sum of index times stride, the last index fastest."""

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))


def blocks(order: np.ndarray) -> list[Block]:
    """The (D,) columns as blocks that are `order`, read one after the other; none where it takes
    more than MANY."""
    found: list[Block] = []
    at = 0
    while at < len(order):
        if len(found) == MANY:
            return []
        shape: list[int] = []
        strides: list[int] = []
        size = 1
        while (count := _repeats(order[at:], size)) > 1:
            shape.insert(0, count)
            strides.insert(0, int(order[at + size] - order[at]))
            size *= count
        found.append(Block(int(order[at]), tuple(shape) or (1,), tuple(strides) or (0,)))
        at += size
    return found


def _repeats(rest: np.ndarray, size: int) -> int:
    """How many groups of `size` stand in a row, each the one before it plus the same step."""
    count = len(rest) // size
    if count < 2:
        return 1
    groups = rest[: count * size].reshape(count, size)
    step = groups[1, 0] - groups[0, 0]
    same = (groups[1:] - groups[:-1] == step).all(axis=1)
    return count if same.all() else int(np.argmin(same)) + 1


def taken(rows: np.ndarray, parts: list[Block]) -> np.ndarray:
    """(n, D) rows of any float dtype -> (n, D') float32 with the columns of the blocks."""
    out = np.empty((len(rows), sum(b.size for b in parts)), np.float32)
    item = rows.strides[1] if rows.ndim == 2 else 0
    for start in range(0, len(rows), ROWS):
        some, into, at = rows[start : start + ROWS], out[start : start + ROWS], 0
        for b in parts:
            steps = (some.strides[0], *(s * item for s in b.strides))
            view = np.lib.stride_tricks.as_strided(
                some[:, b.start :], (len(some), *b.shape), steps, writeable=False
            )
            into[:, at : at + b.size].reshape(view.shape)[...] = view
            at += b.size
    return out
