"""Balanced representatives, computed once and kept beside an index.

    OUT/balanced/<arch>-<activation>/shard-00000.safetensors
        uid [n] int64, sorted      sha256 [n, 32] uint8      weights [n, D] float32

A representative is handed out only where the sha256 of the network that it was made from is that of
the index: what a changed index says no more is computed again, and never another network's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qemcli.errors import InputError
from qemcli.formats import safetensors
from qemcli.groups import allowed
from qemcli.writing import beside

if TYPE_CHECKING:
    import pandas

    from qemcli.zoos.zoo import Zoo

FOLDER = "balanced"
SHARD = 16_384  # networks a file
CHUNK = 1024  # networks balanced at a time


def keep(zoo: Zoo, folder: Path, advance: Callable[[int], None] = lambda n: None) -> int:
    """Balance every network of the zoo whose activation is known to have scales or signs, and write
    it below `folder`; shards that are there already are not made again. Returns how many lie there.
    """
    count = 0
    for space, positions in zoo.groups():
        if allowed("scale", space) is not None and allowed("sign", space) is not None:
            advance(len(positions))
            continue
        for i, start in enumerate(range(0, len(positions), SHARD)):
            at = positions[start : start + SHARD]
            file = _group(folder, zoo.index.iloc[at[0]]) / f"shard-{i:05d}.safetensors"
            uid, digest = _identity(zoo.index.iloc[at])
            if not (file.is_file() and _same(file, uid, digest)):
                _write(zoo, at, file)
            count += len(at)
            advance(len(at))
    return count


def read(folder: Path, table: pandas.DataFrame) -> np.ndarray | None:
    """(n, D) float32, the representatives of rows of one architecture and activation of an index;
    None unless all of them are kept."""
    if not len(table) or not {"uid", "sha256"} <= set(table.columns):
        return None
    uid, digest = _identity(table)
    files = sorted(_group(folder, table.iloc[0]).glob("shard-*.safetensors"))
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for file in files:
        if not _whole(file):
            return None
        kept = _slot(file, "uid", file.stat().st_mtime_ns)
        place = np.searchsorted(kept, uid)
        here = np.flatnonzero(kept[np.minimum(place, len(kept) - 1)] == uid)
        if len(here):
            digests, weights = (
                _slot(file, n, file.stat().st_mtime_ns) for n in ("sha256", "weights")
            )
            if not (digests[place[here]] == digest[here]).all():
                return None
            found.append((here, weights[place[here]]))
    if sum(len(here) for here, _ in found) != len(table):
        return None
    out = np.empty((len(table), found[0][1].shape[1]), np.float32)
    for here, weights in found:
        out[here] = weights
    return out


def _group(folder: Path, row: pandas.Series) -> Path:
    return folder / f"{row['arch']}-{row.get('activation')}"


def _identity(table: pandas.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """uid (n,) and the sha256 of the weights as bytes (n, 32)."""
    digest = np.frombuffer(bytes.fromhex("".join(table["sha256"])), np.uint8)
    return table["uid"].to_numpy(dtype=np.int64), digest.reshape(-1, 32)


def _write(zoo: Zoo, positions: np.ndarray, file: Path) -> None:
    from safetensors.numpy import save_file

    from qemcli.attention_balance import representative

    parts = []
    good: list[np.ndarray] = []
    for start in range(0, len(positions), CHUNK):
        for space, flat, read_ in zoo.load(positions[start : start + CHUNK]):
            parts.append(space.flatten(representative(space, space.unflatten(flat))).numpy())
            good.append(read_)
    at = np.concatenate(good)
    uid, digest = _identity(zoo.index.iloc[at])
    order = np.argsort(uid)
    tensors = {"uid": uid, "sha256": digest, "weights": np.concatenate(parts)}
    tensors = {name: np.ascontiguousarray(x[order]) for name, x in tensors.items()}
    beside(file, lambda path: save_file(tensors, path, metadata={"qem.space": space.to_json()}))


def _whole(file: Path) -> bool:
    """False for a shard that is cut or damaged: it holds nothing that cannot be computed again."""
    try:
        return {"uid", "sha256", "weights"} <= set(safetensors.read_header(file).slots)
    except InputError:
        return False


def _same(file: Path, uid: np.ndarray, digest: np.ndarray) -> bool:
    """True where the shard was made from these very networks."""
    if not _whole(file):
        return False
    order, stamp = np.argsort(uid), file.stat().st_mtime_ns
    kept = (_slot(file, "uid", stamp), _slot(file, "sha256", stamp))
    return np.array_equal(kept[0], uid[order]) and np.array_equal(kept[1], digest[order])


@lru_cache(maxsize=256)
def _slot(file: Path, name: str, stamp: int) -> np.ndarray:
    """One tensor of a shard, memory-mapped; `stamp` is its time: a new file is read anew."""
    slot = safetensors.read_header(file).slots[name]
    kinds = {"float32": "<f4", "int64": "<i8", "uint8": "u1"}
    return np.memmap(file, kinds[slot.dtype], "r", slot.begin, slot.shape)
