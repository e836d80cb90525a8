"""Features of a transformer's blocks: heads as products, feed-forwards in channels.

    S = sum_h W_Q^h (W_K^h)^T,    R = sum_h W_V^h W_O^h,    r = R 1         (D, D), a channel

What GL of every head leaves alone is seen through S and R. The first axis, l, counts blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Roles = Mapping[str, Tensor]  # of one block, as spaces.Transformer.read gives them
FACTORS = ("query", "key", "value", "out")


class Feedforward(NamedTuple):
    """Features of the feed-forward, c channels: up (l, b, c, D, A), up_bias (l, b, c, A), down
    (l, b, c, A, D), down_bias (l, b, c, D)."""

    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor

    def relu(self) -> Feedforward:
        return Feedforward(*(torch.relu(x) for x in self))


class Maps(NamedTuple):
    """What the layers so far put on the factors: W_Q' = query W_Q for each of c channels, W_K and
    W_V alike, (l, c, D, D); W_O' = W_O (spread 1 1^T + keep I), (l, c)."""

    query: Tensor
    key: Tensor
    value: Tensor
    spread: Tensor
    keep: Tensor


@dataclass(frozen=True)
class Attention:
    """What may be seen of the heads: S and R (l, b, D, D), and the maps on their factors."""

    scores: Tensor
    values: Tensor
    maps: Maps | None = None

    def behind(self, other: Attention) -> Attention:
        """These heads under the maps of `other`."""
        return Attention(self.scores, self.values, other.maps)

    def factors(self, blocks: Sequence[Roles]) -> list[dict[str, Tensor]]:
        """The factors under the maps, what the products stand for: a channel axis behind the
        batch."""
        if self.maps is None:
            return [{role: roles[role][:, None] for role in FACTORS} for roles in blocks]
        found = []
        for roles, q, k, v, *out in zip(blocks, *self.maps, strict=True):
            spread, keep = (x[:, None, None, None, None] for x in out)
            written = roles["out"][:, None]
            found.append(
                {
                    "query": torch.einsum("cij,bkqjd->bckqid", q, roles["query"]),
                    "key": torch.einsum("cij,bkjd->bckid", k, roles["key"]),
                    "value": torch.einsum("cij,bkje->bckie", v, roles["value"]),
                    "out": spread * written.sum(-1, keepdim=True) + keep * written,
                }
            )
        return found

    def channels(self) -> tuple[Tensor, Tensor, Tensor]:
        """S' (l, b, c, D, D), r' (l, b, c, D) and R' (l, b, c, D, D) under the maps."""
        scores, values, m = self.scores, self.values, self.maps
        if m is None:
            return scores[:, :, None], values.sum(3)[:, :, None], values[:, :, None]
        seen = torch.einsum("lcij,lbjk,lcmk->lbcim", m.query, scores, m.key)
        rows = torch.einsum("lcij,lbj->lbci", m.value, values.sum(3))
        columns = torch.einsum("lc,lcij,lbjk->lbcik", m.keep, m.value, values)
        columns = columns + m.spread[:, None, :, None, None] * rows[..., None]
        total = seen.shape[-1] * m.spread + m.keep
        return seen, total[:, None, :, None] * rows, columns


def feedforward(blocks: Sequence[Roles]) -> Feedforward:
    """The feed-forwards in one channel; an absent bias reads as zeros."""
    up, down = (
        torch.stack([roles[name] for roles in blocks])[:, :, None] for name in ("up", "down")
    )
    biases = [
        torch.stack([roles[name] for roles in blocks])[:, :, None]
        if name in blocks[0]
        else up.new_zeros(*up.shape[:3], width)
        for name, width in (("up_bias", up.shape[-1]), ("down_bias", up.shape[-2]))
    ]
    return Feedforward(up, biases[0], down, biases[1])


def products(blocks: Sequence[Roles]) -> Attention:
    """S and R of every block, summed over heads; over the queries of a group before that."""
    pairs = [
        (
            torch.einsum("bkpd,bkrd->bpr", roles["query"].sum(2), roles["key"]),
            torch.einsum("bkpe,bker->bpr", roles["value"], roles["out"].sum(2)),
        )
        for roles in blocks
    ]
    scores, values = (torch.stack(side) for side in zip(*pairs, strict=True))
    return Attention(scores, values)


def shared(ffn: Feedforward) -> Tensor:
    """(l, b, c (2 D + 2)): what of the feed-forward no order of neurons touches, sum W_A, colsum
    W_B, sum b_A, b_B."""
    parts = (ffn.up.sum((3, 4)), ffn.down.sum(3), ffn.up_bias.sum(3), ffn.down_bias)
    return torch.cat([x.flatten(2) for x in parts], dim=2)


def neurons(ffn: Feedforward) -> Tensor:
    """(l, b, A, c (D + 2)): of every hidden neuron colsum W_A, its row of W_B, its bias."""
    parts = (ffn.up.sum(3)[..., None], ffn.down, ffn.up_bias[..., None])
    return torch.cat([x.transpose(2, 3).flatten(3) for x in parts], dim=3)
