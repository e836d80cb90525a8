"""Maps that carry a neuron's factor q along: the building blocks of ScaleGMN, and their plain kin.

    inv(q x) = inv(x):     |x|  or  rho(x) + rho(-x)  for q = +-1,      x / |x|  for q > 0
    eq(x) = Gamma x * phi(inv(x))                                       eq(q x) = q eq(x)
    message j -> i:  eq((W_e e_ij) * (W_v x_j))      edge:  (W e_ij) * phi(inv(x_j), inv(x_i))

Gamma, W without bias. Inputs and outputs have q = 1: plain perceptrons stand there. An edge tensor
is (b, n_l, n_{l-1}, c); `source` says which of its axes the messages come from: 2 from below, 1
from above. Source: arXiv:2406.10685, section 5 and appendix A.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qemcli.layers.images import Choice, Image, Rows, channels, mapped, product, whole
from qemcli.layers.pooling import direction, reciprocal_length

FIRST, HIDDEN, LAST = 0, 1, 2  # where a neuron is: among the inputs, hidden, among the outputs


class Perceptron(nn.Module):
    """Linear, (LayerNorm,) SiLU, dropout, Linear: reads -> width -> writes."""

    def __init__(
        self, reads: int, writes: int, width: int, norm: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(reads, width), nn.Linear(width, writes)
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, *parts: Rows) -> Tensor:
        """The parts together are what is read; each may be broadcast along the others."""
        return self.outer(self.between(*parts))

    def summed(self, axis: int, *parts: Rows) -> Tensor:
        """The sum of the answers over an axis that the first part has: the outer Linear commutes
        with it but for its bias."""
        inner = self.between(*parts)
        return F.linear(inner.sum(axis), self.outer.weight, inner.shape[axis] * self.outer.bias)

    @property
    def random(self) -> bool:
        """Whether equal rows may have different answers."""
        return self.training and self.dropout.p > 0

    def between(self, *parts: Rows) -> Tensor:
        """What the outer Linear reads. Parts meet behind the inner Linear, so that those of nodes
        are multiplied once a node."""
        weights = self.inner.weight.split([channels(x) for x in parts], dim=1)
        z = mapped(parts[0], weights[0], self.inner.bias)
        for x, weight in zip(parts[1:], weights[1:], strict=True):
            z = z + mapped(x, weight)
        return self.activated(z)

    def activated(self, z: Tensor) -> Tensor:
        """What the outer Linear reads, from what the inner one gives."""
        return self.dropout(F.silu(self.norm(z)))


class Invariant(nn.Module, ABC):
    """inv(x), of as many channels as x."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...

    def mapped(self, x: Rows, weight: Tensor, bias: Tensor) -> Tensor:
        """inv(x) through an affine map, which is joined to what inv ends with where it can be."""
        return F.linear(self(whole(x)), weight, bias)

    def read(self, x: Rows) -> Tensor | Choice:
        """inv(x); a choice where it is one of few rows whatever x is."""
        return self(whole(x))


class Absolute(Invariant):
    """|x|: for signs."""

    def __init__(self, channels: int, style: Style) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


class Symmetrised(Invariant):
    """rho(x) + rho(-x), rho a perceptron: for signs."""

    def __init__(self, channels: int, style: Style) -> None:
        super().__init__()
        self.rho = style.perceptron(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        outer = self.rho.outer
        return F.linear(self._both(x), outer.weight, 2 * outer.bias)

    def mapped(self, x: Rows, weight: Tensor, bias: Tensor) -> Tensor:
        outer = self.rho.outer
        joined = torch.addmv(bias, weight, 2 * outer.bias)
        return F.linear(self._both(x), weight @ outer.weight, joined)

    def _both(self, x: Rows) -> Tensor:
        inner = self.rho.inner
        z = mapped(x, inner.weight)
        both = [F.silu(self.rho.norm(y)) for y in (inner.bias + z, inner.bias - z)]
        return self.rho.dropout(both[0] + both[1])


class Direction(Invariant):
    """x / |x|, 0 where x is 0: for positive scales."""

    def __init__(self, channels: int, style: Style) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return direction(x)

    def mapped(self, x: Rows, weight: Tensor, bias: Tensor) -> Tensor:
        if isinstance(x, Image):
            # One factor a row, which stands better on the few entries.
            x = Image(x.entries * reciprocal_length(whole(x)), x.table)
            return mapped(x, weight, bias)
        return super().mapped(x, weight, bias)

    def read(self, x: Rows) -> Tensor | Choice:
        """A number times one vector points against it, nowhere or along it."""
        if not (isinstance(x, Image) and len(x.table) == 1):
            return self(whole(x))
        signs = torch.tensor([-1, 0, 1], device=x.table.device)
        chosen = (x.entries.sign() == signs).to(x.entries.dtype)
        return Choice(chosen, signs[:, None] * direction(x.table))


class PlainEnds(nn.Module):
    """A perceptron on inputs and outputs, where any map is equivariant; one for both, or two."""

    def __init__(self, reads: int, writes: int, style: Style) -> None:
        super().__init__()
        self.first = style.perceptron(reads, writes)
        self.last = style.perceptron(reads, writes) if style.apart else None

    def perceptron(self, place: int) -> Perceptron:
        return self.last if self.last is not None and place == LAST else self.first

    def forward(self, place: int, linear: nn.Linear, x: Tensor, *codes: Tensor) -> Tensor:
        return self.perceptron(place)(x, *codes)

    def summed(self, place: int, axis: int, linear: nn.Linear, x: Rows, *codes: Tensor) -> Tensor:
        """The sum of the answers over an axis."""
        return self.perceptron(place).summed(axis, x, *codes)


class ModulatedEnds(PlainEnds):
    """The same perceptron times Gamma x, as on hidden neurons."""

    def forward(self, place: int, linear: nn.Linear, x: Tensor, *codes: Tensor) -> Tensor:
        return linear(x) * self.perceptron(place)(x, *codes)

    def summed(self, place: int, axis: int, linear: nn.Linear, x: Rows, *codes: Tensor) -> Tensor:
        return (mapped(x, linear.weight) * self.perceptron(place)(x, *codes)).sum(axis)


@dataclass(frozen=True)
class Style:
    """How the blocks are made: width of the perceptrons, with a LayerNorm or not, their dropout;
    inv; what stands at inputs and outputs, and whether those two have maps of their own (apart).
    """

    width: int
    norm: bool = True
    dropout: float = 0.0
    invariant: type[Absolute] | type[Symmetrised] | type[Direction] = Absolute
    ends: type[PlainEnds] = PlainEnds
    apart: bool = False

    def perceptron(self, reads: int, writes: int) -> Perceptron:
        return Perceptron(reads, writes, self.width, self.norm, self.dropout)


class ScaleInv(nn.Module):
    """phi(inv(x), codes): invariant, d -> writes."""

    def __init__(self, reads: int, writes: int, style: Style, codes: int = 0) -> None:
        super().__init__()
        self.invariant = style.invariant(reads, style)
        self.phi = style.perceptron(reads + codes, writes)

    def forward(self, x: Rows, *codes: Tensor) -> Tensor:
        inner = self.phi.inner
        weights = inner.weight.split([channels(y) for y in (x, *codes)], dim=1)
        z = self.invariant.mapped(x, weights[0], inner.bias)
        for code, weight in zip(codes, weights[1:], strict=True):
            z = z + F.linear(code, weight)
        return self.phi.outer(self.phi.activated(z))


class ScaleEq(nn.Module):
    """Gamma x * ScaleInv(x) on hidden neurons, the style's ends at inputs and outputs."""

    def __init__(self, reads: int, writes: int, style: Style, codes: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(reads, writes, bias=False)
        self.modulation = ScaleInv(reads, writes, style, codes)
        self.ends = style.ends(reads + codes, writes, style)

    def forward(self, place: int, x: Tensor, *codes: Tensor) -> Tensor:
        if place == HIDDEN:
            return self.linear(x) * self.modulation(x, *codes)
        return self.ends(place, self.linear, x, *codes)

    def summed(self, place: int, axis: int, x: Rows, *codes: Tensor) -> Tensor:
        """The sum of the answers over an axis."""
        if place == HIDDEN:
            return (mapped(x, self.linear.weight) * self.modulation(x, *codes)).sum(axis)
        return self.ends.summed(place, axis, self.linear, x, *codes)


class ScaleMessage(nn.Module):
    """Sum over the sources of ScaleEq((W_e e) * (W_v x)): (b, n, d) on the target neurons."""

    def __init__(self, channels: int, style: Style, codes: int = 0) -> None:
        super().__init__()
        self.node = nn.Linear(channels, channels, bias=False)
        self.edge = nn.Linear(channels, channels, bias=False)
        self.map = ScaleEq(channels, channels, style, codes)

    def forward(self, place: int, source: int, e: Rows, x: Rows, *codes: Tensor) -> Tensor:
        """`place` of the targets; x (b, n, d) and codes (n, c) of the sources."""
        y = product(e, self.edge.weight, x, self.node.weight, 3 - source)
        return self.map.summed(place, source, y, *(c.unsqueeze(2 - source) for c in codes))


class ScaleEdge(nn.Module):
    """(W e) * phi(inv(x below), inv(x above)): keeps the class q_above / q_below of an edge."""

    def __init__(self, channels: int, writes: int, style: Style) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, writes, bias=False)
        self.invariant = style.invariant(channels, style)
        self.phi = style.perceptron(2 * channels, writes)

    def forward(self, edges: list[Rows], layers: Sequence[Rows], wanted: Set[int]) -> list[Rows]:
        """Edges of layers 1..L and nodes of layers 0..L; those not wanted stay as they are."""
        seen = {l: self.invariant.read(layers[l]) for l in wanted | {l + 1 for l in wanted}}
        found = list(edges)
        for l in wanted:
            modulation = self._modulation(seen[l], seen[l + 1])
            found[l] = mapped(edges[l], self.linear.weight) * modulation
        return found

    def _modulation(self, below: Tensor | Choice, above: Tensor | Choice) -> Tensor:
        """phi of what is below, (b, m, c), and above, (b, n, c): (b, n, m, c)."""
        if isinstance(below, Choice) and isinstance(above, Choice) and not self.phi.random:
            table = self.phi(below.table, above.table[:, None])
            return Choice.of_pairs(above, below, table).rows()
        low, high = (x.rows() if isinstance(x, Choice) else x for x in (below, above))
        return self.phi(low[:, None], high[:, :, None])


class PlainMap(nn.Module):
    """A perceptron for every neuron: equivariant to permutations, without factors (GMN)."""

    def __init__(self, reads: int, writes: int, style: Style, codes: int = 0) -> None:
        super().__init__()
        self.phi = style.perceptron(reads + codes, writes)

    def forward(self, place: int, x: Tensor, *codes: Tensor) -> Tensor:
        return self.phi(x, *codes)


class PlainMessage(nn.Module):
    """Sum over the sources of MLP(e, x): without factors (GMN)."""

    def __init__(self, channels: int, style: Style, codes: int = 0) -> None:
        super().__init__()
        self.phi = style.perceptron(2 * channels + codes, channels)

    def forward(self, place: int, source: int, e: Rows, x: Rows, *codes: Tensor) -> Tensor:
        own = (c.unsqueeze(2 - source) for c in codes)
        return self.phi.summed(source, e, whole(x).unsqueeze(3 - source), *own)


class PlainEdge(nn.Module):
    """MLP(e, x below, x above): without factors (GMN)."""

    def __init__(self, channels: int, writes: int, style: Style) -> None:
        super().__init__()
        self.phi = style.perceptron(3 * channels, writes)

    def forward(self, edges: list[Rows], layers: Sequence[Rows], wanted: Set[int]) -> list[Rows]:
        """Edges of layers 1..L and nodes of layers 0..L; those not wanted stay as they are."""
        return [
            self.phi(e, whole(layers[l])[:, None], whole(layers[l + 1])[:, :, None])
            if l in wanted
            else e
            for l, e in enumerate(edges)
        ]
