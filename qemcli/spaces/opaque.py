"""Networks whose symmetries are not known: tensors with a name and a shape, and nothing more.

An index can list such a checkpoint, hash it and find it again; nothing acts on it, and no predictor
reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qemcli.spaces._notation import Axis, NamedTensor
from qemcli.spaces._space import WeightSpace


@dataclass(frozen=True)
class Opaque(WeightSpace, kind="opaque"):
    """Tensors without places: every axis is its own, and none is hidden.

    Attributes:
        reason: why no weight space is claimed.
        skipped: (name, reason) of every tensor that is not even listed.
    """

    reason: str = "its architecture is not known"
    skipped: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    @property
    def activation(self) -> str | None:
        """None: where the network is not understood, no activation says anything of it."""
        return None

    @property
    def hidden(self) -> dict[str, int]:
        """No axis whose neurons could be moved."""
        return {}

    @property
    def widths(self) -> tuple[int, ...]:
        """No widths: nothing is known of what flows through it."""
        return ()

    @property
    def depth(self) -> int:
        return len(self.tensors)

    @property
    def title(self) -> str:
        """That it is not understood, and why."""
        return f"a network that qem lists without understanding it ({self.reason})"

    def fits(self, other: WeightSpace) -> bool:
        """Only the very same tensors."""
        return isinstance(other, Opaque) and self.shapes == other.shapes

    def running(self, activation: str | None = None) -> Opaque:
        """Itself: an activation alone does not explain it."""
        return self

    def without(self, skipped: tuple[tuple[str, str], ...]) -> Opaque:
        """The same space, with more tensors named as left out."""
        return replace(self, skipped=(*self.skipped, *skipped))

    def unstated(self) -> Opaque:
        """Itself."""
        return self

    def record(self) -> dict[str, Any]:
        """What `to_json` writes."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return {"kind": "opaque", "reason": self.reason, "shapes": shapes}

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Opaque:
        """The inverse of `record`."""
        return opaque(record["shapes"], str(record["reason"]))


def opaque(shapes: Mapping[str, tuple[int, ...]], reason: str) -> Opaque:
    """Tensors of these shapes, in this order, and why nothing more is claimed of them."""
    tensors = tuple(
        NamedTensor(name, tuple((Axis(f"a{i}", size),) for i, size in enumerate(shape)))
        for name, shape in shapes.items()
    )
    return Opaque("opaque", tensors, reason)
