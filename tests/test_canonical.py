"""The canonical form: constant on orbits, idempotent, in the orbit; ties counted."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import draw_networks, draw_space
from torch import Tensor

from qemcli import groups
from qemcli.canonical import canonicalise, ties
from qemcli.functions import probe_inputs, respond
from qemcli.spaces import Chain, cnn, mlp, siren

BATCH = 4
SEEDS = st.integers(0, 10**6)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def largest_gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def tied(space: Chain, w: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same networks with hidden biases zero, as many initialisations leave them."""
    hidden = [layer.bias for layer in space.layers[:-1]]
    return {k: torch.zeros_like(v) if k in hidden else v for k, v in w.items()}


@given(draw_space(), SEEDS, st.booleans())
def test_canonical_form_is_constant_on_orbits(space: Chain, seed: int, tie: bool) -> None:
    w = draw_networks(space, BATCH, seed)
    w = tied(space, w) if tie else w
    g = groups.sample("all", space, BATCH, seeded(seed), (1.0, 1e4))
    here, _, found = canonicalise(space, w)
    there, _, found_there = canonicalise(space, groups.act(g, space, w))
    assert largest_gap(here, there) < 1e-12
    assert torch.equal(found, found_there)


@given(draw_space(), SEEDS, st.booleans())
def test_canonical_form_is_idempotent_and_in_the_orbit(space: Chain, seed: int, tie: bool) -> None:
    w = draw_networks(space, BATCH, seed)
    w = tied(space, w) if tie else w
    once, element, _ = canonicalise(space, w)
    assert largest_gap(canonicalise(space, once)[0], once) < 1e-12
    assert largest_gap(groups.act(element, space, w), once) < 1e-12
    if space.hidden:
        x = probe_inputs(space, 5, seeded(1), torch.float64)
        torch.testing.assert_close(respond(space, once, x), respond(space, w, x))


def test_canonical_biases_ascend() -> None:
    for space in (mlp([3, 7, 5, 2]), siren([2, 7, 5, 3]), cnn([1, 4, 6], 3)):
        w, _, found = canonicalise(space, draw_networks(space, BATCH))
        for layer in space.layers[:-1]:
            assert (w[layer.bias or ""].diff(dim=1) > 0).all()
        assert not found.any()


def test_control_another_network_has_another_form() -> None:
    space = mlp([3, 7, 5, 2], "tanh")
    w = draw_networks(space, BATCH)
    other = {**w, "0.weight": w["0.weight"].flip(2)}
    assert largest_gap(canonicalise(space, w)[0], canonicalise(space, other)[0]) > 1e-2
    scaled = groups.sample("scale", space.running("relu"), BATCH, seeded(0))
    moved = groups.act(scaled, space, w)
    assert largest_gap(canonicalise(space, w)[0], canonicalise(space, moved)[0]) > 1e-2


def test_twins_coming_in_are_told_apart_by_what_goes_out() -> None:
    space = mlp([3, 6, 5, 2])
    w = draw_networks(space, BATCH)
    w["0.weight"][:, 1], w["0.bias"][:, 1] = w["0.weight"][:, 0], w["0.bias"][:, 0]
    g = groups.sample("permutation", space, BATCH, seeded(3))
    here, there = canonicalise(space, w)[0], canonicalise(space, groups.act(g, space, w))[0]
    assert largest_gap(here, there) < 1e-12


def test_float32_orbits_meet_to_rounding() -> None:
    space = cnn([1, 16, 16, 16], 10)
    w = draw_networks(space, BATCH, dtype=torch.float32)
    g = groups.sample("monomial", space, BATCH, seeded(3), (1.0, 1e4))
    there = canonicalise(space, groups.act(g, space, w))[0]
    assert there["fc.weight"].dtype == torch.float32
    assert largest_gap(canonicalise(space, w)[0], there) < 1e-5


def test_ties_count_equal_hidden_biases() -> None:
    space = mlp([3, 6, 5, 2])
    w = draw_networks(space, 3)
    w["0.bias"][1, 2] = w["0.bias"][1, 4]
    w["0.bias"][2, :] = 0
    w["2.bias"][2, :2] = 1
    w["4.bias"][:] = 0
    assert ties(space, w).tolist() == [0, 1, 6]
    assert ties(mlp([3, 6, 5, 2], bias=False), w).tolist() == [9, 9, 9]
    assert canonicalise(space, w)[2][2] >= 5


def test_one_layer_is_its_own_form() -> None:
    space = mlp([3, 2])
    w = draw_networks(space, BATCH)
    form, element, found = canonicalise(space, w)
    assert largest_gap(form, w) == 0
    assert element.index == {}
    assert found.tolist() == [0] * BATCH
