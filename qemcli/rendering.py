"""What the INRs of a zoo show: one row and one image a network, failures counted and named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from qemcli import signals
from qemcli.errors import InputError
from qemcli.spaces import CONVENTIONS, WeightSpace, chain_of

if TYPE_CHECKING:
    import pandas

    from qemcli.zoos.zoo import Zoo

CHUNK = 256  # networks at a time
LONGEST = 20  # characters of a caption


@dataclass
class Shown:
    """Rows and images (channels, height, width), not clipped, in the order of the index; `failed`
    for the others, and the first reason why a network shows no image."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    images: list[np.ndarray] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    error: InputError | None = None


def show(
    zoo: Zoo,
    size: tuple[int, int] | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> Shown:
    """Render every network, each by its own convention; InputError where not one shows an image.

    `size` is (height, width); left out, each network's own.
    """
    found = Shown()
    places: list[int] = []
    for space, flat, positions in zoo.batches(CHUNK):
        table = zoo.index.iloc[positions]
        try:
            signals.check(space, size)
            images = signals.render(space, space.unflatten(flat), size).numpy()
        except InputError as error:
            found.error = found.error or error
            reason = error.message
            found.failed += [{"checkpoint": n, "reason": reason} for n in table["checkpoint"]]
            continue
        places += _collect(found, space, table, positions, images)
        advance(len(table))
    found.failed += zoo.failures  # read last: files may break between opening and loading
    _in_order(found, places)
    if not found.rows:
        raise found.error or _nothing(found)
    return found


def _nothing(found: Shown) -> InputError:
    first = ": ".join(found.failed[0].values()) if found.failed else "it is empty"
    return InputError(f"none of {len(found.failed)} checkpoints can be rendered: {first}")


def _collect(
    found: Shown,
    space: WeightSpace,
    table: pandas.DataFrame,
    positions: np.ndarray,
    images: np.ndarray,
) -> list[int]:
    """Add what is finite; returns the places of those in the index."""
    kept = []
    records = table.to_dict("records")
    for place, record, image in zip(positions.tolist(), records, images, strict=True):
        if not np.isfinite(image).all():
            reason = "weights or values that are not finite"
            found.failed.append({"checkpoint": record["checkpoint"], "reason": reason})
            continue
        channels, height, width = image.shape
        row: dict[str, Any] = {"checkpoint": record["checkpoint"]}
        row |= {"height": height, "width": width, "channels": channels}
        row |= {"min": float(image.min()), "max": float(image.max())}
        row["convention"] = convention(space)
        row |= {k: record[k] for k in ("psnr", "label") if _known(record.get(k))}
        found.rows.append(row)
        found.images.append(image)
        kept.append(place)
    return kept


def _known(value: Any) -> bool:
    return value is not None and value == value


def convention(space: WeightSpace) -> str:
    """The name of the convention by which a SIREN is run, or `own`."""
    run = chain_of(space, "a picture").forward
    for name, said in CONVENTIONS.items():
        if all(getattr(run, key) == value for key, value in said.items()):
            return name
    return "own"


def _in_order(found: Shown, places: Sequence[int]) -> None:
    order = np.argsort(places, kind="stable")
    found.rows = [found.rows[i] for i in order]
    found.images = [found.images[i] for i in order]


def spread(zoo: Zoo, count: int) -> Zoo:
    """At most `count` networks, evenly over the index."""
    if len(zoo) <= count:
        return zoo
    return zoo.take(np.linspace(0, len(zoo) - 1, count).round().astype(int))


def captions(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Short names, without what they have in common; the class and the PSNR where known."""
    parts = [PurePosixPath(row["checkpoint"]).with_suffix("").parts for row in rows]
    while len({p[-1] for p in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [p[:-1] for p in parts]
    return [_caption(p[-1], row) for p, row in zip(parts, rows, strict=True)]


def _caption(name: str, row: dict[str, Any]) -> str:
    short = name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"
    said = [f"class {row['label']}"] if "label" in row else []
    said += [f"{row['psnr']:.1f} dB"] if "psnr" in row else []
    return "\n".join([short, ", ".join(said)] if said else [short])
