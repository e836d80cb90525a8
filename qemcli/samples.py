"""Samples: the networks of a zoo as one metanetwork takes them, with what the task asks of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qemcli import registry
from qemcli.designs import Design, prepared
from qemcli.edits import find
from qemcli.errors import InputError
from qemcli.points import Points
from qemcli.spaces import Chain, WeightSpace

if TYPE_CHECKING:
    import pandas

    from qemcli.zoos.zoo import Zoo

CHUNK = 1024  # networks carried to their representative at a time


@dataclass(frozen=True)
class Sample:
    """Networks of one weight space, or of several.

    Attributes:
        networks: float32 rows, as the design takes them (balanced where it balances).
        target: (n,) float32, what the task asks; for an edit (n, c h w), the picture that is
            wanted.
        index: their rows of the zoo's index.
        classes: the names of the classes, where the task has some.
        failed: {"checkpoint", "reason"} of what could not be read.
    """

    networks: Points
    target: Tensor
    index: pandas.DataFrame
    classes: tuple[str, ...] = ()
    failed: tuple[dict[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.target)

    @property
    def spaces(self) -> tuple[WeightSpace, ...]:
        """Their weight spaces, that of most networks first."""
        counts = [len(flat) for flat in self.networks.flats]
        ranked = sorted(range(len(counts)), key=lambda i: -counts[i])
        return tuple(self.networks.spaces[i] for i in ranked)

    def split(self, name: str) -> Sample:
        """The rows whose split column says `name`."""
        return self.rows(np.flatnonzero(self.index["split"].to_numpy() == name))

    def rows(self, positions: np.ndarray) -> Sample:
        at = torch.from_numpy(positions)
        return replace(
            self,
            networks=self.networks.rows(at),
            target=self.target[at],
            index=self.index.iloc[positions],
        )


def carried(design: Design, networks: Points) -> Points:
    """Every network as the design takes it."""
    if not design.balanced:
        return networks
    return networks.map(lambda space, flat: _carried(design, space, flat))


def _carried(design: Design, space: WeightSpace, flat: Tensor) -> Tensor:
    """(n, D) -> (n, D), in chunks, so the peak stays small."""
    out = torch.empty_like(flat)
    for start in range(0, len(flat), CHUNK):
        w = space.unflatten(flat[start : start + CHUNK])
        out[start : start + CHUNK] = space.flatten(prepared(design, space, w))
    return out


def gather(
    zoos: list[Zoo], task: ModuleType, activation: str | None = None, edit: str | None = None
) -> Sample:
    """The labelled, finite networks of some zoos, as they are stored. With an `edit` the target is
    that of the picture that each network shows, and they must share one weight space.

    Raises InputError where nothing is left, or an edit is of more than one weight space.
    """
    import pandas

    spaces: list[WeightSpace] = []
    numbers: dict[WeightSpace, int] = {}
    parts: list[tuple[int, Tensor]] = []
    targets, tables = [], []
    for zoo in zoos:
        for space, flat, positions in zoo.load():
            table = zoo.index.iloc[positions]
            target = task.target(table)
            good = np.flatnonzero(np.isfinite(target) & flat.isfinite().all(dim=1).numpy())
            if len(good):
                number = _number(spaces, numbers, space.running(activation))
                parts.append((number, flat[torch.from_numpy(good)]))
                targets.append(target[good])
                tables.append(table.iloc[good])
    failed = tuple(item for zoo in zoos for item in zoo.failures)
    if not spaces:
        said = f" ({failed[0]['checkpoint']}: {failed[0]['reason']})" if failed else ""
        raise InputError(
            f"no finite checkpoint has a '{task.TARGET}' to learn from or compare with{said}",
            _other(zoos),
        )
    if edit is not None and len(spaces) > 1:
        kinds = sorted({_kind(s) for s in spaces})
        raise InputError(
            f"the zoo mixes weight spaces: {'; '.join(kinds)}",
            "pick one with --where, e.g. --where \"activation == 'relu'\"",
        )
    target = np.concatenate(targets)
    classes = task.classes(target, [zoo.record for zoo in zoos])
    index = pandas.concat(tables, ignore_index=True)
    found = Points.joined(spaces, parts)
    wanted = torch.from_numpy(target).float()
    if edit is not None:
        wanted = find(edit).of(spaces[0], found.flats[0])
    return Sample(found, wanted, index, classes, failed)


def _other(zoos: list[Zoo]) -> str | None:
    """The tasks whose labels the zoos do have."""
    columns = {str(column) for zoo in zoos for column in zoo.index.columns}
    known = {name: registry.load("tasks", name).TARGET for name in registry.names("tasks")}
    found = [f"'{target}' ({name})" for name, target in known.items() if target in columns]
    return f"there is {', '.join(found)}" if found else "qem index --labels FILE joins a table"


def _number(spaces: list[WeightSpace], numbers: dict[WeightSpace, int], space: WeightSpace) -> int:
    """The number of the weight space among those that were met, this one included; the same
    layers under other names are the same."""
    if space not in numbers:
        known = next((i for i, s in enumerate(spaces) if _alike(s, space)), len(spaces))
        spaces += [space] if known == len(spaces) else []
        numbers[space] = known
    return numbers[space]


def _alike(space: WeightSpace, other: WeightSpace) -> bool:
    """The same layers and activation and, where that is known of SIRENs, run in the same way."""
    same = space.activation == other.activation and space.widths == other.widths
    same = same and space.fits(other)
    if isinstance(space, Chain) and isinstance(other, Chain) and space.family == "siren":
        return same and space.forward == other.forward
    return same


def _kind(space: WeightSpace) -> str:
    if not isinstance(space, Chain) or space.family != "siren":
        return space.title
    run = space.forward
    return f"{space.title} w0 {run.w0:g} axes {run.axes} levels {run.levels}"


def scored(task: ModuleType, prediction: Tensor, target: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(predictions, labels) in float64, as scores and intervals take them: (n, ...) and (n,).

    A task with `reduced` has more of both than a bootstrap can carry.
    """
    pair = prediction.double().numpy(), target.double().numpy()
    return task.reduced(*pair) if hasattr(task, "reduced") else pair
