"""Polynomial layers of low rank: Transformer-NFN where D^3, and even D^2, is too much.

The cubic terms of layers/polynomial.py hold one Phi (D, D) an output. Here all outputs share
`rank` products of rank one, Phi[k, p, q] = sum_r a_r[k] b_r[p] c_r[q], and every wide linear map
has a bottleneck of `rank`:

    <b c^T, S> = sum_h (b W_Q^h) . (c W_K^h)       so neither S nor R is formed either

The factors pass through with the one channel that they came with: S is linear in them, and a map
on their D axis shows <Phi, S> nothing that another Phi would not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from qemcli.layers.block_features import FACTORS, Feedforward, Roles, neurons, shared
from qemcli.layers.blockwise import BlockLinear, BlockStandard


@dataclass(frozen=True)
class Heads:
    """The factors of every block, as they came; queries and outputs summed over a group."""

    blocks: tuple[Roles, ...]

    def behind(self, other: Heads) -> Heads:
        """These heads: there are no maps on them."""
        return self

    def factors(self, blocks: Sequence[Roles]) -> list[dict[str, Tensor]]:
        """The factors, with a channel axis behind the batch."""
        return [{role: roles[role][:, None] for role in FACTORS} for roles in blocks]

    def scored(self, left: Tensor, right: Tensor) -> Tensor:
        """<left_r right_r^T, S> for (l, r, D) twice: (l, b, r)."""
        found = []
        for roles, b, c in zip(self.blocks, left, right, strict=True):
            query = torch.einsum("bkjd,rj->bkdr", roles["query"].sum(2), b)
            key = torch.einsum("bkjd,rj->bkdr", roles["key"], c)
            found.append((query * key).sum((1, 2)))
        return torch.stack(found)

    def rows(self) -> Tensor:
        """r = R 1, (l, b, D)."""
        return torch.stack(
            [
                torch.einsum("bkje,bkqe->bj", roles["value"], roles["out"].sum(4))
                for roles in self.blocks
            ]
        )

    def columns(self, left: Tensor) -> Tensor:
        """phi R for phi (l, n, D): (l, b, D, n)."""
        found = []
        for roles, phi in zip(self.blocks, left, strict=True):
            value = torch.einsum("bkje,nj->bken", roles["value"], phi)
            found.append(torch.einsum("bken,bkej->bjn", value, roles["out"].sum(2)))
        return torch.stack(found)


def products(blocks: Sequence[Roles]) -> Heads:
    """The heads of every block."""
    return Heads(tuple(blocks))


class Probes(nn.Module):
    """`rank` bilinear probes of S: (l, b, rank)."""

    def __init__(self, blocks: int, width: int, rank: int, unit: bool) -> None:
        super().__init__()
        self.left, self.right = (
            nn.Parameter(torch.randn(blocks, rank, width) / width**0.5) for _ in range(2)
        )
        self.standard = BlockStandard(blocks, rank, unit)

    def raw(self, heads: Heads) -> Tensor:
        """The probes before they are standardised."""
        return heads.scored(self.left, self.right)

    def forward(self, heads: Heads) -> Tensor:
        return self.standard(self.raw(heads))


class Equivariant(nn.Module):
    """As `polynomial.Equivariant`, with `rank` numbers between what it gathers and what it says."""

    def __init__(
        self, blocks: int, width: int, c_in: int, c_out: int, rank: int, unit: bool = False
    ) -> None:
        super().__init__()
        self.width, self.c_in, self.c_out = width, c_in, c_out
        d, c, e = width, c_in, c_out
        self.probes = Probes(blocks, d, rank, unit)
        sizes = {"whole": d + c * (2 * d + 2), "neuron": c * (d + 2), "input": c}
        self.standard = nn.ModuleDict({k: BlockStandard(blocks, n, unit) for k, n in sizes.items()})
        self.whole = BlockLinear(blocks, sizes["whole"], rank, bias=False)
        self.whole.share([d, c, c * d, c, c * d])
        self.spread = BlockLinear(blocks, rank, e * (2 * d + 2))
        self.neuron = BlockLinear(blocks, sizes["neuron"], rank, bias=False)
        self.neuron.share([c, c * d, c])
        self.out = BlockLinear(blocks, rank, e * (d + 2), bias=False)
        self.input = BlockLinear(blocks, c, e, bias=False)
        self.columns = nn.Parameter(torch.randn(blocks, e, d) / d**0.5)
        self.entry = nn.Parameter(torch.randn(blocks, e, c) / c**0.5)

    def _gathered(self, heads: Heads, ffn: Feedforward) -> tuple[Tensor, Tensor, Tensor]:
        """Of the whole network (l, b, .), of neurons (l, b A, .), of inputs (l, b D, c)."""
        whole = torch.cat([heads.rows(), shared(ffn)], dim=2)
        inputs = ffn.up.sum(4).transpose(2, 3)
        return whole, neurons(ffn).flatten(1, 2), inputs.flatten(1, 2)

    def fit(self, heads: Heads, ffn: Feedforward) -> None:
        """Set the constants of `unit` from the features of a training set."""
        self.probes.standard.fit(self.probes.raw(heads))
        gathered = self._gathered(heads, ffn)
        for standard, x in zip(self.standard.values(), gathered, strict=True):
            cast("BlockStandard", standard).fit(x)

    def forward(self, heads: Heads, ffn: Feedforward) -> tuple[Heads, Feedforward]:
        e, d, batch = self.c_out, self.width, ffn.up.shape[1]
        pairs = zip(self.standard.values(), self._gathered(heads, ffn), strict=True)
        whole, neuron, input = (standard(x) for standard, x in pairs)
        whole = self.spread(self.whole(whole) + self.probes(heads))
        neuron = self.out(self.neuron(neuron)).unflatten(1, (batch, -1))
        neuron = neuron + whole[:, :, None, : e * (d + 2)]
        column, bias, down = neuron.transpose(2, 3).split([e, e, e * d], dim=2)
        row = self.input(input).unflatten(1, (batch, -1)) + heads.columns(self.columns)
        up = torch.einsum("lec,lbcja->lbeja", self.entry, ffn.up)
        up = up + row.transpose(2, 3)[..., None] + column[:, :, :, None]
        down = down.unflatten(2, (e, d)).transpose(3, 4)
        last = whole[:, :, e * (d + 2) :].unflatten(2, (e, d))
        return heads, Feedforward(up, bias, down, last)

    def pooled(self, heads: Heads, ffn: Feedforward) -> Tensor:
        """`shared` of the ReLU of what `forward` makes of the feed-forward, (l, b, c (2 D + 2))."""
        return shared(self(heads, ffn)[1].relu())

    def mapped(self, heads: Heads) -> Heads:
        """The heads as they are."""
        return heads


class Invariant(nn.Module):
    """As `polynomial.Invariant`, reading `rank` probes of S."""

    def __init__(
        self, blocks: int, width: int, c_in: int, outputs: int, rank: int, unit: bool = False
    ) -> None:
        super().__init__()
        self.probes = Probes(blocks, width, rank, unit)
        sizes = {"rows": width, "ffn": c_in * (2 * width + 2)}
        self.standard = nn.ModuleDict({k: BlockStandard(blocks, n, unit) for k, n in sizes.items()})
        self.scores = BlockLinear(blocks, rank, outputs, bias=False)
        self.rows = BlockLinear(blocks, width, outputs, bias=False)
        self.ffn = BlockLinear(blocks, sizes["ffn"], outputs)

    def fit(self, heads: Heads, ffn: Tensor) -> None:
        """Set the constants of `unit` from the features of a training set."""
        self.probes.standard.fit(self.probes.raw(heads))
        for standard, x in zip(self.standard.values(), (heads.rows(), ffn), strict=True):
            cast("BlockStandard", standard).fit(x)

    def forward(self, heads: Heads, ffn: Tensor) -> Tensor:
        rows, of_ffn = self.standard["rows"], self.standard["ffn"]
        answer = self.ffn(of_ffn(ffn)) + self.scores(self.probes(heads))
        return answer + self.rows(rows(heads.rows()))
