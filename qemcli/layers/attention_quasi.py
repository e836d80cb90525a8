"""Quasi layers for attention: what alpha(x) does to the factors of every head, on their own side.

The maps of the equivariant layers act on the D axis of the factors, alpha on the axis inside a
head: they commute, so alpha is put on the weights themselves and its products carried through the
maps. Behind a head that reads S and R alone (layers/block_features.py), with M and N one matrix a
key/value group:

    paper      Q M, K M^-T, V N, N^-1 O      S and R are as before: a NO-OP, whatever M and N
    released   Q M^T, K M^-1, V N, N O       R is not: the output projection is multiplied where the
                                             text divides, and invariance to GL and heads is lost
    exact      Q P(C_k), P(C_v) O            C_k = K^T Q, C_v = O V go to M^-1 C_k M under GL, and
                                             P(C) = I + sum_j a_j (C / |C|)^j with them
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qemcli.errors import UsageError
from qemcli.layers.block_features import Roles
from qemcli.layers.blockwise import BlockLinear, BlockNorm
from qemcli.layers.statistics import compressed, seven
from qemcli.registry import suggest
from qemcli.spaces import Transformer

BOUND = 0.9  # of |eps| |sin(.)| in the spectral norm: I + eps sin(.) has a condition below 19
SINGULAR = 1e6  # the condition above which an unbounded matrix counts as singular
READ = ("query", "key", "value", "out", "up", "down", "up_bias", "down_bias")
WIDTH = 32  # hidden numbers of the maps, as published
DEGREE = 3  # of the polynomials of `exact`
MODES = ("none", "paper", "released", "exact")
Blocks = list[dict[str, Tensor]]


def statistics(blocks: Sequence[Roles]) -> Tensor:
    """(b, 56 L): seven statistics of the eight tensors of every block, heads pooled."""
    read = [roles[role].flatten(1) for roles in blocks for role in READ if role in roles]
    return torch.cat([seven(x) for x in read], dim=1)


class Matrices(nn.Module):
    """phi(x) -> I + eps sin(h(phi)), one n x n matrix a key/value group of each block; (l, b, K, n,
    n).

    `raw` eps as published: singular matrices begin near |eps| = .3 and are refused. Else eps is
    .9 tanh(eps / .9) / n, which keeps every matrix invertible, since |sin(.)| < n.
    """

    def __init__(
        self,
        blocks: int,
        inputs: int,
        groups: int,
        n: int,
        eps: float,
        learned: bool,
        raw: bool,
        width: int = WIDTH,
    ) -> None:
        super().__init__()
        self.shape, self.raw = (groups, n, n), raw
        self.first = BlockLinear(blocks, inputs, width)
        self.norm = BlockNorm(blocks, width)
        self.last = BlockLinear(blocks, width, groups * n * n)
        for linear in (self.first, self.last):
            for weight in linear.weight.data:
                nn.init.xavier_uniform_(weight)
        self.eps: Tensor
        _keep_eps(self, blocks, eps, learned)

    def forward(self, phi: Tensor) -> Tensor:
        phi = phi.expand(len(self.eps), *phi.shape)
        angle = self.last(torch.relu(self.norm(self.first(phi)))).unflatten(2, self.shape)
        n = self.shape[-1]
        eps = self.eps if self.raw else BOUND * torch.tanh(self.eps / BOUND) / n
        one = torch.eye(n, dtype=angle.dtype, device=angle.device)
        matrices = one + eps[:, None, None, None, None] * torch.sin(angle)
        if self.raw:
            _require_regular(matrices.detach())
        return matrices


def _keep_eps(module: nn.Module, blocks: int, eps: float, learned: bool) -> None:
    """One eps a block, as the module's parameter or as a constant that is saved with it."""
    size = torch.full((blocks,), eps)
    if learned:
        module.eps = nn.Parameter(size)
    else:
        module.register_buffer("eps", size)


def _require_regular(matrices: Tensor) -> None:
    sizes = torch.linalg.svdvals(matrices)
    worst = float((sizes[..., 0] / sizes[..., -1]).max())
    if not worst <= SINGULAR:
        raise UsageError(
            f"the quasi layer's matrices are all but singular: condition {worst:.1e}",
            "choose bound safe, or a smaller eps",
        )


def solved(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix^-1 x; (b, K, n, n) and (b, K, n, .)."""
    return torch.linalg.solve(matrix, x)


class _Twisted(nn.Module):
    """What `paper` and `released` share: M of queries and keys, N of values and outputs."""

    def __init__(
        self, space: Transformer, eps: float, learned: bool, raw: bool, width: int = WIDTH
    ) -> None:
        super().__init__()
        groups, _, keys, values = space.heads[0]
        roles = [role for block in space.blocks for role in block.roles if role in READ]
        sizes = len(space.blocks), 7 * len(roles), groups
        self.keys = Matrices(*sizes, keys, eps, learned, raw, width)
        self.values = Matrices(*sizes, values, eps, learned, raw, width)


class Paper(_Twisted):
    """The text: an element of GL, the same for all channels. A no-op behind an exact head."""

    strict = False  # equivariant up to an element of its own
    keeps_invariance = True  # as S and R are the same

    def forward(self, blocks: Sequence[Roles]) -> Blocks:
        phi = statistics(blocks)
        found = []
        for roles, m, n in zip(blocks, self.keys(phi), self.values(phi), strict=True):
            changed = {
                "query": torch.einsum("bkqjd,bkde->bkqje", roles["query"], m),
                "key": solved(m, roles["key"].mT).mT,
                "value": torch.einsum("bkjd,bkde->bkje", roles["value"], n),
                "out": solved(n[:, :, None], roles["out"]),
            }
            found.append({**roles, **changed})
        return found


class Released(_Twisted):
    """The released code: N W_O where the text has N^-1 W_O, and M transposed."""

    strict = False
    keeps_invariance = False

    def forward(self, blocks: Sequence[Roles]) -> Blocks:
        phi = statistics(blocks)
        found = []
        for roles, m, n in zip(blocks, self.keys(phi), self.values(phi), strict=True):
            changed = {
                "query": torch.einsum("bkqjd,bked->bkqje", roles["query"], m),
                "key": solved(m.mT, roles["key"].mT).mT,
                "value": torch.einsum("bkjd,bkde->bkje", roles["value"], n),
                "out": torch.einsum("bkde,bkqej->bkqdj", n, roles["out"]),
            }
            found.append({**roles, **changed})
        return found


class Exact(nn.Module):
    """Ours: polynomials of C_k and C_v, a_j = eps sin(h(.)) from what GL leaves alone in the head
    itself and from statistics of the feed-forward; one map a block, shared by its heads."""

    strict = True
    keeps_invariance = True

    def __init__(self, space: Transformer, eps: float, learned: bool, width: int = WIDTH) -> None:
        super().__init__()
        blocks = len(space.blocks)
        ffn = sum(role in READ[4:] for role in space.blocks[0].roles)
        self.first = BlockLinear(blocks, 2 * (1 + DEGREE) + 7 * ffn, width)
        self.last = BlockLinear(blocks, width, 2 * DEGREE)
        self.eps: Tensor
        _keep_eps(self, blocks, eps, learned)

    def forward(self, blocks: Sequence[Roles]) -> Blocks:
        seen = [self._seen(roles) for roles in blocks]
        features = torch.stack([features for features, _, _ in seen])
        batch, heads = features.shape[1:3], features.shape[3]
        hidden = torch.tanh(self.first(features.flatten(1, 3)))
        angle = self.last(hidden).unflatten(1, (*batch, heads))
        weights = self.eps[:, None, None, None, None] * torch.sin(angle)
        found = []
        for roles, (_, of_keys, of_values), a in zip(blocks, seen, weights, strict=True):
            query = roles["query"] @ _polynomial(of_keys, a[..., :DEGREE])
            out = _polynomial(of_values, a[..., DEGREE:]) @ roles["out"]
            found.append({**roles, "query": query, "out": out})
        return found

    def _seen(self, roles: Roles) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """(b, K, Q, features), and the powers of C_k / |S| and C_v / |R| of every head."""
        (query, one), (key, two), (value, three), (out, four) = (_sized(roles[r]) for r in READ[:4])
        key, value, two, three = (x[:, :, None] for x in (key, value, two, three))
        pairs = (
            (key.mT @ query, (query.mT @ query), (key.mT @ key), one * two),
            (out @ value, (value.mT @ value), (out @ out.mT), three * four),
        )
        parts, powers = [], []
        for c, left, right, scale in pairs:
            least = torch.finfo(c.dtype).eps  # a head that answers nothing has a polynomial of 0
            square = (left * right.mT).sum((-2, -1))  # |S|^2, from small matrices
            size = square.clamp_min(least**2).sqrt()
            c = c / size[..., None, None]
            found = [c]
            while len(found) < DEGREE:
                found.append(found[-1] @ c)
            parts += [
                compressed(size * scale),
                *(x.diagonal(dim1=-2, dim2=-1).sum(-1) for x in found),
            ]
            powers.append(found)
        ffn = [seven(roles[role].flatten(1)) for role in READ[4:] if role in roles]
        others = compressed(torch.cat(ffn, dim=1))[:, None, None].expand(*query.shape[:3], -1)
        return torch.cat([torch.stack(parts, dim=-1), others], dim=-1), powers[0], powers[1]


def _sized(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., n, m) -> the same over its largest entry, and that entry (...): heads that weight decay
    has brought to 1e-11 have products that no float32 holds."""
    largest = x.abs().amax((-2, -1)).clamp_min(torch.finfo(x.dtype).tiny)
    return x / largest[..., None, None], largest


def _polynomial(powers: list[Tensor], weights: Tensor) -> Tensor:
    """I + sum_j weights[..., j] powers[j]."""
    n = powers[0].shape[-1]
    total = torch.eye(n, dtype=weights.dtype, device=weights.device)
    for j, power in enumerate(powers):
        total = total + weights[..., j, None, None] * power
    return total


def make(
    mode: str, space: Transformer, eps: float, learned: bool, raw: bool, width: int = WIDTH
) -> Paper | Released | Exact | None:
    """The quasi layer of a mode, its maps of one hidden layer so wide; None for `none`."""
    if mode == "paper":
        return Paper(space, eps, learned, raw, width)
    if mode == "released":
        return Released(space, eps, learned, raw, width)
    if mode == "exact":
        return Exact(space, eps, learned, width)
    if mode == "none":
        return None
    hint = "'balanced' stands in front of a predictor, not inside an architecture"
    raise UsageError(
        f"no quasi layer is called '{mode}'",
        hint if mode == "balanced" else suggest(mode, list(MODES)),
    )
