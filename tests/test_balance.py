"""Balance: exact, permutation-equivariant, harmless to the function, and blind to dead neurons."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import draw_cnn, draw_networks, draw_space
from torch import Tensor

from qemcli import groups
from qemcli.balance import balance
from qemcli.functions import probe_inputs, respond
from qemcli.spaces import HOMOGENEOUS, ODD, Chain, cnn, mlp, siren

BATCH = 4
SEEDS = st.integers(0, 10**6)
RANGES = [(0.1, 10.0), (1.0, 1e4), (1e-150, 1e150)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def permuted(space: Chain, g: groups.Element, w: dict[str, Tensor]) -> dict[str, Tensor]:
    """`w` under the permutation part of `g`."""
    plain = groups.identity(space, g.batch)
    return groups.act(replace(plain, index=g.index), space, w)


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of two batches over the largest weight of each network and tensor."""
    return max(
        float(
            (
                (a[k] - b[k]).flatten(1).abs().amax(1)
                / b[k].flatten(1).abs().amax(1).clamp(min=1e-30)
            ).max()
        )
        for k in a
    )


def gap_of_functions(space: Chain, a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    x = probe_inputs(space, 5, seeded(9), torch.float64)
    answers = respond(space, a, x)
    return float((respond(space, b, x) - answers).abs().max() / (answers.std() + 1e-30))


def with_dead(space: Chain, w: dict[str, Tensor]) -> dict[str, Tensor]:
    """In every layer network 0 loses what enters a neuron, 1 what leaves one, 2 both."""
    pairs = [(weight.clone(), bias.clone()) for weight, bias in space.matrices(w)]
    for l, (weight, bias) in enumerate(pairs[:-1]):
        for network in (0, 2):
            weight[network, 0], bias[network, 0] = 0, 0
        for network in (1, 2):
            pairs[l + 1][0][network, :, -1] = 0
    return space.from_matrices(pairs)


def draw_treated(family: str | None = None) -> st.SearchStrategy[Chain]:
    """Spaces whose activation balance does something for."""
    spaces = [draw_space(family, a) for a in sorted(HOMOGENEOUS | ODD)] + [draw_space("siren")]
    return st.one_of(spaces)


@given(draw_treated(), SEEDS, st.sampled_from(RANGES), st.booleans())
def test_balance_undoes_the_diagonal_and_follows_permutations(
    space: Chain, seed: int, scales: tuple[float, float], dead: bool
) -> None:
    w = draw_networks(space, BATCH, seed)
    w = with_dead(space, w) if dead else w
    g = groups.sample("all", space, BATCH, seeded(seed), scales)
    balanced, _ = balance(space, groups.act(g, space, w))
    assert gap(balanced, permuted(space, g, balance(space, w)[0])) < 1e-12


@given(draw_treated(), SEEDS, st.booleans())
def test_balance_keeps_the_function(space: Chain, seed: int, dead: bool) -> None:
    w = draw_networks(space, BATCH, seed)
    w = with_dead(space, w) if dead else w
    assert gap_of_functions(space, w, balance(space, w)[0]) < 1e-10


@given(draw_treated(), SEEDS, st.booleans())
def test_balance_is_idempotent(space: Chain, seed: int, dead: bool) -> None:
    w = draw_networks(space, BATCH, seed)
    once, _ = balance(space, with_dead(space, w) if dead else w)
    assert gap(balance(space, once)[0], once) < 1e-12


@given(draw_treated(), SEEDS)
def test_balance_element_carries_the_networks_there(space: Chain, seed: int) -> None:
    w = draw_networks(space, BATCH, seed)
    balanced, element = balance(space, w)
    assert gap(groups.act(element, space, w), balanced) < 1e-12


def norms(space: Chain, w: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(squared norm coming in, going out) of every hidden layer."""
    pairs = space.matrices(w)
    return [
        (weight.square().sum((2, 3)) + bias.square(), above.square().sum((1, 3)))
        for (weight, bias), (above, _) in pairwise(pairs)
    ]


@given(st.sampled_from(["mlp", "cnn pool", "cnn flatten"]), st.data(), SEEDS, st.booleans())
def test_balanced_neurons_take_in_what_they_give(
    family: str, data: st.DataObject, seed: int, dead: bool
) -> None:
    space = data.draw(draw_space(family, "relu"))
    w = draw_networks(space, BATCH, seed)
    w = with_dead(space, w) if dead else w
    for incoming, outgoing in norms(space, balance(space, w)[0]):
        torch.testing.assert_close(incoming, outgoing, rtol=1e-12, atol=0)


def test_networks_as_drawn_are_not_balanced() -> None:
    space = mlp([3, 5, 4, 2])
    incoming, outgoing = norms(space, draw_networks(space, BATCH))[0]
    assert ((incoming - outgoing).abs() / incoming).max() > 0.1


def test_balance_is_the_smallest_norm_of_the_orbit() -> None:
    space = cnn([1, 3, 5], 4)
    w, _ = balance(space, draw_networks(space, BATCH))
    least = space.flatten(w).square().sum(1)
    for seed in range(20):
        g = groups.sample("scale", space, BATCH, seeded(seed), (0.8, 1.25))
        assert (space.flatten(groups.act(g, space, w)).square().sum(1) > least).all()


def test_balance_converges_on_deep_and_thin_networks() -> None:
    space = mlp([3, *[4, 2, 5, 1, 3] * 6, 2], bias=False)
    w = draw_networks(space, BATCH)
    g = groups.sample("monomial", space, BATCH, seeded(0), (1.0, 1e4))
    balanced, _ = balance(space, w)
    for incoming, outgoing in norms(space, balanced):
        torch.testing.assert_close(incoming, outgoing, rtol=1e-11, atol=0)
    assert gap(balance(space, groups.act(g, space, w))[0], permuted(space, g, balanced)) < 1e-11


def test_dead_neurons_become_zeros_through_all_layers() -> None:
    space = mlp([3, 5, 4, 2], bias=False)
    w = draw_networks(space, 3)
    w["0.weight"][0] = 0
    w["4.weight"][1, :, 2] = 0
    balanced, element = balance(space, w)
    assert all(not balanced[name][0].any() for name in ("0.weight", "2.weight", "4.weight"))
    assert not balanced["2.weight"][1, 2].any()
    assert balanced["2.weight"][1, 0].all()
    assert all(factor.isfinite().all() for factor in element.factor.values())


def test_nearly_dead_neurons_stay_finite_and_keep_the_function() -> None:
    space = mlp([3, 5, 4, 2])
    w = draw_networks(space, 3)
    w["0.weight"][:, 1], w["0.bias"][:, 1] = 1e-300, 0
    w["2.weight"][:, :, 2] *= 1e-200
    w["0.weight"][:, 2] *= 1e-200
    w["0.bias"][:, 2] *= 1e-200
    balanced, element = balance(space, w)
    assert all(x.isfinite().all() for x in balanced.values())
    assert all(x.isfinite().all() and (x > 0).all() for x in element.factor.values())
    assert gap_of_functions(space, w, balanced) < 1e-12


def test_float32_is_balanced_through_float64() -> None:
    space = cnn([1, 16, 16, 16], 10)
    w = draw_networks(space, BATCH, dtype=torch.float32)
    g = groups.sample("monomial", space, BATCH, seeded(1), (1.0, 1e4))
    moved, _ = balance(space, groups.act(g, space, w))
    assert all(x.dtype == torch.float32 for x in moved.values())
    assert gap(moved, permuted(space, g, balance(space, w)[0])) < 1e-6


def test_networks_that_are_not_finite_are_left_alone() -> None:
    space = mlp([3, 5, 4, 2])
    w = draw_networks(space, 3)
    alone, _ = balance(space, {k: v[1:] for k, v in w.items()})
    w["2.weight"][0, 1, 1] = float("nan")
    balanced, element = balance(space, w)
    for name, x in w.items():
        torch.testing.assert_close(balanced[name][0], x[0], equal_nan=True)
        torch.testing.assert_close(balanced[name][1:], alone[name], rtol=1e-13, atol=1e-13)
    assert (element.factor["h1"][0] == 1).all()


@pytest.mark.parametrize("activation", ["gelu", "sigmoid", None])
def test_balance_leaves_other_activations_alone(activation: str | None) -> None:
    space = mlp([3, 5, 4, 2], activation)
    w = draw_networks(space, BATCH)
    balanced, element = balance(space, w)
    assert all(torch.equal(balanced[name], w[name]) for name in w)
    assert (element.factor["h1"] == 1).all()


def test_signs_are_not_touched_with_max_pooling() -> None:
    space = draw_cnn([1, 3, 4, 2], "tanh", "max", flatten=False)
    w = draw_networks(space, BATCH)
    assert all(torch.equal(x, w[name]) for name, x in balance(space, w)[0].items())


def test_control_scales_on_tanh_are_not_undone() -> None:
    space = mlp([3, 5, 4, 2], "tanh")
    w = draw_networks(space, BATCH)
    g = groups.sample("monomial", space.running("relu"), BATCH, seeded(1))
    moved, _ = balance(space, groups.act(g, space, w))
    assert gap(moved, permuted(space, g, balance(space, w)[0])) > 1e-2


@pytest.mark.parametrize("space", [mlp([3, 5, 4, 2], "tanh"), siren([2, 5, 4, 3])])
def test_signs_of_rows_that_sum_to_zero_follow_the_next_keys(space: Chain) -> None:
    w = draw_networks(space, BATCH)
    w["0.bias"][:] = 0
    w["0.weight"][:, 0, 1:] = 0
    w["0.weight"][:, 0, 1] = -w["0.weight"][:, 0, 0]
    g = groups.sample("all", space, BATCH, seeded(1))
    moved, _ = balance(space, groups.act(g, space, w))
    assert gap(moved, permuted(space, g, balance(space, w)[0])) < 1e-12


def test_phase_form_lies_in_the_first_quarter_turn() -> None:
    space = siren([2, 5, 4, 3], w0=30.0)
    w = draw_networks(space, BATCH)
    w["0.bias"][:, 0] = torch.pi / 2 / 30
    balanced, _ = balance(space, w)
    for name in ("0.bias", "2.bias"):
        phase = 30 * balanced[name]
        assert phase.min() >= 0
        assert phase.max() <= torch.pi / 2 * (1 + 1e-14)
    g = groups.sample("all", space, BATCH, seeded(1))
    moved, _ = balance(space, groups.act(g, space, w))
    assert gap(moved, permuted(space, g, balanced)) < 1e-12
    assert gap_of_functions(space, w, balanced) < 1e-10


def test_balance_of_one_layer_and_of_no_networks() -> None:
    space = mlp([3, 2])
    w = draw_networks(space, BATCH)
    balanced, element = balance(space, w)
    assert all(torch.equal(balanced[name], w[name]) for name in w)
    assert element.index == {}
    deep = mlp([3, 4, 2])
    none, _ = balance(deep, draw_networks(deep, 0))
    assert none["0.weight"].shape == (0, 4, 3)
