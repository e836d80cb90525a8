"""Attention among the weights of a network: what NFT is made of.

Zhou et al., Neural Functional Transformers, arXiv:2305.13546. All entries of all tensors stand in
one sequence (b, D, C), weights before biases. At neuron layer i = 0..L, everything that touches its
neurons is a token, a vector over them (and over the channels of a head):

    the columns of W_i, b_i, and the rows of W_{i+1}:       softmax(Q K^T / sqrt(n_i C_head)) V

so permuting layer i leaves the scores alone, and permuting its neighbours permutes the tokens. A
weight is a token at both ends, and gets both answers; the means of the tensors are 2 L tokens more,
whose answers all entries of a tensor get.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from qemcli.errors import UsageError
from qemcli.layers.features import Features
from qemcli.spaces import WeightSpace


class Sequence:
    """How the tensors of a space stand in one sequence: W_1, ..., W_L, b_1, ..., b_L, row by
    row."""

    def __init__(self, space: WeightSpace) -> None:
        self.shapes = [(la.rows, la.cols) for la in space.layers]
        self.rows = [rows for rows, _ in self.shapes]
        self.sizes = [rows * cols for rows, cols in self.shapes] + self.rows
        self.weights = sum(self.sizes[: len(self.rows)])

    def join(self, features: Features) -> Tensor:
        """Features whose last axis has one length C everywhere -> (b, D, C)."""
        return torch.cat([w.flatten(1, 2) for w, _ in features] + [b for _, b in features], dim=1)

    def split(self, x: Tensor) -> Features:
        """The inverse of `join`."""
        parts = x.split(self.sizes, dim=1)
        half = len(self.shapes)
        matrices = [w.unflatten(1, s) for w, s in zip(parts[:half], self.shapes, strict=True)]
        return list(zip(matrices, parts[half:], strict=True))

    def owners(self) -> Tensor:
        """(D,): the tensor that each entry belongs to."""
        return torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))


class NeighbourAttention(nn.Module):
    """Attention at every neuron layer and among the tensors' means: (b, D, C) -> (b, D, C).

    Commutes with permutations of all neurons, inputs and outputs included. The maps to queries,
    keys and values are one for columns, one for rows, one for biases and one for means, the same in
    every layer: what layer an entry is of has to be in its channels.
    """

    owners: Tensor

    def __init__(self, space: WeightSpace, channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise UsageError(
                f"{channels} channels do not divide into {heads} heads", "choose a divisor"
            )
        self.sequence, self.heads = Sequence(space), heads
        self.columns = nn.Linear(channels, 3 * channels)
        self.rows = nn.Linear(channels, 3 * channels)
        self.biases = nn.Linear(channels, 3 * channels)
        self.means = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.register_buffer("owners", self.sequence.owners(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        sequence = self.sequence
        weights, biases = x[:, : sequence.weights], x[:, sequence.weights :]
        biases = self.biases(biases)
        columns = sequence.split(torch.cat([self.columns(weights), biases], dim=1))
        rows = sequence.split(torch.cat([self.rows(weights), biases], dim=1))
        answers: Features = []
        above = self._attend(rows[0][0])  # the rows of W_1, at the inputs
        for l, (column, bias) in enumerate(columns, start=1):
            tokens = [column.transpose(1, 2), bias[:, None]]
            if l < len(columns):
                tokens.append(rows[l][0])
            sizes = [t.shape[1] for t in tokens]
            answer = self._attend(torch.cat(tokens, dim=1)).split(sizes, dim=1)
            answers.append((answer[0].transpose(1, 2) + above, answer[1][:, 0]))
            above = answer[-1]
        means = torch.stack([part.mean(1) for part in x.split(sequence.sizes, dim=1)], dim=1)
        everywhere = self._attend(self.means(means)[:, :, None])[:, :, 0]
        return self.out(sequence.join(answers) + everywhere[:, self.owners])

    def _attend(self, tokens: Tensor) -> Tensor:
        """(b, t, n, 3 C): queries, keys and values of t tokens over n neurons -> (b, t, n, C)."""
        split = tokens.unflatten(-1, (3, self.heads, -1))
        q, k, v = torch.einsum("btnqhc->qbhtnc", split).flatten(-2)
        answer = scaled_dot_product_attention(q, k, v).unflatten(-1, (tokens.shape[2], -1))
        return torch.einsum("bhtnc->btnhc", answer).flatten(-2)


class Block(nn.Module):
    """x + drop(attention(norm x)), then x + drop(feed-forward(norm x)): (b, D, C) -> (b, D, C).

    The norms are over the channels of an entry; whole channels of a network are dropped.
    """

    def __init__(
        self, space: WeightSpace, channels: int, heads: int, widening: int, dropout: float
    ) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention = NeighbourAttention(space, channels, heads)
        wide = widening * channels
        self.forth = nn.Sequential(nn.Linear(channels, wide), nn.GELU(), nn.Linear(wide, channels))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._dropped(self.attention(self.first(x)))
        return x + self._dropped(self.forth(self.second(x)))

    def _dropped(self, x: Tensor) -> Tensor:
        if not self.training or self.dropout.p == 0:
            return x
        return x * self.dropout(torch.ones_like(x[:, :1]))
