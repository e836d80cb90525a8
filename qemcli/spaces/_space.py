"""The abstract weight space: what everything that holds networks knows of them."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qemcli.errors import InputError
from qemcli.spaces._notation import NamedTensor

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

HOMOGENEOUS = frozenset({"relu", "leaky_relu", "abs", "identity"})  # f(a x) = a f(x) for a > 0
ODD = frozenset({"tanh", "sin", "erf", "arctan", "identity"})  # f(-x) = -f(x)
ACTIVATIONS = HOMOGENEOUS | ODD | {"sigmoid", "gelu", "silu", "softplus", "elu"}


@dataclass(frozen=True)
class WeightSpace(ABC):
    """Named tensors with named axes, in the order of the network; a point of it is a dict of
    tensors.

    Attributes:
        family: mlp | cnn | siren, or the family of a transformer.
        tensors: every tensor that is understood, in the order of the network.
    """

    family: str
    tensors: tuple[NamedTensor, ...]
    KINDS: ClassVar[dict[str, type[WeightSpace]]] = {}

    def __init_subclass__(cls, kind: str | None = None) -> None:
        super().__init_subclass__()
        if kind is not None:  # an abstract family of spaces has none
            WeightSpace.KINDS[kind] = cls

    @property
    @abstractmethod
    def activation(self) -> str | None:
        """A name of ACTIVATIONS, or None where it is not known (then only permutations are
        claimed)."""

    @property
    @abstractmethod
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """(name, reason) of every tensor of the checkpoint that has no place here."""

    @property
    @abstractmethod
    def hidden(self) -> dict[str, int]:
        """The axes whose neurons have no order of their own, and how many neurons each has."""

    @property
    @abstractmethod
    def widths(self) -> tuple[int, ...]:
        """The sizes of what flows through the network, input first."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """How many maps stand one behind the other; errors of rounding grow with it."""

    @property
    def title(self) -> str:
        """Family, widths and activation, as an answer or a message shows them."""
        return f"{self.family} {self.widths} {self.activation}"

    @abstractmethod
    def fits(self, other: WeightSpace) -> bool:
        """True where `other` has the same maps, whatever its tensors are called."""

    @abstractmethod
    def running(self, activation: str | None = None) -> Self:
        """The same tensors with another activation, where one is given."""

    @abstractmethod
    def without(self, skipped: tuple[tuple[str, str], ...]) -> Self:
        """The same space, with more tensors named as left out."""

    @abstractmethod
    def unstated(self) -> Self:
        """The same tensors with no activation stated."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What `to_json` writes; `of_record` reads it."""

    @classmethod
    @abstractmethod
    def of_record(cls, record: dict[str, Any]) -> Self:
        """The inverse of `record`."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {t.name: t.shape for t in self.tensors}

    @property
    def size(self) -> int:
        """The number of parameters D."""
        return sum(t.size for t in self.tensors)

    def __getitem__(self, name: str) -> NamedTensor:
        return next(t for t in self.tensors if t.name == name)

    def __str__(self) -> str:
        return "\n".join(f"{t.name}: {t}" for t in self.tensors)

    def check(self, w: Mapping[str, Tensor]) -> None:
        """Raise InputError unless every tensor is there, as (batch, *shape)."""
        for t in self.tensors:
            if t.name not in w:
                raise InputError(f"tensor '{t.name}' is missing")
            if tuple(w[t.name].shape[1:]) != t.shape:
                got = tuple(w[t.name].shape[1:])
                raise InputError(
                    f"tensor '{t.name}' has shape {got}, the weight space says {t.shape}"
                )

    def flatten(self, w: Mapping[str, Tensor]) -> Tensor:
        """dict of (b, *shape) -> (b, D), tensors in the order of the space."""
        import torch

        return torch.cat([w[t.name].flatten(1) for t in self.tensors], dim=1)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """(b, D) -> dict of (b, *shape); views of `flat`."""
        parts = flat.split([t.size for t in self.tensors], dim=1)
        return {t.name: p.unflatten(1, t.shape) for t, p in zip(self.tensors, parts, strict=True)}

    def to_json(self) -> str:
        """The space as JSON, as it stands in a safetensors header and in the index."""
        return json.dumps(self.record())

    @classmethod
    def from_json(cls, text: str) -> WeightSpace:
        """Read what `to_json` wrote; raises InputError where it is not a weight space."""
        try:
            record = json.loads(text)
            return cls.KINDS[record.get("kind", "chain")].of_record(record)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(f"'qem.space' is not a weight space: {error}") from None
