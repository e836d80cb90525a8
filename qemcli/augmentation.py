"""Exact copies of a zoo under random group elements, streamed, each proven on probe inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qemcli import __version__, groups
from qemcli.errors import InputError, UnsupportedError
from qemcli.functions import probe_inputs
from qemcli.spaces import WeightSpace
from qemcli.testing import function_error
from qemcli.zoos.store import OWN_COLUMNS, Store

if TYPE_CHECKING:
    import pandas

    from qemcli.zoos.zoo import Zoo

CHUNK = 512  # networks moved at a time; part of the seed's meaning, so not an option
PROBES = 8


@dataclass(frozen=True)
class Plan:
    """group; factor copies of every network; scales LO:HI (uniform where LO >= 1, as the papers'
    U[1, 10^i])."""

    group: str = "monomial"
    factor: int = 1
    scales: tuple[float, float] = (0.1, 10.0)
    seed: int = 0


def augment(
    zoo: Zoo,
    plan: Plan,
    folder: Path,
    resume: bool = False,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Write the copies as a zoo of our layout; returns (summary rows, failures).

    A row's `function_error` is that of the copy as it is stored in float32,
    `function_error_float64`
    that of the same element before rounding; both are relative and measured in float64 on probe
    inputs.
    Raises UnsupportedError with the reason where the group is a symmetry of none of the networks.
    """
    store = Store(folder, resume)
    failed: list[dict[str, Any]] = []
    refused: UnsupportedError | None = None
    block, rows = 0, []
    for space, flat, positions in zoo.batches(CHUNK):
        table = zoo.index.iloc[positions]
        if reason := groups.allowed(plan.group, space):
            refused = UnsupportedError(f"group '{plan.group}': {reason}")
            failed += [{"checkpoint": n, "reason": reason} for n in table["checkpoint"]]
            continue
        good = flat.isfinite().all(dim=1).numpy()
        bad = table["checkpoint"].to_numpy()[~good]
        failed += [{"checkpoint": n, "reason": "weights that are not finite"} for n in bad]
        if not good.any():
            continue
        for copy in range(plan.factor):
            if not store.done(block):
                moved = _moved(space, flat[torch.from_numpy(good)], plan, block)
                store.write(
                    block, space, moved[0].numpy(), _rows(table[good], plan, copy, *moved[1:])
                )
            rows.append(block)
            block += 1
            advance(int(good.sum()))
    if not rows:
        raise refused or InputError(f"{zoo.path}: no network that can be moved")
    failed += list(zoo.failures)
    return _finished(store, zoo, plan, block), failed


def _moved(
    space: WeightSpace, flat: Tensor, plan: Plan, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(copies (n, D) float32, error as stored, error before rounding) of one chunk."""
    generator = torch.Generator().manual_seed((plan.seed << 24) + block)
    element = groups.sample(plan.group, space, len(flat), generator, scale_range=plan.scales)
    w = space.unflatten(flat.double())
    exact = groups.act(element, space, w)
    stored = space.flatten(exact).float()
    if space.activation is None:  # the function cannot be run: permutations are exact as such
        unknown = torch.full((len(flat),), torch.nan)
        return stored, unknown, unknown
    x = probe_inputs(space, PROBES, generator, torch.float64)
    rounded = function_error(space, w, space.unflatten(stored.double()), x)
    return stored, rounded, function_error(space, w, exact, x)


def _rows(
    table: pandas.DataFrame, plan: Plan, copy: int, stored: Tensor, exact: Tensor
) -> pandas.DataFrame:
    """The index rows of the copies: labels and provenance carried over, what was done added."""
    kept = [c for c in table.columns if c not in OWN_COLUMNS and not c.startswith("stat.")]
    rows = table[kept].reset_index(drop=True)
    names = rows["checkpoint"].astype(str)
    return rows.assign(
        checkpoint=names + f"/{plan.group}-{copy}",
        **{
            "augment.source": names,
            "augment.group": plan.group,
            "augment.seed": plan.seed,
            "augment.scale_low": plan.scales[0],
            "augment.scale_high": plan.scales[1],
            "function_error": stored.numpy(),
            "function_error_float64": exact.numpy(),
        },
    )


def _finished(store: Store, zoo: Zoo, plan: Plan, blocks: int) -> list[dict[str, Any]]:
    provenance = {"command": "qem augment", "qem": __version__, "source": str(zoo.path)}
    about = {"name": f"{zoo.name}-{plan.group}", "licence": zoo.record.get("licence")}
    record = {"group": plan.group, "factor": plan.factor, "scales": plan.scales, "seed": plan.seed}
    table = store.finish(blocks, {**about, "augment": record, "provenance": provenance})
    found = []
    for (arch, activation), part in table.groupby(["arch", "activation"], dropna=False):
        errors = {
            f"{name}_{how}": float(getattr(part[name], how)())
            for name in ("function_error", "function_error_float64")
            for how in ("max", "median")
        }
        kind = {"arch": arch, "activation": activation if isinstance(activation, str) else None}
        found.append({**kind, "group": plan.group, "copies": len(part), **errors})
    return found


def worst(rows: list[dict[str, Any]]) -> float:
    """The largest function error as stored, NaN where no function could be run."""
    values = [row["function_error_max"] for row in rows]
    return float(np.nanmax(values)) if np.isfinite(values).any() else float("nan")
