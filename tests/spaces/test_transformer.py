"""The weight space of transformers: reading and writing whatever the storage, JSON, counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qemcli.errors import InputError, UnsupportedError
from qemcli.spaces import (
    ROLES,
    Block,
    Place,
    Rotary,
    Style,
    Transformer,
    WeightSpace,
    chain_of,
    mlp,
    parse,
    small_transformer,
    transformer_of,
)

D, K, Q, PER, A, Y = 11, 3, 2, 5, 7, 4  # all different; e is 6 where a storage allows it


def storage(**tensors: tuple[str, tuple[int, ...], tuple[str, ...]]) -> Transformer:
    """One block from name -> (axes, sizes, its roles in the order of `c`)."""
    named, places = [], []
    for name, (axes, sizes, roles) in tensors.items():
        named.append(parse(name, axes, sizes))
        fused = len(roles) > 1
        places += [(role, Place(name, i if fused else None)) for i, role in enumerate(roles)]
    return Transformer("test", tuple(named), (Block(tuple(places)),))


QKV = ("query", "key", "value")
STORAGES = {
    "fused columns": storage(
        attn=("r* (c k1 d1)", (D, 3, K, PER), QKV),
        attn_bias=("(c k1 d1)", (3, K, PER), ("query_bias", "key_bias", "value_bias")),
        proj=("(k1 e1)* r", (K, PER, D), ("out",)),
        fc=("r* f1", (D, A), ("up",)),
        out=("f1* r", (A, D), ("down",)),
    ),
    "fused by head": storage(
        qkv=("(k1 c d1) r*", (K, 3, PER, D), QKV),
        dense=("r (k1 e1)*", (D, K, PER), ("out",)),
        fc=("f1 r*", (A, D), ("up",)),
        out=("r f1*", (D, A), ("down",)),
    ),
    "grouped queries": storage(
        q=("(k1 q1 d1) r*", (K, Q, PER, D), ("query",)),
        q_bias=("(k1 q1 d1)", (K, Q, PER), ("query_bias",)),
        k=("(k1 d1) r*", (K, PER, D), ("key",)),
        v=("(k1 e1) r*", (K, 6, D), ("value",)),
        o=("r (k1 q1 e1)*", (D, K, Q, 6), ("out",)),
        gate=("f1 r*", (A, D), ("gate",)),
        up=("f1 r*", (A, D), ("up",)),
        down=("r f1*", (D, A), ("down",)),
    ),
}


def draw(space: Transformer, batch: int = 2) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {n: torch.randn(batch, *s, generator=rng) for n, s in space.shapes.items()}


@pytest.mark.parametrize("space", STORAGES.values(), ids=STORAGES)
def test_write_is_the_inverse_of_read(space: Transformer) -> None:
    w = draw(space)
    blocks = space.read(w)
    back = space.write(w, blocks)
    assert list(back) == list(space.names)
    assert all(torch.equal(back[n], w[n]) for n in w)
    doubled = space.write(w, [{role: 2 * x for role, x in blocks[0].items()}])
    assert all(torch.equal(doubled[n], 2 * w[n]) for n in w)


@pytest.mark.parametrize("space", STORAGES.values(), ids=STORAGES)
def test_read_gives_the_axes_of_the_role_as_views(space: Transformer) -> None:
    w = draw(space)
    k, q, d, e = space.heads[0]
    sizes = {"k": k, "q": q, "d": d, "e": e, "r": D, "f": A}
    held = {x.untyped_storage().data_ptr() for x in w.values()}
    for role, x in space.read(w)[0].items():
        assert x.shape[1:] == tuple(sizes[a] for a in ROLES[role]), role
        assert x.untyped_storage().data_ptr() in held


def test_fused_columns_are_queries_then_keys_then_values() -> None:
    w = draw(STORAGES["fused columns"])
    read = STORAGES["fused columns"].read(w)[0]
    assert torch.equal(read["query"][:, 1, 0], w["attn"][..., PER : 2 * PER])
    assert torch.equal(read["key"][:, 0], w["attn"][..., K * PER : K * PER + PER])
    assert torch.equal(read["value_bias"][:, 2], w["attn_bias"][:, -PER:])
    assert torch.equal(read["out"][:, 1, 0], w["proj"][:, PER : 2 * PER])


def test_fused_by_head_holds_query_key_value_of_a_head_together() -> None:
    w = draw(STORAGES["fused by head"])
    read = STORAGES["fused by head"].read(w)[0]
    assert torch.equal(read["key"][:, 1], w["qkv"][:, 4 * PER : 5 * PER].mT)
    assert torch.equal(read["value"][:, 0], w["qkv"][:, 2 * PER : 3 * PER].mT)


def test_grouped_queries_share_the_key_of_their_group() -> None:
    w = draw(STORAGES["grouped queries"])
    read = STORAGES["grouped queries"].read(w)[0]
    assert torch.equal(read["query"][:, 1, 1], w["q"][:, 3 * PER : 4 * PER].mT)
    assert torch.equal(read["out"][:, 2, 0], w["o"][:, :, 24:30].mT)


def test_the_published_counts() -> None:
    mnist = small_transformer(32, 2, 64, 2, 10, (1, 4))
    text = small_transformer(32, 2, 64, 2, 4)
    assert (mnist.size, text.size) == (18_506, 17_764)
    blocks = sum(t.size for t in mnist.tensors if t not in mnist.outside)
    assert blocks == 16_576
    assert mnist.heads == ((2, 1, 16, 16),) * 2
    assert mnist.widths == (16, 32, 32, 10)
    assert mnist.hidden == {"f1": 64, "f2": 64, "h1": 32}


def test_plain_blocks_share_no_stream() -> None:
    space = small_transformer(6, 3, 7, 2, 4)
    names = {axis.name for t in space.tensors for axis in t.axes}
    assert {"r0", "m1", "r1", "m2", "r2"} <= names
    assert "r" not in names
    assert space.width == 6


def test_json_round_trip() -> None:
    style = Style("silu", "rms", "pre", Rotary("half", 4), tied=True)
    space = replace(STORAGES["grouped queries"], style=style)
    for one in (space, small_transformer(6, 2, 9, 3, 4, (3, 2))):
        again = WeightSpace.from_json(one.to_json())
        assert again == one
        assert again.fits(one)
    assert not space.fits(STORAGES["grouped queries"])
    assert hash(space) != hash(STORAGES["grouped queries"])


def test_what_is_no_transformer_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="is for transformers; these networks are mlp"):
        transformer_of(mlp([2, 3, 1]), "this")
    with pytest.raises(UnsupportedError, match="small-transformer of 2 blocks, width 6, 3 heads"):
        chain_of(small_transformer(6, 3, 7, 2, 4), "this")
    with pytest.raises(InputError, match="4 heads do not divide a width of 6"):
        small_transformer(6, 4, 7, 2, 4)
