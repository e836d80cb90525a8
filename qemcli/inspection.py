"""What there is to say about a checkpoint: its weight space, its symmetries, what was left out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from qemcli import groups
from qemcli.checkpoints import Checkpoint, open_checkpoint
from qemcli.errors import QemError
from qemcli.recognition import stated
from qemcli.spaces import Chain, Residual, Transformer, WeightSpace
from qemcli.zoos.statistics import digests, ties

SMALL = 0.3  # sd times sqrt(inputs) of hidden weights: a SIREN's .05 to .1, nn.Linear's .58
NARROW = 0.13  # sd of the first layer's weights: about .28 in nfn's zoos, .03 to .07 in dws's


def describe(
    checkpoint: Checkpoint,
    activation: str | None = None,
    w0: float | None = None,
    convention: str | None = None,
    heads: int | None = None,
) -> dict[str, Any]:
    """One record: space, tensors with their axes, groups, activation, parameters, dtype, finite,
    coverage, skipped, ties, and a `hint` where it may be an INR that does not say how it is run.
    Raises InputError where it cannot be understood or read."""
    space = stated(checkpoint.space(activation, heads), w0, convention)
    flat = checkpoint.row(space)[None]
    hint = siren_hint(space, flat)
    refused = {n: groups.allowed(n, space) for n in groups.names() if n != "all"}
    dtypes = sorted({checkpoint.dtype(name) for name in space.names})
    return {
        "checkpoint": str(checkpoint.path),
        "format": checkpoint.format,
        "family": space.family,
        "widths": list(space.widths),
        "activation": space.activation,
        "activation_source": _source(space, activation, w0 is not None),
        **_sums(space),
        **_attention(space),
        "groups": groups.applicable(space),
        "refused": {name: reason for name, reason in refused.items() if reason},
        "parameters": space.size,
        "dtype": ", ".join(dtypes),
        "finite": bool(np.isfinite(flat).all()),
        "coverage": checkpoint.coverage(space),
        "ties": int(ties(space, flat)[0]),
        "sha256": str(digests(flat)[0]),
        "tensors": {
            t.name: {"axes": str(t), "shape": list(t.shape), "dtype": checkpoint.dtype(t.name)}
            for t in space.tensors
        },
        "skipped": [{"tensor": name, "reason": reason} for name, reason in space.skipped],
        "space": json.loads(space.to_json()),
        **({"hint": hint} if hint else {}),
    }


def _sums(space: WeightSpace) -> dict[str, Any]:
    """Which layers (from 1) are added to which, of networks with residual sums."""
    return {"sums": space.sums} if isinstance(space, Residual) else {}


def _attention(space: WeightSpace) -> dict[str, Any]:
    """What there is to say of a transformer alone."""
    if not isinstance(space, Transformer):
        return {}
    groups_, queries, per, values = space.heads[0]
    rotary = space.rotary
    return {
        "blocks": len(space.blocks),
        "heads": groups_ * queries,
        "key_value_heads": groups_,
        "head_sizes": [per, values],
        "norm": f"{space.norm}, {space.placement}",
        "rotary": f"{rotary.pairing}, {rotary.dims} of {per}" if rotary.dims else "none",
        "tied": space.tied,
    }


def _source(space: WeightSpace, activation: str | None, siren: bool) -> str:
    if space.activation is None:
        return "unknown: only permutation is claimed (state it with --activation)"
    if siren and activation is None:
        return "stated by --w0"
    return "stated by --activation" if activation else "known from the checkpoint"


def siren_hint(space: WeightSpace, flat: np.ndarray) -> str | None:
    """What to pass if this is an image INR that does not say how it is run; a guess from the spread
    of its weights, never acted on."""
    if not isinstance(space, Chain):
        return None
    dense = space.family in ("mlp", "siren") and space.activation in (None, "sin")
    image = space.layers[0].cols == 2 and space.layers[-1].rows in (1, 3)
    told = space.family == "siren" and space.forward.known and space.forward.axes
    if not dense or not image or told or not np.isfinite(flat).all():
        return None
    weight = dict(zip(space.names, np.split(flat[0], np.cumsum(_sizes(space))[:-1]), strict=True))
    hidden = [weight[la.weight].std() * la.cols**0.5 for la in space.layers[1:-1]]
    if not hidden or max(hidden) > SMALL:
        return "if it is a SIREN, say how it is run: --w0 30 --convention nfn (or dws)"
    near = "dws" if weight[space.layers[0].weight].std() < NARROW else "nfn"
    return (
        f"its weights are spread as in SIRENs with w0 30, the first layer's as in the {near} zoos: "
        f"if it is one, pass --w0 30 --convention {near}"
    )


def _sizes(space: WeightSpace) -> list[int]:
    return [tensor.size for tensor in space.tensors]


def inspect(
    paths: Iterable[Path],
    activation: str | None = None,
    strict: bool = False,
    w0: float | None = None,
    convention: str | None = None,
    heads: int | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """(records, failures) of checkpoints, each counted once; a single one that is bad raises."""
    listed = list(dict.fromkeys(Path(path) for path in paths))
    rows, failed = [], []
    for path in listed:
        try:
            rows.append(describe(open_checkpoint(path), activation, w0, convention, heads))
        except QemError as error:
            if strict or len(listed) == 1:
                raise
            reason = error.message.removeprefix(f"{path}: ")
            failed.append({"checkpoint": str(path), "reason": reason})
    return rows, failed
