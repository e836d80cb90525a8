"""Metanetworks: networks that read networks, and what each of them says of itself.

A Metanetwork reads the networks of one weight space. A Mixed one has parameters that depend on no
weight space: `on(space)` is the Metanetwork that reads that space with them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Self

from torch import Tensor, nn

from qemcli.layers import quasi
from qemcli.layers.features import Features, door
from qemcli.layers.statistics import StandardiseTensors
from qemcli.spaces import Chain, WeightSpace

Blocks = list[dict[str, Tensor]]  # the roles of a transformer's blocks, (b, c, *axes of the role)


class Metanetwork(nn.Module, ABC):
    """dict of (b, *shape) -> raw outputs (b, outputs), or for an editor dict of (b, k, *shape).

    An ensemble of `members` answers (b members, outputs) in training, network by network: each
    member learns on its own.
    """

    members = 1

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

    def on(self, space: WeightSpace) -> Self:
        """Itself: it reads one weight space, whatever its tensors are called."""
        return self


class Mixed(nn.Module, ABC):
    """One set of parameters for networks of many weight spaces."""

    members = 1  # as of a Metanetwork

    def __init__(self) -> None:
        super().__init__()
        self._bound: dict[WeightSpace, Metanetwork] = {}  # a plain dict: no submodules

    def on(self, space: WeightSpace) -> Metanetwork:
        """What reads the networks of this weight space, with these parameters; made once.

        Raises UnsupportedError where it cannot.
        """
        if space not in self._bound:
            self._bound[space] = self.bind(space)
        return self._bound[space]

    @abstractmethod
    def bind(self, space: WeightSpace) -> Metanetwork:
        """A Metanetwork of this weight space that holds this module, and no parameters of its own.

        Raises UnsupportedError where it cannot.
        """

    @abstractmethod
    def calibrate(self, parts: Sequence[tuple[WeightSpace, Mapping[str, Tensor]]]) -> None:
        """Set constants from the training set, weight space by weight space."""


class Body(nn.Module, ABC):
    """A stack of permutation-equivariant steps behind a standardisation of tensors."""

    standard: StandardiseTensors

    @abstractmethod
    def steps(self, features: Features) -> list[tuple[str, Features]]:
        """Features after every step, by name."""


class Bodied(Metanetwork):
    """One that reads through a permutation-equivariant `body` and perhaps a quasi layer behind it:
    those say all of it."""

    body: Body
    space: Chain
    quasi: quasi.Layer | None

    def claims(self, space: WeightSpace) -> set[str]:
        """Permutations of the hidden neurons, unless a quasi layer ties its scales to their
        indices."""
        return {"permutation"} if quasi.keeps(self.quasi) else set()

    def read(self, w: Mapping[str, Tensor]) -> Features:
        """What the body and the quasi layer make of the weights."""
        h = door(self.space, w)
        return self.body(h) if self.quasi is None else self.equivariant(w)[-1][1]

    def calibrate(self, w: Mapping[str, Tensor]) -> None:
        """Set the constants of `standardised` from the training set: one pair a tensor."""
        self.body.standard.fit(door(self.space, w))

    def equivariant(self, w: Mapping[str, Tensor]) -> list[tuple[str, Features]]:
        """Features after every step of the body, by name, and behind a quasi layer."""
        steps = self.body.steps(door(self.space, w))
        if self.quasi is None:
            return steps
        (_, before), (_, after) = steps[-2:]
        return [*steps, ("quasi", self.quasi(w, before, after))]
