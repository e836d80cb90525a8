"""What the weights of a network look like, tensor by tensor, for a whole batch at once."""

from __future__ import annotations

import hashlib

import numpy as np

from qemcli.spaces import Layered, Opaque, WeightSpace

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
ROWS, BYTES = 128, 4 << 20  # of one computation
MANY = 1024  # numbers; a row of as many is sorted no further than its quantiles
NAMES = ("mean", "var", "q0", "q25", "q50", "q75", "q100")


def describe(space: WeightSpace, flat: np.ndarray) -> dict[str, np.ndarray]:
    """(n, D) float32 rows -> column -> (n,) values: `finite`, `sha256`, `ties` and
    `stat.<tensor>.<name>`, or `stat.all.<name>` where the tensors have no place in a network.

    `var` is the biased variance; quantiles are interpolated linearly. Where a tensor has values
    that are not finite, its statistics are those of the finite part, NaN where there is none. A row
    has the same values whatever rows are beside it.
    """
    flat = np.ascontiguousarray(flat, dtype=np.float32)
    step = fitting(flat.shape[1])
    blocks = [_block(space, flat[i : i + step]) for i in range(0, max(len(flat), 1), step)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def fitting(width: int) -> int:
    """How many rows of `width` numbers are one computation: more do not fit a core's cache."""
    return max(1, min(ROWS, BYTES // (4 * max(width, 1))))


def _block(space: WeightSpace, flat: np.ndarray) -> dict[str, np.ndarray]:
    finite = np.isfinite(flat).all(axis=1)
    columns: dict[str, np.ndarray] = {"finite": finite, "sha256": digests(flat)}
    columns["ties"] = ties(space, flat)
    at = 0
    parts = [(tensor.name, tensor.size) for tensor in space.tensors]
    for tensor, size in [("all", space.size)] if isinstance(space, Opaque) else parts:
        part = flat[:, at : at + size]
        at += size
        values = np.empty((len(NAMES), len(flat)), np.float32)
        values[:, finite] = _moments(part if finite.all() else part[finite])
        for i in np.flatnonzero(~finite):
            row = part[i][np.isfinite(part[i])]
            values[:, i] = _moments(row[None])[:, 0] if row.size else np.nan
        for name, column in zip(NAMES, values, strict=True):
            columns[f"stat.{tensor}.{name}"] = column
    return columns


def ties(space: WeightSpace, flat: np.ndarray) -> np.ndarray:
    """(n, D) -> (n,) int32: hidden neurons that share their bias with another of the same layer.

    Zero is general position: then an order by biases is one representative of a permutation orbit.
    Counted in networks of affine layers only: elsewhere it is 0.
    """
    count = np.zeros(len(flat), dtype=np.int32)
    if not isinstance(space, Layered):
        return count
    hidden = {layer.bias for layer in space.layers[:-1] if layer.bias}
    at = 0
    for tensor in space.tensors:
        if tensor.name in hidden and tensor.size > 1:
            ranked = np.sort(flat[:, at : at + tensor.size], axis=1)
            count += (ranked[:, 1:] == ranked[:, :-1]).sum(axis=1, dtype=np.int32)
        at += tensor.size
    return count


def digests(flat: np.ndarray) -> np.ndarray:
    """(n, D) float32 -> (n,) sha256 in hex of each row's little-endian bytes."""
    rows = np.ascontiguousarray(flat, dtype="<f4")
    return np.array([hashlib.sha256(row).hexdigest() for row in rows], dtype=object)


def _moments(part: np.ndarray) -> np.ndarray:
    """(n, size) finite values -> (7, n): mean, variance and quantiles of each row."""
    out = np.empty((len(NAMES), len(part)))
    if not len(part):
        return out
    own = part.copy()  # put in order, then centred: the one place where temporary rows lie
    out[2:] = _quantiles(own)
    with np.errstate(over="ignore", invalid="ignore"):
        mean = part.mean(axis=1, keepdims=True)
        np.subtract(part, mean, out=own)
        np.square(own, out=own)
        out[0], out[1] = mean[:, 0], own.mean(axis=1)
    return out


def _quantiles(rows: np.ndarray) -> np.ndarray:
    """(n, size) -> (5, n) float64, interpolated linearly; the rows are reordered in place."""
    places = [q * (rows.shape[1] - 1) for q in QUANTILES[1:-1]]
    a, b, c = map(int, places)
    if rows.shape[1] < MANY:
        rows.sort(axis=1)  # with SIMD
    else:
        rows.partition(b, axis=1)
        rows[:, :b].partition(a, axis=1)
        rows[:, b + 1 :].partition(c - b - 1, axis=1)
    found = [rows[:, : a + 1].min(axis=1)]
    for place, low, then in zip(places, (a, b, c), (b, c, rows.shape[1] - 1), strict=True):
        at = rows[:, low].astype(np.float64)
        above = rows[
            :, low + 1 : max(low + 1, then) + 1
        ]  # the smallest of them is the next in order
        rest = above.min(axis=1) if above.shape[1] else at
        found.append(at + (place - low) * (rest - at))
    return np.stack([*found, rows[:, c:].max(axis=1)])
