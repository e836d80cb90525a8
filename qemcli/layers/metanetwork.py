"""Metanetworks: networks that read networks, and what each of them says of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from qemcli.layers.features import Features, door
from qemcli.layers.statistics import StandardiseTensors
from qemcli.spaces import Chain, WeightSpace

Blocks = list[dict[str, Tensor]]  # the roles of a transformer's blocks, (b, c, *axes of the role)


class Metanetwork(nn.Module, ABC):
    """dict of (b, *shape) -> raw outputs (b, outputs), or for an editor dict of (b, k, *shape)."""

    @abstractmethod
    def claims(self, space: WeightSpace) -> set[str]:
        """The groups that it is exactly invariant to, an editor equivariant, by design."""

    def calibrate(self, w: Mapping[str, Tensor]) -> None:
        """Set constants from the training set's weights, where it has any."""
        return None

    def equivariant(self, w: Mapping[str, Tensor]) -> list[tuple[str, Features]]:
        """Features after every equivariant step, by name; [] where it shows none.

        `features.act_on_features` acts on them.
        """
        return []

    def roles(self, w: Mapping[str, Tensor]) -> list[tuple[str, Blocks]]:
        """A transformer's blocks after every equivariant step, by name; [] where it shows none."""
        return []


class Body(nn.Module, ABC):
    """A stack of permutation-equivariant steps behind a standardisation of tensors."""

    standard: StandardiseTensors

    @abstractmethod
    def steps(self, features: Features) -> list[tuple[str, Features]]:
        """Features after every step, by name."""


class Bodied(Metanetwork):
    """One that reads through a permutation-equivariant `body`: that says all of it."""

    body: Body
    space: Chain

    def claims(self, space: WeightSpace) -> set[str]:
        """Permutations of the hidden neurons."""
        return {"permutation"}

    def calibrate(self, w: Mapping[str, Tensor]) -> None:
        """Set the constants of `standardised` from the training set: one pair a tensor."""
        self.body.standard.fit(door(self.space, w))

    def equivariant(self, w: Mapping[str, Tensor]) -> list[tuple[str, Features]]:
        """Features after every step of the body, by name."""
        return self.body.steps(door(self.space, w))
