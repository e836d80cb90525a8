"""Balance of networks with sums: exact, permutation-equivariant, harmless to the function, and on a
chain the chain's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qemcli import groups
from qemcli.attention_balance import representative
from qemcli.balance import balance
from qemcli.canonical import canonicalise
from qemcli.functions import probe_inputs
from qemcli.residual_balance import balance_residual
from qemcli.spaces import Residual, cnn, mlp, residual
from qemcli.testing import function_error

BATCH = 4
SUMS = {
    "two": ((2, 6, 7, 6, 7), (-1, -1, 0, 1, -1)),
    "self": ((2, 5, 5, 4), (-1, 0, -1, -1)),  # layer 2 reads what is added to it
    "stream": ((2, 5, 3, 5, 5, 5), (-1, -1, 0, 2, 3, -1)),  # one axis, written by four layers
    "plain": ((2, 6, 7, 5), (-1, -1, -1, -1)),
}


def space_of(name: str, activation: str) -> Residual:
    widths, added = SUMS[name]
    return residual(cnn(widths, 3, activation=activation), added)


def networks(space: Residual, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return space.unflatten(torch.randn(BATCH, space.size, generator=generator).double())


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference over the largest weight of each network and tensor."""
    return max(
        float(((a[k] - b[k]).flatten(1).abs().amax(1) / b[k].flatten(1).abs().amax(1)).max())
        for k in a
    )


@pytest.mark.parametrize("scales", [(0.1, 10.0), (1.0, 1e4), (1e-30, 1e30)])
@pytest.mark.parametrize("activation", ["relu", "tanh", "identity"])
@pytest.mark.parametrize("name", SUMS)
def test_balance_undoes_the_diagonal_and_follows_permutations(
    name: str, activation: str, scales: tuple[float, float]
) -> None:
    space, generator = space_of(name, activation), torch.Generator().manual_seed(1)
    w = networks(space)
    g = groups.sample("all", space, BATCH, generator, scales)
    moved, _ = balance_residual(space, groups.act(g, space, w))
    plain = replace(groups.identity(space, BATCH), index=g.index)
    balanced, element = balance_residual(space, w)
    assert gap(moved, groups.act(plain, space, balanced)) < 1e-11
    assert gap(balanced, w) > 1e-2
    assert gap(groups.act(element, space, w), balanced) < 1e-12
    x = probe_inputs(space, 5, generator, torch.float64)
    assert function_error(space, w, balanced, x).max() < 1e-12
    assert gap(balance_residual(space, balanced)[0], balanced) < 1e-12
    assert gap(dict(representative(space, w)), balanced) == 0


@pytest.mark.parametrize("activation", ["relu", "tanh", "identity"])
def test_without_sums_it_is_the_chain_s(activation: str) -> None:
    space = space_of("plain", activation)
    w = networks(space)
    chained = cnn(SUMS["plain"][0], 3, activation=activation)
    assert gap(balance_residual(space, w)[0], balance(chained, w)[0]) < 1e-11


@pytest.mark.parametrize("name", SUMS)
def test_norm_is_the_smallest_of_the_orbit(name: str) -> None:
    space = space_of(name, "relu")
    balanced, _ = balance_residual(space, networks(space))
    least = space.flatten(balanced).square().sum(1)
    output = balanced["fc.bias"].square().sum(1)
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        g = groups.sample("scale", space, BATCH, generator, (0.99, 1.01))
        norm = space.flatten(groups.act(g, space, balanced)).square().sum(1)
        assert ((norm - output) > (least - output) * (1 + 1e-9)).all()


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("name", ["two", "self", "stream"])
def test_dead_neurons_are_set_to_zero_and_harmless(name: str, activation: str) -> None:
    space = space_of(name, activation)
    w = {k: v.clone() for k, v in networks(space).items()}
    for layer, axis in zip(space.layers, space.axes, strict=True):
        if axis == "h1":  # nothing comes into its first neuron, through any of its layers
            w[layer.weight][:2, 0], w[layer.bias or ""][:2, 0] = 0, 0
    generator = torch.Generator().manual_seed(1)
    balanced, _ = balance_residual(space, w)
    x = probe_inputs(space, 5, generator, torch.float64)
    assert function_error(space, w, balanced, x).max() < 1e-12
    (reader,) = [la for la, col in zip(space.layers[1:], space.axes, strict=False) if col == "h1"][
        :1
    ]
    assert (balanced[reader.weight][:2, :, 0] == 0).all()
    assert (balanced[reader.weight][2:, :, 0] != 0).any()
    g = groups.sample("all", space, BATCH, generator, (1.0, 1e4))
    moved, _ = balance_residual(space, groups.act(g, space, w))
    plain = replace(groups.identity(space, BATCH), index=g.index)
    assert gap(moved, groups.act(plain, space, balanced)) < 1e-11


@pytest.mark.parametrize("activation", ["relu", "tanh", "identity", "gelu"])
@pytest.mark.parametrize("name", SUMS)
def test_canonical_form_is_one_of_the_orbit(name: str, activation: str) -> None:
    space, generator = space_of(name, activation), torch.Generator().manual_seed(1)
    w = networks(space)
    w["conv1.bias"][0] = 0.0  # ties: other keys decide
    g = groups.sample("all", space, BATCH, generator, (1.0, 1e4))
    here, element, met = canonicalise(space, w)
    there, _, met_there = canonicalise(space, groups.act(g, space, w))
    assert gap(there, here) < 1e-11
    assert met.tolist() == met_there.tolist() == [space.hidden["h1"] - 1, 0, 0, 0]
    assert gap(groups.act(element, space, w), here) < 1e-12
    assert gap(canonicalise(space, here)[0], here) < 1e-12
    other = networks(space, 1)
    assert gap(canonicalise(space, other)[0], here) > 1e-2


def test_networks_that_are_not_finite_are_left_alone() -> None:
    space = space_of("two", "relu")
    w = {k: v.clone() for k, v in networks(space).items()}
    w["conv2.weight"][1, 0, 0, 0, 0] = torch.inf
    balanced, _ = balance_residual(space, w)
    assert all(torch.equal(balanced[k][1], w[k][1]) for k in w)
    clean = {k: v[[0, 2, 3]] for k, v in w.items()}
    assert (
        gap({k: v[[0, 2, 3]] for k, v in balanced.items()}, balance_residual(space, clean)[0]) == 0
    )


def test_dense_networks_without_biases_are_balanced() -> None:
    space = residual(mlp([4, 6, 7, 6, 3], "relu", bias=False), (-1, -1, 0, -1))
    w = networks(space)
    balanced, element = balance_residual(space, w)
    assert set(balanced) == set(w)
    assert gap(groups.act(element, space, w), balanced) < 1e-12
    half = {k: v.float() for k, v in w.items()}
    assert all(v.dtype == torch.float32 for v in balance_residual(space, half)[0].values())


def test_other_activations_are_left_as_they_are() -> None:
    space = space_of("two", "gelu")
    w = networks(space)
    balanced, element = balance_residual(space, w)
    assert all(torch.equal(balanced[k], w[k]) for k in w)
    assert all((d == 1).all() for d in element.factor.values())
