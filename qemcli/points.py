"""Points of weight spaces: networks of one architecture or of many, in the order of their rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qemcli.spaces import WeightSpace

Part = tuple[WeightSpace, Tensor, Tensor]  # a weight space, rows (k, D) of it, and which they are


@dataclass(frozen=True)
class Points:
    """Networks in an order of their own, each in the rows of its weight space.

    Attributes:
        spaces: the weight spaces, in the order in which they were met.
        flats: for each of them its networks (n_s, D_s).
        which: (n,) the number of each network's weight space.
        at: (n,) its row there.
    """

    spaces: tuple[WeightSpace, ...]
    flats: tuple[Tensor, ...]
    which: Tensor
    at: Tensor

    @classmethod
    def of(cls, space: WeightSpace, flat: Tensor) -> Points:
        """The rows (n, D) of one weight space."""
        n = len(flat)
        return cls((space,), (flat,), torch.zeros(n, dtype=torch.long), torch.arange(n))

    @classmethod
    def joined(cls, spaces: Sequence[WeightSpace], parts: Sequence[tuple[int, Tensor]]) -> Points:
        """Parts (number of the weight space, rows of it), one behind the other."""
        flats: list[list[Tensor]] = [[] for _ in spaces]
        which, at = [], []
        for number, rows in parts:
            start = sum(map(len, flats[number]))
            flats[number].append(rows)
            which.append(torch.full((len(rows),), number))
            at.append(torch.arange(start, start + len(rows)))
        whole = [torch.cat(f) if f else torch.empty(0) for f in flats]
        return cls(tuple(spaces), tuple(whole), torch.cat(which), torch.cat(at))

    def __len__(self) -> int:
        return len(self.which)

    @property
    def mixed(self) -> bool:
        """True where they are of more than one weight space."""
        return len(self.spaces) > 1

    def parts(self, positions: Tensor | None = None) -> Iterator[Part]:
        """The networks at these positions (all), weight space by weight space: (space, rows
        (k, D), which of the positions these are (k,)); spaces without a network are left out."""
        if not self.mixed:
            rows = self.flats[0] if positions is None else self.flats[0][self.at[positions]]
            yield self.spaces[0], rows, torch.arange(len(rows))
            return
        which, at = self.which, self.at
        if positions is not None:
            which, at = which[positions], at[positions]
        for number in which.unique().tolist():
            places = (which == number).nonzero()[:, 0]
            yield self.spaces[number], self.flats[number][at[places]], places

    def rows(self, positions: Tensor) -> Points:
        """The networks at these positions, of the same weight spaces."""
        which, at = self.which[positions], torch.empty(len(positions), dtype=torch.long)
        flats = []
        for number, flat in enumerate(self.flats):
            places = (which == number).nonzero()[:, 0]
            flats.append(flat[self.at[positions[places]]])
            at[places] = torch.arange(len(places))
        return replace(self, flats=tuple(flats), which=which, at=at)

    def map(self, move: Callable[[WeightSpace, Tensor], Tensor]) -> Points:
        """Every network moved within its weight space: `move` is given a space and its rows."""
        pairs = zip(self.spaces, self.flats, strict=True)
        return replace(self, flats=tuple(move(s, f) if len(f) else f for s, f in pairs))

    def followed(self, others: Points) -> Points:
        """These networks and others of the same weight spaces behind them."""
        flats = [torch.cat(pair) for pair in zip(self.flats, others.flats, strict=True)]
        counts = torch.tensor([len(f) for f in self.flats])
        at = torch.cat([self.at, others.at + counts[others.which]])
        return replace(self, flats=tuple(flats), which=torch.cat([self.which, others.which]), at=at)

    def restored(self, answers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """What was answered part by part, (places, answers), in the order of the networks."""
        order = torch.cat([places for places, _ in answers])
        found = torch.cat([values for _, values in answers])
        return torch.empty_like(found).index_copy_(0, order, found)

    def hash(self) -> str:
        """The sha256 of the networks as they lie here."""
        found = hashlib.sha256()
        for flat in self.flats:
            found.update(flat.numpy().tobytes())
        if self.mixed:
            found.update(self.which.numpy().tobytes())
        return found.hexdigest()
