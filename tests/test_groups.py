"""The ladder's first rungs: the action's axioms; a network's function is constant on its orbit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import FAMILIES, draw_cnn, draw_networks, draw_space
from torch import Tensor

from qemcli import groups
from qemcli.errors import InputError, UnsupportedError, UsageError
from qemcli.functions import probe_inputs, respond
from qemcli.spaces import HOMOGENEOUS, ODD, Chain, Forward, cnn, mlp, siren

BATCH = 3
SEEDS = st.integers(0, 10**6)
ATTENTION = "the networks have no attention"  # why groups of heads and streams are none of chains'
GROUPS = [n for n in groups.names() if groups.allowed(n, mlp([2, 3, 2])) != ATTENTION]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


def moved_by(space: Chain, w: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """Largest change of the function over the spread of its answers, in float64."""
    x = probe_inputs(space, 5, seeded(9), torch.float64)
    answers = respond(space, w, x)
    return float((respond(space, after, x) - answers).abs().max() / answers.std())


@st.composite
def draw_case(draw: st.DrawFn, family: str, group: str) -> tuple[Chain, int]:
    """A space of the family on which the group is a symmetry, and a seed."""
    fits = {"scale": HOMOGENEOUS, "sign": ODD, "phase": {"sin"}, "monomial": HOMOGENEOUS | ODD}
    activation = draw(st.sampled_from(sorted(fits[group]))) if group in fits else None
    space = draw(draw_space(family, activation))
    if groups.allowed(group, space):
        space = replace(space, forward=replace(space.forward, pooling="none"))
        if family == "cnn flatten":
            space = draw_cnn(list(space.widths), str(activation), "none", flatten=True)
    return space, draw(SEEDS)


POSSIBLE = [
    (family, group)
    for family in FAMILIES
    for group in GROUPS
    if (family, group) != ("siren", "scale") and (family == "siren" or group != "phase")
]


@pytest.mark.parametrize(("family", "group"), POSSIBLE)
@given(data=st.data())
def test_function_is_constant_on_the_orbit(family: str, group: str, data: st.DataObject) -> None:
    space, seed = data.draw(draw_case(family, group))
    w = draw_networks(space, BATCH, seed)
    g = groups.sample(group, space, BATCH, seeded(seed), scale_range=(0.01, 100.0))
    assert moved_by(space, w, groups.act(g, space, w)) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_act_is_an_action(family: str, data: st.DataObject) -> None:
    space = data.draw(draw_space(family))
    seed = data.draw(SEEDS)
    w = draw_networks(space, BATCH, seed)
    g, h = (groups.sample("all", space, BATCH, seeded(seed + i)) for i in (1, 2))
    assert_same(groups.act(groups.identity(space, BATCH), space, w), w, 0.0)
    both = groups.act(g, space, groups.act(h, space, w))
    assert_same(groups.act(groups.compose(g, h), space, w), both)
    assert_same(groups.act(groups.inverse(g), space, groups.act(g, space, w)), w)
    assert_same(groups.act(g, space, groups.act(groups.inverse(g), space, w)), w)


def test_compose_is_associative_and_not_commutative() -> None:
    space = siren([2, 5, 7, 3])
    g, h, k = (groups.sample("all", space, 4, seeded(i)) for i in range(3))
    left = groups.compose(groups.compose(g, h), k)
    right = groups.compose(g, groups.compose(h, k))
    for part in ("index", "factor", "turns"):
        for axis in space.hidden:
            assert torch.equal(getattr(left, part)[axis], getattr(right, part)[axis])
    other = groups.compose(h, g)
    both = groups.compose(g, h)
    assert any(not torch.equal(both.turns[a], other.turns[a]) for a in space.hidden)


def test_phase_without_turns_composes_with_phase() -> None:
    space = siren([2, 5, 7, 3])
    w = draw_networks(space, 4)
    g, h = groups.sample("phase", space, 4, seeded(1)), groups.sample("sign", space, 4, seeded(2))
    for first, second in ((g, h), (h, g)):
        after = groups.act(second, space, groups.act(first, space, w))
        assert_same(groups.act(groups.compose(second, first), space, w), after)


def test_act_is_the_formula_entry_by_entry() -> None:
    space = cnn([2, 3, 5], 4, positions=6, forward=Forward(junction="flatten"))
    w = draw_networks(space, 2)
    g = groups.sample("monomial", space, 2, seeded(0), (0.1, 10.0))
    moved = groups.act(g, space, w)
    p, d, q, e = g.index["h1"], g.factor["h1"], g.index["h2"], g.factor["h2"]
    for b in range(2):
        for j in range(5):
            assert moved["conv2.bias"][b, j] == w["conv2.bias"][b, q[b, j]] * e[b, j]
            for k in range(3):
                kernel = w["conv2.weight"][b, q[b, j], p[b, k]] * e[b, j] / d[b, k]
                torch.testing.assert_close(moved["conv2.weight"][b, j, k], kernel)
            for s in range(6):
                column = w["fc.weight"][b, :, q[b, j] * 6 + s] / e[b, j]
                torch.testing.assert_close(moved["fc.weight"][b, :, j * 6 + s], column)
    assert torch.equal(moved["fc.bias"], w["fc.bias"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_act_keeps_the_dtype_and_copies_bits_when_it_permutes(dtype: torch.dtype) -> None:
    space = cnn([2, 3, 5], 4)
    w = {name: x.to(dtype) for name, x in draw_networks(space, 3).items()}
    moved = groups.act(groups.sample("permutation", space, 3, seeded(1)), space, w)
    for name, x in w.items():
        assert moved[name].dtype == dtype
        assert torch.equal(moved[name].flatten(1).sort().values, x.flatten(1).sort().values)


def test_act_broadcasts_nothing() -> None:
    space = mlp([2, 4, 4, 4])
    w = draw_networks(space, 4)
    for wrong in (1, 2, 5):
        g = groups.sample("permutation", space, wrong, seeded(0))
        with pytest.raises(InputError, match="axis h1"):
            groups.act(g, space, w)
    shallow = groups.sample("permutation", mlp([2, 4, 4]), 4, seeded(0))
    with pytest.raises(InputError, match="the weight space has"):
        groups.act(shallow, space, w)


def test_act_gives_each_network_its_own_element_where_batch_equals_width() -> None:
    space = mlp([4, 4, 4])
    w = draw_networks(space, 4)
    g = groups.sample("monomial", space, 4, seeded(3))
    together = groups.act(g, space, w)
    for i in range(4):
        alone = groups.act(g.rows(slice(i, i + 1)), space, {k: v[i : i + 1] for k, v in w.items()})
        assert_same(alone, {k: v[i : i + 1] for k, v in together.items()}, 0.0)


@pytest.mark.parametrize("space", [mlp([3, 1, 2]), mlp([1, 1, 1, 1]), cnn([1, 1], 1)])
def test_one_neuron_a_layer_still_has_scales(space: Chain) -> None:
    w = draw_networks(space, BATCH)
    g = groups.sample("all", space, BATCH, seeded(0))
    moved = groups.act(g, space, w)
    assert any(not torch.equal(moved[name], w[name]) for name in w)
    assert moved_by(space, w, moved) < 1e-10


def test_one_layer_has_no_group_and_says_so() -> None:
    space = mlp([3, 2])
    w = draw_networks(space, BATCH)
    assert groups.applicable(space) == []
    assert "no hidden neurons" in str(groups.allowed("all", space))
    assert_same(groups.act(groups.identity(space, BATCH), space, w), w, 0.0)
    with pytest.raises(UnsupportedError, match="no hidden neurons"):
        groups.sample("permutation", space, BATCH, seeded(0))


EXPECTED = {
    "relu": ["monomial", "permutation", "scale"],
    "leaky_relu": ["monomial", "permutation", "scale"],
    "identity": ["monomial", "permutation", "scale", "sign"],
    "tanh": ["monomial", "permutation", "sign"],
    "gelu": ["permutation"],
    "sigmoid": ["permutation"],
    None: ["permutation"],
}


@pytest.mark.parametrize(("activation", "expected"), EXPECTED.items())
def test_applicable_groups_follow_the_activation(
    activation: str | None, expected: list[str]
) -> None:
    space = mlp([2, 5, 3], activation)
    assert groups.applicable(space) == expected
    for name in {"scale", "sign", "monomial", "phase"} - set(expected):
        with pytest.raises(UnsupportedError) as refused:
            groups.sample(name, space, 2, seeded(0))
        assert activation is not None or "--activation" in refused.value.message


def test_applicable_groups_of_a_siren() -> None:
    assert groups.applicable(siren([2, 5, 3])) == ["monomial", "permutation", "phase", "sign"]
    bare = mlp([2, 5, 3], "sin", bias=False)
    assert "no bias" in str(groups.allowed("phase", bare))


def test_sign_is_refused_with_max_pooling_only() -> None:
    for pooling, refused in (("none", False), ("average", False), ("max", True)):
        space = draw_cnn([1, 3, 4, 2], "tanh", pooling, flatten=False)
        assert ("max pooling" in str(groups.allowed("sign", space))) is refused


def test_unknown_group_suggests_the_nearest() -> None:
    with pytest.raises(UsageError) as error:
        groups.sample("permutations", mlp([2, 5, 3]), 2, seeded(0))
    assert "permutation" in str(error.value.hint)


@pytest.mark.parametrize("law", ["uniform", "log", None])
def test_scales_fill_their_range(law: str | None) -> None:
    space = mlp([2, 1000, 3])
    for low, high in ((1.0, 1e4), (0.1, 10.0), (2.0, 2.0)):
        g = groups.sample("scale", space, 4, seeded(1), (low, high), law)
        factor = g.factor["h1"]
        assert factor.min() >= low
        assert factor.max() <= high * (1 + 1e-12)
        logs = law == "log" or (law is None and low < 1 < high)
        middle = math.sqrt(low * high) if logs else (low + high) / 2
        assert float(factor.median()) == pytest.approx(middle, rel=0.1)


@pytest.mark.parametrize("wrong", [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (1.0, math.inf)])
def test_scale_ranges_that_are_none_are_refused(wrong: tuple[float, float]) -> None:
    with pytest.raises(UsageError, match="scale range"):
        groups.sample("scale", mlp([2, 5, 3]), 2, seeded(0), wrong)
    with pytest.raises(UsageError, match="law"):
        groups.sample("scale", mlp([2, 5, 3]), 2, seeded(0), law="cauchy")


def test_sample_is_the_seeds() -> None:
    space = siren([2, 5, 7, 3])
    a, b, c = (groups.sample("all", space, 4, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(a.turns["h2"], b.turns["h2"])
    assert torch.equal(a.index["h2"], b.index["h2"])
    assert not torch.equal(a.index["h2"], c.index["h2"])


CONTROLS = {
    "scale on tanh": (mlp([3, 5, 4, 2], "relu"), {"activation": "tanh"}, "scale"),
    "sign on relu": (mlp([3, 5, 4, 2], "tanh"), {"activation": "relu"}, "sign"),
    "sign on sigmoid": (mlp([3, 5, 4, 2], "tanh"), {"activation": "sigmoid"}, "sign"),
    "phase with the wrong w0": (siren([2, 5, 4, 3], 30.0), {"w0": 29.0}, "phase"),
    "phase on tanh": (siren([2, 5, 4, 3], 30.0), {"activation": "tanh"}, "phase"),
    "sign with max pooling": (
        draw_cnn([1, 3, 4, 2], "tanh", "none", flatten=False),
        {"pooling": "max"},
        "sign",
    ),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_control_that_is_no_symmetry_moves_the_function(name: str) -> None:
    space, change, group = CONTROLS[name]
    g = groups.sample(group, space, BATCH, seeded(0))
    w = draw_networks(space, BATCH)
    moved = groups.act(g, space, w)
    assert moved_by(space, w, moved) < 1e-10
    assert moved_by(space.running(**change), w, moved) > 1e-3  # type: ignore[arg-type]


def test_control_permuting_one_tensor_only_moves_the_function() -> None:
    space = mlp([3, 5, 4, 2])
    w = draw_networks(space, BATCH)
    moved = groups.act(groups.sample("permutation", space, BATCH, seeded(0)), space, w)
    assert moved_by(space, w, {**w, "0.weight": moved["0.weight"]}) > 1e-3
    assert moved_by(space, w, {**moved, "2.bias": w["2.bias"]}) > 1e-3
