"""A zoo moved along its orbits, streamed: random exact copies, or one representative of every
network.

Every network that is written is proven on probe inputs: the error of its function is a column of
the index.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from qemcli import __version__, groups
from qemcli.canonical import canonicalise
from qemcli.errors import InputError, UnsupportedError
from qemcli.functions import probe_inputs, respond, runs
from qemcli.spaces import WeightSpace, layered_of
from qemcli.testing import relative_error
from qemcli.zoos.store import OWN_COLUMNS, Store

if TYPE_CHECKING:
    import pandas

    from qemcli.zoos.zoo import Zoo

CHUNK = 512  # networks moved at a time; part of the seed's meaning, so not an option
PROBES = 4  # random inputs: two functions that are not the same differ on every one
Weights = dict[str, Tensor]
Columns = dict[str, Any]


class Move(Protocol):
    """A way along the orbit: `refusal` where it is none, `__call__` moves a chunk of networks."""

    @property
    def name(self) -> str:
        """What the copies are called after."""

    @property
    def factor(self) -> int:
        """How many are made of each network."""

    def refusal(self, space: WeightSpace) -> str | None:
        """Why these networks cannot be moved, or None."""

    def __call__(self, space: WeightSpace, w: Weights, block: int) -> tuple[Weights, Columns]:
        """(moved networks in float64, columns for the index)."""


@dataclass(frozen=True)
class Augment:
    """Random elements of a group: `factor` copies of every network, scales LO:HI.

    Scales are uniform where LO >= 1, as the papers' U[1, 10^i], and log-uniform around 1.
    """

    group: str = "monomial"
    factor: int = 1
    scales: tuple[float, float] = (0.1, 10.0)
    seed: int = 0

    @property
    def name(self) -> str:
        return self.group

    def refusal(self, space: WeightSpace) -> str | None:
        reason = groups.allowed(self.group, space)
        return f"group '{self.group}': {reason}" if reason else None

    def __call__(self, space: WeightSpace, w: Weights, block: int) -> tuple[Weights, Columns]:
        generator = torch.Generator().manual_seed((self.seed << 24) + block)
        count = len(w[space.names[0]])
        g = groups.sample(self.group, space, count, generator, scale_range=self.scales)
        low, high = self.scales
        told = {"group": self.group, "seed": self.seed, "scale_low": low, "scale_high": high}
        return groups.act(g, space, w), {f"augment.{k}": v for k, v in told.items()}


@dataclass(frozen=True)
class Canonicalise:
    """The one representative of every orbit: balanced, signs and phases chosen, neurons in
    order."""

    name: str = field(default="canonical", init=False)
    factor: int = field(default=1, init=False)

    def refusal(self, space: WeightSpace) -> str | None:
        try:
            layered_of(space, "a canonical form")
        except UnsupportedError as why:
            return why.message
        return None

    def __call__(self, space: WeightSpace, w: Weights, block: int) -> tuple[Weights, Columns]:
        moved, _, ties = canonicalise(layered_of(space, "a canonical form"), w)
        return moved, {"canonical.ties": ties.numpy()}


def rewrite(
    zoo: Zoo,
    move: Move,
    folder: Path,
    resume: bool = False,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Write the moved networks as a zoo of our layout; returns (summary rows, failures).

    `function_error` is that of the network as it is stored in float32, `function_error_float64`
    that
    of the same move before rounding; both relative, measured in float64 on probe inputs; NaN where
    the activation is not known. Raises UnsupportedError where the move suits none of the networks.
    """
    store = Store(folder, resume, {"source": str(zoo.path.resolve()), "move": repr(move)})
    with store.alone():
        block, failed = _written(zoo, move, store, advance)
        return _finished(store, zoo, move, block), [*failed, *zoo.failures]


def _written(
    zoo: Zoo, move: Move, store: Store, advance: Callable[[int], None]
) -> tuple[int, list[dict[str, Any]]]:
    """Write the blocks that are not there yet; how many there are, and what was left out."""
    failed: list[dict[str, Any]] = []
    refused: str | None = None
    block = 0
    for space, flat, positions in zoo.batches(CHUNK):
        table = zoo.index.iloc[positions]
        if reason := move.refusal(space):
            refused = reason
            failed += [{"checkpoint": n, "reason": reason} for n in table["checkpoint"]]
            continue
        good = flat.isfinite().all(dim=1).numpy()
        bad = table["checkpoint"].to_numpy()[~good]
        failed += [{"checkpoint": n, "reason": "weights that are not finite"} for n in bad]
        for copy in range(move.factor if good.any() else 0):
            if not store.done(block):
                w = space.unflatten(flat[torch.from_numpy(good)].double())
                stored, columns = _moved(space, w, move, block)
                store.write(block, space, stored, _rows(table[good], move, copy, columns))
            block += 1
            advance(int(good.sum()))
    if not block:
        why = f": {failed[0]['reason']}" if failed else ""
        nothing = InputError(f"{zoo.path}: nothing to move{why}")
        raise UnsupportedError(refused) if refused else nothing
    return block, failed


def _moved(space: WeightSpace, w: Weights, move: Move, block: int) -> tuple[np.ndarray, Columns]:
    """(networks (n, D) float32, index columns with both errors) of one chunk."""
    exact, columns = move(space, w, block)
    stored = space.flatten(exact).float()
    names = ("function_error", "function_error_float64")
    if not runs(space):  # of an unknown activation, where a permutation is exact as such
        return stored.numpy(), columns | dict.fromkeys(names, np.nan)
    x = probe_inputs(space, PROBES, torch.Generator().manual_seed(block), torch.float64)
    before = respond(space, w, x)
    pair = (space.unflatten(stored.double()), exact)
    errors = {
        name: relative_error(before, respond(space, moved, x)).numpy()
        for name, moved in zip(names, pair, strict=True)
    }
    return stored.numpy(), columns | errors


def _rows(table: pandas.DataFrame, move: Move, copy: int, columns: Columns) -> pandas.DataFrame:
    """The index rows: labels and provenance carried over, what was done added."""
    kept = [c for c in table.columns if c not in OWN_COLUMNS and not c.startswith("stat.")]
    rows = table[kept].reset_index(drop=True)
    names = rows["checkpoint"].astype(str)
    identity = {"checkpoint": names + f"/{move.name}-{copy}", "source": names}
    return rows.assign(**identity, **columns)


def _finished(store: Store, zoo: Zoo, move: Move, blocks: int) -> list[dict[str, Any]]:
    provenance = {"qem": __version__, "source": zoo.name, "move": repr(move)}
    about = {"name": f"{zoo.name}-{move.name}", "licence": zoo.record.get("licence")}
    table = store.finish(blocks, {**about, "provenance": provenance})
    found = []
    for (arch, activation), part in table.groupby(["arch", "activation"], dropna=False):
        errors = {
            f"{name}_{how}": float(getattr(part[name], how)())
            for name in ("function_error", "function_error_float64")
            for how in ("max", "median")
        }
        kind = {"arch": arch, "activation": activation if isinstance(activation, str) else None}
        found.append({**kind, "move": move.name, "networks": len(part), **errors})
    return found


def worst(rows: list[dict[str, Any]]) -> float:
    """The largest function error as stored, NaN where no function could be run."""
    values = [row["function_error_max"] for row in rows]
    return float(np.nanmax(values)) if np.isfinite(values).any() else float("nan")
