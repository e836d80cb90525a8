"""DWS layers: a map of its own from every tensor to every tensor, each commuting with permutations
of the hidden neurons.

Navon et al., Equivariant Architectures for Learning in Deep Weight Spaces, arXiv:2301.12780. What
source s sends to target t, weights or biases alike (the four families of the paper),

    s and t share neurons a:     broadcast(Set(reduce_{not a} X_s))
    they share none:             broadcast(A reduce X_s + c)
    the same middle weight:      (A X + R reduce_j X + K reduce_k X + G reduce_jk X) / 4

summed over the sources, divided by their number. Inputs and outputs are feature axes of the first
and the last layer. reduce is a mean or a maximum, Set a deep set or self-attention; with means and
deep sets, everything is linear and spans all equivariant maps (HNPLinear's full basis).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qemcli.errors import UsageError
from qemcli.layers.features import Features, require_hidden
from qemcli.layers.neurons import mean
from qemcli.registry import suggest
from qemcli.spaces import Chain

Axes = tuple[int, ...]  # hidden layers whose neurons a tensor runs over
Reduce = Callable[[Tensor, int], Tensor]

REDUCTIONS: dict[str, Reduce] = {"mean": mean, "max": torch.amax}
SETS = ("sets", "attention")


def reducing(name: str) -> Reduce:
    """The function of a name of REDUCTIONS; UsageError for another."""
    if name not in REDUCTIONS:
        raise UsageError(f"DWS has no reduction '{name}'", suggest(name, list(REDUCTIONS)))
    return REDUCTIONS[name]


def tensor_axes(space: Chain) -> list[Axes]:
    """The hidden axes of W_1, b_1, ..., W_L, b_L: (l, l-1) and (l,), without 0 and L."""
    last = len(space.layers)
    axes = []
    for l in range(1, last + 1):
        axes.append(tuple(i for i in (l, l - 1) if 0 < i < last))
        axes.append((l,) if l < last else ())
    return axes


def free_sizes(space: Chain) -> list[int]:
    """How many numbers of each tensor, a channel, fold into its features: free axes and taps."""
    sizes = [n for la in space.layers for n in (la.taps, 1)]
    sizes[0] *= space.layers[0].cols
    sizes[-2], sizes[-1] = sizes[-2] * space.layers[-1].rows, space.layers[-1].rows
    return sizes


def fold(features: Features) -> list[Tensor]:
    """Features -> one tensor (b, hidden axes..., free * channels) for each of W_1, b_1, ..., b_L.

    Of a free axis, channels and taps the last runs fastest.
    """
    (first, bias), *middle, (last, last_bias) = features
    inside = [x for pair in middle for x in pair]
    end = [last.transpose(1, 2).flatten(2), last_bias.flatten(1)]
    return [first.flatten(2), bias, *inside, *end]


def unfold(space: Chain, xs: list[Tensor]) -> Features:
    """The inverse of `fold`."""
    n0, n_out = space.layers[0].cols, space.layers[-1].rows
    pairs = list(zip(xs[::2], xs[1::2], strict=True))
    pairs[0] = (pairs[0][0].unflatten(-1, (n0, -1)), pairs[0][1])
    last, bias = pairs[-1]
    last = last.unflatten(-1, (n_out, -1)).transpose(1, 2)
    pairs[-1] = (last, bias.unflatten(-1, (n_out, -1)))
    return pairs


class DeepSet(nn.Module):
    """Gamma x_i - Lambda reduce x + c: (b, n, reads) -> (b, n, writes)."""

    def __init__(self, reads: int, writes: int, reduce: Reduce) -> None:
        super().__init__()
        self.each = nn.Linear(reads, writes)
        self.all = nn.Linear(reads, writes, bias=False)
        self.reduce = reduce

    def forward(self, x: Tensor) -> Tensor:
        return self.each(x) - self.all(self.reduce(x, 1))[:, None]


class SetAttention(nn.Module):
    """Self-attention on a set, without norms: (b, n, reads) -> (b, n, writes).

        A = softmax(Q K^T / sqrt(writes)) a head,    H = Q + A V,    H + relu(O H)

    As many heads of the `heads` as divide `writes`. Source: arXiv:1810.00825 (the block that
    DWSNets take).
    """

    def __init__(self, reads: int, writes: int, heads: int) -> None:
        super().__init__()
        self.heads = math.gcd(heads, writes)
        self.query, self.key = nn.Linear(reads, writes), nn.Linear(reads, writes)
        self.value, self.out = nn.Linear(reads, writes), nn.Linear(writes, writes)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)) for part in (self.query, self.key, self.value)
        )
        scores = torch.einsum("bihc,bjhc->bhij", q, k) / self.out.in_features**0.5
        h = (q + torch.einsum("bhij,bjhc->bihc", scores.softmax(-1), v)).flatten(-2)
        return h + torch.relu(self.out(h))


class Grid(nn.Module):
    """A middle weight to itself: the entry, both reductions over one axis, and the one over
    both."""

    def __init__(self, reads: int, writes: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(reads, writes) for _ in range(4))

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """Entries, rows, columns and everything, each through its own map, a quarter of each."""
        return [m(part) / 4 for m, part in zip(self.maps, x, strict=True)]


class DWSLayer(nn.Module):
    """Every tensor to every tensor: features of c_in channels -> features of c_out channels.

    `sets`: sets | attention, of `heads`; `reduction`: mean | max. Raises UsageError for others,
    UnsupportedError for L < 2. Source: arXiv:2301.12780; its code leaves out what is particular to
    an output neuron from W_{L-1} and from the biases before b_{L-1} to W_L: here they are complete.
    """

    def __init__(
        self,
        space: Chain,
        c_in: int,
        c_out: int,
        sets: str = "attention",
        reduction: str = "max",
        heads: int = 8,
    ) -> None:
        super().__init__()
        require_hidden(space, "a DWS layer")
        if sets not in SETS:
            raise UsageError(f"DWS has no maps '{sets}'", suggest(sets, [*SETS, "basis"]))
        self.space, self.reduce = space, reducing(reduction)
        self.axes, free = tensor_axes(space), free_sizes(space)
        self.maps = nn.ModuleDict()
        for s, ours in enumerate(self.axes):
            for t, theirs in enumerate(self.axes):
                reads, writes = free[s] * c_in, free[t] * c_out
                if s == t and len(ours) == 2:
                    made: nn.Module = Grid(reads, writes)
                elif not set(ours) & set(theirs):
                    made = nn.Linear(reads, writes)
                elif sets == "sets":
                    made = DeepSet(reads, writes, self.reduce)
                else:
                    made = SetAttention(reads, writes, heads)
                self.maps[f"{s}_{t}"] = made

    def init(self, scale: float = 1.0) -> None:
        """The published start: weights of variance 4 in / (out (in + out)) times scale^2, biases
        in +-1e-4."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_normal_(part.weight)
                gain = scale * math.sqrt(2 * part.in_features / part.out_features)
                part.weight.data.mul_(gain)
                if part.bias is not None:
                    nn.init.uniform_(part.bias, -1e-4, 1e-4)

    def _reduced(self, x: Tensor, axes: Axes) -> dict[Axes, Tensor]:
        """x over any of its axes: the reductions over the others."""
        if len(axes) == 2:
            rows, columns = self.reduce(x, 2), self.reduce(x, 1)
            own = {axes: x, axes[:1]: rows, axes[1:]: columns}
            return {**own, (): self.reduce(rows, 1)}
        return {axes: x, (): self.reduce(x, 1)} if axes else {(): x}

    def forward(self, features: Features) -> Features:
        seen = [self._reduced(x, a) for x, a in zip(fold(features), self.axes, strict=True)]
        written = [self._written(t, seen) for t in range(len(self.axes))]
        return unfold(self.space, written)

    def _written(self, t: int, seen: list[dict[Axes, Tensor]]) -> Tensor:
        """Target t: what all sources send along the same axes is summed before it is broadcast."""
        axes = self.axes[t]
        parts: dict[Axes, Tensor] = {}
        for s, x in enumerate(seen):
            send = self.maps[f"{s}_{t}"]
            if isinstance(send, Grid):
                sent = dict(zip(x, send(list(x.values())), strict=True))
            else:
                shared = tuple(a for a in axes if a in self.axes[s])
                sent = {shared: send(x[shared])}
            for along, y in sent.items():
                parts[along] = parts[along] + y if along in parts else y
        total = parts.pop(axes)
        for along, y in parts.items():
            missing = [i for i, a in enumerate(axes, start=1) if a not in along]
            for i in missing:
                y = y.unsqueeze(i)
            total = total + y
        return total / len(seen)


class TensorBatchNorm(nn.Module):
    """Batch normalisation of every tensor by itself, over networks and entries, a channel (and
    tap)."""

    def __init__(self, space: Chain, channels: int) -> None:
        super().__init__()
        sizes = [n for la in space.layers for n in (la.taps * channels, channels)]
        self.norms = nn.ModuleList(nn.BatchNorm1d(n) for n in sizes)

    def forward(self, features: Features) -> Features:
        # Transposed back afterwards: the last weight keeps its layout in memory (features.py).
        *front, (last, bias) = features
        turned = [*front, (last.transpose(1, 2), bias)]
        flat = [x for pair in turned for x in pair]
        done = [
            norm(x.flatten(0, -2)).view(x.shape) for norm, x in zip(self.norms, flat, strict=True)
        ]
        pairs = list(zip(done[::2], done[1::2], strict=True))
        return [*pairs[:-1], (pairs[-1][0].transpose(1, 2), pairs[-1][1])]


class FoldedPool(nn.Module):
    """Every tensor reduced over its hidden neurons, inputs and outputs kept apart: (b, C N_pool).

    With means it is HNPPool's vector in another order. Source: arXiv:2301.12780 (maxima).
    """

    def __init__(self, space: Chain, reduction: str) -> None:
        super().__init__()
        self.per_channel = sum(free_sizes(space))
        self.reduce = reducing(reduction)

    def forward(self, features: Features) -> Tensor:
        parts = []
        for x in fold(features):
            while x.dim() > 2:
                x = self.reduce(x, 1)
            parts.append(x)
        return torch.cat(parts, dim=-1)
