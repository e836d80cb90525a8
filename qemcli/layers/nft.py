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

from qemcli.errors import UsageError
from qemcli.layers.features import Features
from qemcli.spaces import Chain


class Sequence:
    """How the tensors of a space stand in one sequence: W_1, ..., W_L, b_1, ..., b_L, row by
    row."""

    def __init__(self, space: Chain) -> None:
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


class Heads(nn.Module):
    """Multi-head attention among tokens of n vectors: (b, t, n, C) -> (b, t, n, C).

    Scores are summed over the n vectors. A map of its own for the queries, keys and values of every
    head: what they write lies as attention reads it, and nothing is copied.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise UsageError(
                f"{channels} channels do not divide into {heads} heads", "choose a divisor"
            )
        width = channels // heads
        self.maps = nn.ModuleList(nn.Linear(channels, width) for _ in range(3 * heads))
        self.out = nn.ModuleList(nn.Linear(width, channels, bias=False) for _ in range(heads))

    def forward(self, tokens: Tensor) -> Tensor:
        heads = []
        for h, out in enumerate(self.out):
            read = self.maps[3 * h : 3 * h + 3]
            query, key, value = (part(tokens).flatten(2) for part in read)
            scores = (query / query.shape[-1] ** 0.5) @ key.transpose(1, 2)
            answer = scores.softmax(-1) @ value
            heads.append(out(answer.unflatten(-1, (tokens.shape[2], -1))))
        return torch.stack(heads).sum(0) if len(heads) > 1 else heads[0]


class NeighbourAttention(nn.Module):
    """Attention at every neuron layer and among the tensors' means: (b, D, C) -> (b, D, C).

    Commutes with permutations of every layer's neurons, inputs and outputs included. Every neuron
    layer has its own maps, shared by the three kinds of tokens: of what tensor an entry is has to
    be in its channels.
    """

    def __init__(self, space: Chain, channels: int, heads: int) -> None:
        super().__init__()
        self.sequence = Sequence(space)
        self.neurons = nn.ModuleList(Heads(channels, heads) for _ in space.widths)
        self.means = Heads(channels, heads)

    def forward(self, x: Tensor) -> Tensor:
        features = self.sequence.split(x)
        means = torch.stack([part.mean(1) for part in x.split(self.sequence.sizes, dim=1)], dim=1)
        everywhere = self.means(means[:, :, None])
        answers: Features = []
        above = self.neurons[0](features[0][0])  # the rows of W_1, at the inputs
        for l, (weight, bias) in enumerate(features, start=1):
            tokens = [weight.transpose(1, 2), bias[:, None]]
            if l < len(features):
                tokens.append(features[l][0])
            sizes = [t.shape[1] for t in tokens]
            answer = self.neurons[l](torch.cat(tokens, dim=1)).split(sizes, dim=1)
            above = above + everywhere[:, l - 1, None]
            both = answer[0].transpose(1, 2) + above
            answers.append((both, answer[1][:, 0] + everywhere[:, len(features) + l - 1]))
            above = answer[-1]
        return self.sequence.join(answers)


class Block(nn.Module):
    """x + drop(attention(norm x)), then x + drop(feed-forward(norm x)): (b, D, C) -> (b, D, C).

    The norms are over the channels of an entry; whole channels of a network are dropped.
    """

    def __init__(
        self, space: Chain, channels: int, heads: int, widening: int, dropout: float
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
