"""Balance of transformers: the point of smallest norm on a network's orbit, and one point of it.

For every head min_M |W_Q M|^2 + |W_K M^-T|^2 is reached at W_Q = U s^1/2 O, W_K = V s^1/2 O with
W_Q W_K^T = U s V^T and O any orthogonal matrix (Kempf and Ness; for V and O alike). Here O = I:
the numbers of a head stand by falling singular value, and the largest entry of each column of the
queries (of the values) is positive. What queries of a group share is stacked, biases are rows.

    B(g w) = pi B(w)     for GL, bias shifts and neurons' scales and signs in g, pi orders alone

Singular values that repeat leave their basis open: then B has the smallest norm and computes the
same function, but is not the same along the orbit; a model that reads S and R alone does not see
it. Values below RANK of the largest count as zero: their numbers become zeros, the limit of the
minimum. Where positions rotate queries and keys, only a scale and an angle of each pair are free:
pairs get equal norms, and sum (q_a + i q_b)^2 > 0 with its largest entry positive.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qemcli.balance import balance
from qemcli.groups import allowed
from qemcli.residual_balance import balance_residual
from qemcli.spaces import Residual, Rotary, Transformer, WeightSpace, chain_of

RANK = 1e-12  # a singular value this small beside the largest is zero
Roles = dict[str, Tensor]


def balance_transformer(space: Transformer, w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The balanced networks, dict of (b, *shape) in the dtype of `w`, through float64.

    Networks with a weight that is not finite are left as they are. Raises InputError where `w` is
    not of this space.
    """
    space.check(w)
    finite = torch.stack([w[t.name].flatten(1).isfinite().all(1) for t in space.tensors]).all(0)
    exact = {t.name: _where(finite, w[t.name].double(), None) for t in space.tensors}
    free = {group: allowed(group, space) is None for group in ("shift", "scale", "sign")}
    blocks = [_block(space.rotary, dict(roles), free) for roles in space.read(exact)]
    moved = space.write(exact, blocks) | _classifier(space, exact, free)
    return {
        t.name: _where(finite, moved[t.name].to(w[t.name].dtype), w[t.name]) for t in space.tensors
    }


def _where(mask: Tensor, x: Tensor, other: Tensor | None) -> Tensor:
    mask = mask.reshape(-1, *([1] * (x.dim() - 1)))
    return torch.where(mask, x, torch.zeros_like(x) if other is None else other)


def _block(rotary: Rotary, roles: Roles, free: Mapping[str, bool]) -> Roles:
    if free["shift"]:
        roles = _unshifted(rotary, roles)
    roles = _scores(rotary, roles)
    roles = _values(roles)
    incoming: dict[str, int] = {r: (2 if r == "up" else 1) for r in ("up", "up_bias") if r in roles}
    return roles | _neurons(roles, incoming, {"down": 1}, free)


def _unshifted(rotary: Rotary, roles: Roles) -> Roles:
    """The bias of keys taken off, that of values put behind the heads."""
    new = dict(roles)
    if "key_bias" in roles and not rotary.dims:
        new["key_bias"] = torch.zeros_like(roles["key_bias"])
    if {"value_bias", "out_bias"} <= set(roles):
        through = torch.einsum("bke,bkqer->br", roles["value_bias"], roles["out"])
        new["out_bias"] = roles["out_bias"] + through
        new["value_bias"] = torch.zeros_like(roles["value_bias"])
    return new


def _scores(rotary: Rotary, roles: Roles) -> Roles:
    """Queries and keys of a group as two stacks of rows, (b, K, rows, d)."""
    query, key = roles["query"].flatten(2, 3), roles["key"]
    rows, columns = query.shape[2], key.shape[2]
    if "query_bias" in roles:
        query = torch.cat([query, roles["query_bias"]], dim=2)
    if "key_bias" in roles:
        key = torch.cat([key, roles["key_bias"][:, :, None]], dim=2)
    n = rotary.dims
    turned = _pairs(rotary, query[..., :n], key[..., :n])
    free = _smallest(query[..., n:], key[..., n:])
    query, key = (torch.cat(both, dim=3) for both in zip(turned, free, strict=True))
    new = roles | {"query": query[:, :, :rows].reshape(roles["query"].shape)}
    new["key"] = key[:, :, :columns]
    if "query_bias" in roles:
        new["query_bias"] = query[:, :, rows:]
    if "key_bias" in roles:
        new["key_bias"] = key[:, :, columns]
    return new


def _values(roles: Roles) -> Roles:
    value, out = roles["value"], roles["out"].transpose(2, 3)  # (b, K, e, Q, r)
    rows = value.shape[2]
    if "value_bias" in roles:
        value = torch.cat([value, roles["value_bias"][:, :, None]], dim=2)
    value, written = _smallest(value, out.flatten(3).mT)
    new = roles | {"value": value[:, :, :rows]}
    new["out"] = written.mT.reshape(out.shape).transpose(2, 3)
    if "value_bias" in roles:
        new["value_bias"] = value[:, :, rows]
    return new


def _smallest(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(.., p, n) and (.., q, n) -> the pair of smallest norm with the same a b^T."""
    n = a.shape[-1]
    if not n:
        return a, b
    (qa, ra), (qb, rb) = torch.linalg.qr(a), torch.linalg.qr(b)
    u, s, vh = torch.linalg.svd(ra @ rb.mT, full_matrices=False)
    root = torch.where(s > RANK * s[..., :1], s, torch.zeros_like(s)).sqrt()[..., None, :]
    left, right = qa @ u * root, qb @ vh.mT * root
    sign = _signs(left)
    both = (torch.nn.functional.pad(x * sign, (0, n - x.shape[-1])) for x in (left, right))
    return next(both), next(both)


def _signs(x: Tensor) -> Tensor:
    """(.., p, n) -> (.., 1, n): the sign of the entry of largest size of every column, 1 for 0."""
    at = x.abs().argmax(dim=-2, keepdim=True)
    sign = x.gather(-2, at).sign()
    return torch.where(sign == 0, torch.ones_like(sign), sign)


def _pairs(rotary: Rotary, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated queries and keys, as complex numbers a pair: equal norms, and one angle."""
    if not rotary.dims:
        return query, key
    half = rotary.pairing == "half"

    def paired(x: Tensor) -> Tensor:
        x = x.unflatten(3, (2, -1)).transpose(3, 4) if half else x.unflatten(3, (-1, 2))
        return torch.view_as_complex(x.contiguous())

    def unpaired(z: Tensor) -> Tensor:
        x = torch.view_as_real(z)
        return (x.transpose(3, 4) if half else x).flatten(3)

    q, k = paired(query), paired(key)
    sizes = [z.abs().square().sum(2, keepdim=True).sqrt() for z in (q, k)]
    alive = (sizes[0] > 0) & (sizes[1] > 0)
    ratio = torch.where(alive, sizes[1] / sizes[0], torch.ones_like(sizes[0])).sqrt()
    angle = (q * q).sum(2, keepdim=True).angle() / 2
    turn = torch.polar(alive.to(ratio.dtype), -angle)
    q, k = q * turn * ratio, k * turn / ratio
    sign = _signs(q.real)
    return unpaired(q * sign), unpaired(k * sign)


def _neurons(
    w: Mapping[str, Tensor],
    incoming: Mapping[str, int],
    outgoing: Mapping[str, int],
    free: Mapping[str, bool],
) -> Roles:
    """Neurons whose incoming and outgoing norms are the same, on the given dimensions of the
    tensors; a dead one is all zeros."""
    rows = torch.cat(
        [
            w[n].movedim(dim, 1).flatten(2) if w[n].dim() > 2 else w[n][..., None]
            for n, dim in incoming.items()
        ],
        dim=2,
    )
    sizes = rows.square().sum(2).sqrt()
    leaving = sum(
        (w[n].movedim(d, 1).flatten(2).square().sum(2) for n, d in outgoing.items()),
        torch.zeros_like(sizes),
    ).sqrt()
    factor = torch.ones_like(sizes)
    alive = factor
    if free["scale"]:
        live = (sizes > 0) & (leaving > 0)
        factor = torch.where(live, leaving / sizes, factor).sqrt()
        alive = live.to(sizes.dtype)
    if free["sign"]:
        factor = factor * _signs(rows.mT)[:, 0]
    up = {n: _times(w[n], factor * alive, dim) for n, dim in incoming.items()}
    return up | {n: _times(w[n], alive / factor, dim) for n, dim in outgoing.items()}


def _times(x: Tensor, factor: Tensor, dim: int) -> Tensor:
    return x * factor.reshape(len(x), *([1] * (dim - 1)), -1, *([1] * (x.dim() - dim - 1)))


def _classifier(
    space: Transformer, w: Mapping[str, Tensor], free: Mapping[str, bool]
) -> dict[str, Tensor]:
    """The classifier's neurons, where there is one."""
    found: dict[bool, dict[str, int]] = {False: {}, True: {}}
    for t in space.outside:
        for dim, axis in enumerate(t.axes, start=1):
            if axis.name == "h1":
                found[axis.dual][t.name] = dim
    if not (found[False] and found[True]):
        return {}
    return _neurons(w, found[False], found[True], free)


def representative(space: WeightSpace, w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The balanced networks of any space, dict of (b, *shape)."""
    if isinstance(space, Transformer):
        return balance_transformer(space, w)
    if isinstance(space, Residual):
        return balance_residual(space, w)[0]
    return balance(chain_of(space, "balance"), w)[0]
