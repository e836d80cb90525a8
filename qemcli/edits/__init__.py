"""Edits of pictures, by name: what an edited network is asked to show.

`find("rotate:10")` is the edit `rotate` with its amount 10; called on images (b, c, h, w) in [0, 1]
it gives the pictures that are wanted. An edit is a module of this folder with `target(images)`, or
with `AMOUNT`, its default, and `target(images, amount)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qemcli import registry, signals
from qemcli.errors import UsageError
from qemcli.spaces import WeightSpace

CHUNK = 256  # networks shown at a time


@dataclass(frozen=True)
class Edit:
    """One edit and its amount, None where it has none."""

    name: str
    amount: float | None = None

    def __str__(self) -> str:
        return self.name if self.amount is None else f"{self.name}:{self.amount:g}"

    def of(self, space: WeightSpace, flat: Tensor) -> Tensor:
        """(n, D) image INRs -> the edit of what each of them shows, (n, c h w) on the [0, 1] scale.

        Raises InputError where they are no image INRs, or where it is not known how they are run.
        """
        signals.check(space)
        with torch.no_grad():
            parts = [
                self(signals.render(space, space.unflatten(rows))).flatten(1)
                for rows in flat.split(CHUNK)
            ]
        return torch.cat(parts) if parts else flat.new_zeros(0, 0)

    def __call__(self, images: Tensor) -> Tensor:
        """(b, c, h, w) on the [0, 1] scale -> the same; what lies outside is clipped first."""
        target = registry.load("edits", self.name).target
        clipped = images.clamp(0, 1)
        return target(clipped) if self.amount is None else target(clipped, self.amount)


def names() -> list[str]:
    """Every edit by name."""
    return registry.names("edits")


def find(text: str) -> Edit:
    """The edit that NAME or NAME:AMOUNT means; UsageError for an unknown one."""
    name, _, given = text.partition(":")
    if name not in names():
        raise UsageError(f"no edit is called '{name}'", registry.suggest(name, names()))
    default = getattr(registry.load("edits", name), "AMOUNT", None)
    if not given:
        return Edit(name, default)
    if default is None:
        raise UsageError(f"the edit '{name}' has no amount, and '{given}' is given")
    try:
        amount = float(given)
    except ValueError:
        amount = math.nan
    if not math.isfinite(amount):
        raise UsageError(f"'{text}': '{given}' is not a number", f"for example {name}:{default:g}")
    return Edit(name, amount)
