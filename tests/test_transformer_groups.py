"""Groups of transformers: the action's axioms, with grouped queries and the stream; small
transformers keep their function, and zoos of them are augmented."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qemcli import groups, testing
from qemcli.controls import controls
from qemcli.errors import InputError
from qemcli.functions import probe_inputs
from qemcli.groups.general_linear import commuting, conditioned
from qemcli.groups.scale import Scales
from qemcli.spaces import (
    Block,
    Place,
    Rotary,
    Style,
    Transformer,
    WeightSpace,
    mlp,
    parse,
    small_transformer,
)
from qemcli.zoos.store import Store

BATCH = 3
SMALL = small_transformer(12, 3, 20, 2, 5, (2, 3))
TEXT = small_transformer(12, 3, 20, 1, 7)
TINY = mlp([3, 4, 2])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grouped(norm: str = "rms") -> Transformer:
    """Two groups of three query heads, biases everywhere, a gate, rotated in part; D 10, d 5, e 7,
    A 11."""
    rows = {
        "norm1.weight": ("r", (10,), "norm1"),
        "norm1.bias": ("r", (10,), "norm1_shift"),
        "q.weight": ("(k1 q1 d1) r*", (2, 3, 5, 10), "query"),
        "q.bias": ("(k1 q1 d1)", (2, 3, 5), "query_bias"),
        "k.weight": ("(k1 d1) r*", (2, 5, 10), "key"),
        "k.bias": ("(k1 d1)", (2, 5), "key_bias"),
        "v.weight": ("(k1 e1) r*", (2, 7, 10), "value"),
        "v.bias": ("(k1 e1)", (2, 7), "value_bias"),
        "o.weight": ("r (k1 q1 e1)*", (10, 2, 3, 7), "out"),
        "o.bias": ("r", (10,), "out_bias"),
        "norm2.weight": ("r", (10,), "norm2"),
        "gate.weight": ("f1 r*", (11, 10), "gate"),
        "up.weight": ("f1 r*", (11, 10), "up"),
        "down.weight": ("r f1*", (10, 11), "down"),
    }
    inner = [parse(name, axes, sizes) for name, (axes, sizes, _) in rows.items()]
    outside = [
        parse("embed.weight", "v r", (13, 10)),
        parse("norm.weight", "r", (10,)),
        parse("head.weight", "v r*", (13, 10)),
    ]
    block = Block(tuple((role, Place(name)) for name, (_, _, role) in rows.items()))
    style = Style("silu", norm, "pre", Rotary("half", 2))
    return Transformer("grouped", (*inner, *outside), (block,), style)


def networks(space: WeightSpace, seed: int = 0, batch: int = BATCH) -> dict[str, Tensor]:
    generator = seeded(seed)
    return {
        name: torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
        for name, shape in space.shapes.items()
    }


def gap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return max(float((a[n] - b[n]).abs().max() / a[n].abs().max()) for n in a)


def draw(space: Transformer, names: tuple[str, ...], seed: int) -> groups.Element:
    """The product of one element of each group."""
    drawn = [groups.sample(name, space, BATCH, seeded(seed + i)) for i, name in enumerate(names)]
    g = drawn[0]
    for h in drawn[1:]:
        g = groups.compose(h, g)
    return g


PRODUCTS = [
    ("heads", "general-linear", "shift", "stream", "monomial"),
    ("general-linear", "heads", "permutation"),
    ("stream", "orthogonal"),
    ("shift", "heads"),
]


@pytest.mark.parametrize("names", PRODUCTS, ids="+".join)
def test_acting_is_an_action(names: tuple[str, ...]) -> None:
    space = grouped()
    if "orthogonal" in names:  # gains are folded once: begin where they are
        w = groups.act(groups.sample("orthogonal", space, BATCH, seeded(9)), space, networks(space))
    else:
        w = networks(space)
    allowed = tuple(name for name in names if groups.allowed(name, space) is None)
    g, h = draw(space, allowed, 1), draw(space, allowed[::-1], 7)
    both = groups.act(g, space, groups.act(h, space, w))
    assert gap(both, groups.act(groups.compose(g, h), space, w)) < 1e-12
    assert gap(both, w) > 0.1
    assert gap(w, groups.act(groups.inverse(g), space, groups.act(g, space, w))) < 1e-11


def test_value_biases_shift_into_the_output_bias() -> None:
    space = grouped()
    w = networks(space)
    g = groups.sample("shift", space, BATCH, seeded(0))
    assert set(g.shift) == {"e1"}  # the key bias is rotated
    moved = groups.act(g, space, w)
    heads = [space.read(x)[0] for x in (w, moved)]
    sums = [x["out_bias"] + torch.einsum("bke,bkqer->br", x["value_bias"], x["out"]) for x in heads]
    assert gap({"sum": sums[0]}, {"sum": sums[1]}) < 1e-12
    assert gap(w, moved) > 0.1


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_matrices_commute_with_rotations(pairing: str) -> None:
    d, dims = 7, 4
    m = commuting(Rotary(pairing, dims), (5,), d, seeded(0), Scales(0.5, 2.0))
    turn = torch.eye(d, dtype=torch.float64)
    pairs = [(0, 2), (1, 3)] if pairing == "half" else [(0, 1), (2, 3)]
    for (i, j), angle in zip(pairs, (0.7, 2.1), strict=True):
        c, s = torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))
        turn[i, i] = turn[j, j] = c
        turn[i, j], turn[j, i] = -s, s
    assert float((m @ turn - turn @ m).abs().max()) < 1e-14
    free = conditioned((5,), d, seeded(0), Scales(0.5, 2.0))
    assert float((free @ turn - turn @ free).abs().max()) > 0.1


def test_the_scale_range_bounds_the_condition() -> None:
    m = conditioned((50,), 6, seeded(0), Scales(0.25, 4.0))
    values = torch.linalg.svdvals(m)
    assert float(values.min()) >= 0.25
    assert float(values.max()) <= 4.0
    assert float((values[:, 0] / values[:, -1]).max()) > 4.0


@pytest.mark.parametrize("space", [SMALL, TEXT], ids=["patches", "text"])
def test_small_transformers_keep_their_function(space: Transformer) -> None:
    w = {name: 0.6 * x for name, x in networks(space).items()}
    x = probe_inputs(space, 4, seeded(1), torch.float64)
    known = groups.applicable(space)
    assert known == [
        "general-linear", "heads", "monomial", "orthogonal", "permutation", "scale", "stream",
    ]  # fmt: skip
    limit = testing.tolerance(torch.float64, space.depth)
    for name in [*known, groups.ALL]:
        for kind, g in testing.elements(name, space, BATCH, seeded(2)).items():
            moved = groups.act(g, space, w)
            assert float(testing.function_error(space, w, moved, x).max()) < limit, (name, kind)
            assert gap(w, moved) > 1e-6, (name, kind)
    for name, control in controls(space).items():
        moved = control(space, w, seeded(3))
        assert float(testing.function_error(space, w, moved, x).min()) > 1e-2, name


def test_an_element_of_other_networks_is_refused() -> None:
    w = networks(SMALL)
    for other in (small_transformer(12, 2, 20, 2, 5), TINY):
        g = groups.sample("all", other, BATCH, seeded(0))
        with pytest.raises(InputError):
            groups.act(g, SMALL, w)
    g = groups.sample("general-linear", SMALL, BATCH, seeded(0))
    with pytest.raises(InputError, match="networks need"):
        groups.act(g.rows(slice(2)), SMALL, w)
    with pytest.raises(InputError):
        groups.act(g, TINY, networks(TINY))


def test_a_gain_of_zero_beside_a_shift_is_not_folded() -> None:
    space = grouped("layer")
    w = networks(space)
    w["norm1.weight"][0, 3] = 0
    g = groups.sample("orthogonal", space, BATCH, seeded(0))
    with pytest.raises(InputError, match="gain of exactly 0"):
        groups.act(g, space, w)


def test_a_zoo_of_small_transformers_is_augmented(run: Callable, tmp_path: Path) -> None:
    store = Store(tmp_path / "zoo")
    flat = 0.5 * SMALL.flatten(networks(SMALL, batch=6)).numpy()
    rows = [{"checkpoint": f"n{i}", "label": 0.1 * i} for i in range(6)]
    store.write(0, SMALL, flat.astype(np.float32), rows)  # type: ignore[arg-type]
    store.finish(1, {"name": "zoo"})
    ran = run("augment", "zoo", "--group", "general-linear", "--out", "copies", "--json")
    assert ran.code == 0, ran.err
    row = ran.json["rows"][0]
    assert row["networks"] == 6
    assert row["function_error_float64_max"] < 1e-12
    assert row["function_error_max"] < 1e-4
    assert run("augment", "zoo", "--group", "shift", "--out", "none").code == 3
