"""Polynomial layers of Transformer-NFN: equivariant and invariant maps of a transformer's blocks.

Tran et al., Equivariant Neural Functional Networks for Transformers, arXiv:2410.04209. With

S, R and r of layers/block_features.py, a map that commutes with GL of every head sees queries,
keys, values and outs through S and R, and one on the factors themselves acts on their D axis
alone. Every term of the equivariant layer is then one of few products (a counts hidden neurons of
the feed-forward, j its inputs):

    whole network   [S, r, sum W_A, colsum W_B, sum b_A, b_B]  ->  one number for all of W_A, one
                                       for all of b_A, D for the rows of W_B, D for b_B
    neuron a        [colsum W_A, W_B[a], b_A[a]]               ->  W_A[., a], b_A[a], W_B[a, .]
    input j         [R[., j], rowsum W_A]                      ->  W_A[j, .]
    entry           W_A[j, a]                                  ->  W_A[j, a]

d channels in, e out: e d (2 D^3 + 12 D^2 + 15 D + 12) + e (2 + 2 D) parameters a block. The maps
of the factors, W_Q' = Phi W_Q and so on, commute with the products: S' = Phi_Q S Phi_K^T. They are
composed, and no factor is formed. The first axis, l, counts blocks, which do not interact.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from qemcli.layers.block_features import Attention, Feedforward, Maps, neurons, products, shared
from qemcli.layers.blockwise import BlockLinear, BlockStandard

__all__ = ["Equivariant", "Invariant", "products"]


class Gathered(NamedTuple):
    """What the products read: of the whole network (l, b, .), of neurons (l, b A, .), of inputs
    (l, b D, .)."""

    whole: Tensor
    neuron: Tensor
    input: Tensor


class Equivariant(nn.Module):
    """The equivariant layer (the paper's appendix), c_in -> c_out channels; where `unit`, what it
    gathers is standardised by constants of a training set."""

    def __init__(self, blocks: int, width: int, c_in: int, c_out: int, unit: bool = False) -> None:
        super().__init__()
        self.width, self.c_in, self.c_out = width, c_in, c_out
        d, c, e = width, c_in, c_out
        self.sources = {
            "whole": [c * d * d, c * d, c, c * d, c, c * d],
            "neuron": [c, c * d, c],
            "input": [c * d, c],
        }
        n = {name: sum(sizes) for name, sizes in self.sources.items()}
        self.whole = BlockLinear(blocks, n["whole"], e * (2 * d + 2))
        self.neuron = BlockLinear(blocks, n["neuron"], e * (d + 2), bias=False)
        self.input = BlockLinear(blocks, n["input"], e, bias=False)
        self.entry = nn.Parameter(torch.empty(blocks, e, c))
        self.maps = nn.Parameter(torch.empty(3, blocks, e, c, d, d))  # of query, key, value
        self.out = nn.Parameter(torch.empty(2, blocks, e, c))  # of the sum over k, of the entry
        self.standard = nn.ModuleDict({k: BlockStandard(blocks, v, unit) for k, v in n.items()})
        self.reset()

    def reset(self) -> None:
        """Every term the same share of unit variance, where what is gathered has unit variance."""
        d, c = self.width, self.c_in
        for name, sizes in self.sources.items():
            getattr(self, name).share(sizes)
        nn.init.normal_(self.entry, std=c**-0.5)
        nn.init.normal_(self.maps, std=(c * d) ** -0.5)
        nn.init.normal_(self.out[0], std=c**-0.5 / d)
        nn.init.normal_(self.out[1], std=c**-0.5)

    def _gathered(self, attention: Attention, ffn: Feedforward) -> Gathered:
        scores, rows, columns = attention.channels()
        inputs = torch.cat([columns.flatten(2, 3), ffn.up.sum(4)], dim=2)
        return Gathered(
            torch.cat([scores.flatten(2), rows.flatten(2), shared(ffn)], dim=2),
            neurons(ffn).flatten(1, 2),
            inputs.transpose(2, 3).flatten(1, 2),
        )

    def _read(self, attention: Attention, ffn: Feedforward) -> Gathered:
        pairs = zip(self.standard.values(), self._gathered(attention, ffn), strict=True)
        return Gathered(*(standard(x) for standard, x in pairs))

    def fit(self, attention: Attention, ffn: Feedforward) -> None:
        """Set the constants of `unit` from the features of a training set."""
        gathered = self._gathered(attention, ffn)
        for standard, x in zip(self.standard.values(), gathered, strict=True):
            cast("BlockStandard", standard).fit(x)

    def forward(self, attention: Attention, ffn: Feedforward) -> tuple[Attention, Feedforward]:
        e, d, read = self.c_out, self.width, self._read(attention, ffn)
        whole = self.whole(read.whole)
        ones = whole.shape[:2]
        neuron = self.neuron(read.neuron).unflatten(1, (ones[1], -1))
        neuron = neuron + whole[:, :, None, : e * (d + 2)]
        column, bias, down = neuron.transpose(2, 3).split([e, e, e * d], dim=2)
        row = self.input(read.input).unflatten(1, (ones[1], -1)).transpose(2, 3)
        up = torch.einsum("lec,lbcja->lbeja", self.entry, ffn.up)
        up = up + row[..., None] + column[:, :, :, None]
        down = down.unflatten(2, (e, d)).transpose(3, 4)
        changed = Feedforward(up, bias, down, whole[:, :, e * (d + 2) :].unflatten(2, (e, d)))
        return self.mapped(attention), changed

    def pooled(self, attention: Attention, ffn: Feedforward) -> Tensor:
        """`shared` of the ReLU of what `forward` makes of the feed-forward, (l, b, c (2 D + 2)).

        A ReLU multiplies by 0 or 1, and what it multiplies is a sum of few terms: the sums run
        over the zeros and ones, so that nothing of the size of W_A or W_B is held for the gradient.
        """
        e, d, read = self.c_out, self.width, self._read(attention, ffn)
        whole = self.whole(read.whole)
        neuron, input = (x.unflatten(1, (whole.shape[1], -1)) for x in read[1:])
        ones, rows, entries = [], [], []
        for l, up in enumerate(ffn.up):
            one, mask = self._ones(l, whole[l], neuron[l], input[l], up)
            ones.append(one)
            rows.append(mask.sum(3))
            entries.append(torch.einsum("beja,bcja->bec", mask, up))
        one = torch.stack(ones)
        found = whole[:, :, : e * (d + 2)] * one.sum(2)
        found = found + (neuron.transpose(2, 3) @ one * self.neuron.weight[:, None]).sum(2)
        read_by_row = (torch.stack(rows) @ input * self.input.weight.mT[:, None]).sum(3)
        own = (torch.stack(entries) * self.entry[:, None]).sum(3)
        up, bias, down = found.split([e, e, e * d], dim=2)
        last = torch.relu(whole[:, :, e * (d + 2) :])
        return torch.cat([up + read_by_row + own, down, bias, last], dim=2)

    @torch.no_grad()
    def _ones(
        self, l: int, whole: Tensor, neuron: Tensor, input: Tensor, up: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of block l: 1 where a neuron's number is above 0, (b, A, e (D + 2)), for its column of
        W_A how many of the column are; and 1 where W_A is, (b, e, D, A)."""
        e = self.c_out
        one = torch.matmul(neuron, self.neuron.weight[l]).add_(
            whole[:, None, : e * (self.width + 2)]
        )
        row = torch.matmul(input, self.input.weight[l]).mT[..., None]
        mask = row + one[..., :e].mT[:, :, None]
        if self.c_in == 1:
            mask.addcmul_(self.entry[l][..., None], up)
        else:
            mask.add_(torch.einsum("ec,bcja->beja", self.entry[l], up))
        mask.gt_(0)
        one.gt_(0)
        one[..., :e] = mask.sum(2).mT
        return one, mask

    def mapped(self, attention: Attention) -> Attention:
        """The heads under this layer's maps too."""
        before, (spread, keep) = attention.maps, self.out
        if before is None:
            query, key, value = self.maps[:, :, :, 0].unbind()
            maps = Maps(query, key, value, spread[..., 0], keep[..., 0])
        else:
            pairs = zip(self.maps, before[:3], strict=True)
            left = (torch.einsum("lecij,lcjk->leik", phi, x) for phi, x in pairs)
            whole = self.width * before.spread + before.keep
            summed = spread @ whole[..., None] + keep @ before.spread[..., None]
            query, key, value = left
            maps = Maps(query, key, value, summed[..., 0], (keep @ before.keep[..., None])[..., 0])
        return Attention(attention.scores, attention.values, maps)


class Invariant(nn.Module):
    """The invariant layer: heads in c_in channels and `shared` of the feed-forward -> (l, b,
    outputs).

        <Phi, S> + phi . r + c sum W_A + phi . colsum W_B + c sum b_A + phi . b_B + const

    Phi is carried through the maps to the S of the door, once for the whole batch. c_in outputs
    (D^2 + 3 D + 2) + outputs parameters a block.
    """

    def __init__(
        self, blocks: int, width: int, c_in: int, outputs: int, unit: bool = False
    ) -> None:
        super().__init__()
        self.width, self.outputs = width, outputs
        # Phi[o, e, p, q] lies as (l, e, p, o, q): both products of `_carried` read it in order.
        self.scores = nn.Parameter(torch.empty(blocks, c_in, width, outputs, width))
        self.values = nn.Parameter(torch.empty(blocks, c_in, width, outputs))
        n = {"scores": width**2, "rows": width, "ffn": c_in * (2 * width + 2)}
        self.ffn = BlockLinear(blocks, n["ffn"], outputs)
        self.standard = nn.ModuleDict({k: BlockStandard(blocks, v, unit) for k, v in n.items()})
        self.reset()

    def reset(self) -> None:
        """Every term the same share of unit variance, where what is gathered has unit variance."""
        c, d = self.scores.shape[1], self.width
        nn.init.normal_(self.scores, std=(6 * c) ** -0.5 / d)
        nn.init.normal_(self.values, std=(6 * c * d) ** -0.5)
        self.ffn.share([c, c * d, c, c * d], terms=6)

    def _gathered(self, attention: Attention, ffn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return attention.scores.flatten(2), attention.values.sum(3), ffn

    def fit(self, attention: Attention, ffn: Tensor) -> None:
        """Set the constants of `unit` from the features of a training set."""
        gathered = self._gathered(attention, ffn)
        for standard, x in zip(self.standard.values(), gathered, strict=True):
            cast("BlockStandard", standard).fit(x)

    def forward(self, attention: Attention, ffn: Tensor) -> Tensor:
        pairs = zip(self.standard.values(), self._gathered(attention, ffn), strict=True)
        scores, rows, ffn = (standard(x) for standard, x in pairs)
        of_scores, of_rows = self._carried(attention.maps)
        answer = torch.baddbmm(self.ffn(ffn), scores, of_scores)
        return torch.baddbmm(answer, rows, of_rows)

    def _carried(self, maps: Maps | None) -> tuple[Tensor, Tensor]:
        """(l, D^2, o) and (l, D, o): sum_e query_e^T Phi key_e, and of r alike."""
        d, o = self.width, self.outputs
        if maps is None:
            return self.scores[:, 0].transpose(2, 3).reshape(-1, d * d, o), self.values[:, 0]
        right = torch.matmul(self.scores.flatten(2, 3), maps.key)
        left = torch.bmm(
            maps.query.flatten(1, 2).mT, right.unflatten(2, (d, o)).flatten(1, 2).flatten(2)
        )
        scores = left.unflatten(2, (o, d)).transpose(2, 3).reshape(-1, d * d, o)
        weight = self.values * (d * maps.spread + maps.keep)[..., None, None]
        return scores, torch.bmm(maps.value.flatten(1, 2).mT, weight.flatten(1, 2))
