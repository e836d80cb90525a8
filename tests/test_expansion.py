"""Output capacity expansion: the merge is exact, sparse, and an ordinary network."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from qemcli.errors import InputError, UnsupportedError
from qemcli.expansion import merge, shown, widened
from qemcli.functions import respond
from qemcli.signals import render
from qemcli.spaces import Chain, cnn, mlp, siren


def draw_branches(space: Chain, b: int, k: int, dtype: torch.dtype) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(k)
    flat = torch.randn(b * k, space.size, generator=rng, dtype=dtype) * 0.2
    return {name: x.unflatten(0, (b, k)) for name, x in space.unflatten(flat).items()}


@pytest.mark.parametrize("convention", ["nfn", "dws"])
@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize("widths", [[2, 5, 7, 1], [2, 4, 3], [2, 5, 4, 6, 3]])
def test_merge_shows_the_mean_of_its_branches(widths, k: int, convention: str) -> None:
    space = siren(widths, convention=convention, image=(widths[-1], 9, 7))
    branches = draw_branches(space, 3, k, torch.float64)
    wide, merged = merge(space, branches)
    alone = torch.stack(
        [render(space, {n: x[:, j] for n, x in branches.items()}) for j in range(k)]
    )
    assert (render(wide, merged) - alone.mean(0)).abs().max() < 1e-12
    assert (shown(space, branches) - alone.mean(0)).abs().max() < 1e-12
    assert wide.forward == space.forward
    assert list(wide.hidden.values()) == [k * n for n in widths[1:-1]]
    assert wide.names == space.names


def test_merge_error_in_single_precision_is_below_a_millionth() -> None:
    space = siren([2, 32, 32, 1], image=(1, 28, 28))
    rng = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.3, 0.4, 0.02, 0.1, 0.06, 0.1])  # as fitted SIRENs have them
    parts = space.unflatten(torch.randn(32, space.size, generator=rng))
    w = {n: s * x for s, (n, x) in zip(scale, parts.items(), strict=True)}
    branches = {n: x.unflatten(0, (4, 8)) for n, x in w.items()}
    wide, merged = merge(space, branches)
    assert (render(wide, merged) - shown(space, branches)).abs().max() < 1e-6


def test_weights_between_branches_are_exactly_zero() -> None:
    space, k = siren([2, 5, 7, 6, 1]), 3
    _, merged = merge(space, draw_branches(space, 2, k, torch.float32))
    for layer in (space.layers[1], space.layers[2]):
        blocks = merged[layer.weight].unflatten(2, (k, -1)).unflatten(1, (k, -1))
        across = ~torch.eye(k, dtype=torch.bool)
        assert (blocks.transpose(2, 3)[:, across] == 0).all()
        assert (blocks.transpose(2, 3)[:, ~across] != 0).all()


def test_merged_network_is_an_ordinary_module_of_torch() -> None:
    class Sine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(30 * x)

    space = siren([2, 5, 7, 3], image=(3, 6, 8))
    wide, merged = merge(space, draw_branches(space, 1, 4, torch.float32))
    by_hand = nn.Sequential(nn.Linear(2, 20), Sine(), nn.Linear(20, 28), Sine(), nn.Linear(28, 3))
    by_hand.load_state_dict({name: x[0] for name, x in merged.items()}, strict=True)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 6), torch.linspace(-1, 1, 8), indexing="ij")
    with torch.no_grad():
        picture = by_hand(torch.stack([y, x], dim=-1)).permute(2, 0, 1)
    torch.testing.assert_close((picture + 1) / 2, render(wide, merged)[0], atol=2e-5, rtol=0)


def test_merge_suits_every_dense_network() -> None:
    for activation in ("relu", "tanh", "gelu"):
        space = mlp([3, 5, 4, 2], activation)
        branches = draw_branches(space, 2, 3, torch.float64)
        x = torch.randn(6, 3, dtype=torch.float64)
        wide, merged = merge(space, branches)
        alone = [respond(space, {n: b[:, j] for n, b in branches.items()}, x) for j in range(3)]
        torch.testing.assert_close(respond(wide, merged, x), sum(alone) / 3)
    line = mlp([3, 2], "relu", bias=False)
    branches = draw_branches(line, 2, 3, torch.float64)
    torch.testing.assert_close(merge(line, branches)[1]["0.weight"], branches["0.weight"].mean(1))


def test_a_wrong_merge_is_seen() -> None:
    """The control: the sum in place of the mean, and a w0 that changes with the width."""
    space = siren([2, 5, 7, 1], image=(1, 6, 6))
    branches = draw_branches(space, 2, 4, torch.float64)
    wide, merged = merge(space, branches)
    truth = shown(space, branches)
    summed = {n: 4 * x if n == "4.weight" else x for n, x in merged.items()}
    assert (render(wide, summed) - truth).abs().max() > 1e-2
    other = wide.running(w0=30 / math.sqrt(4))
    assert (render(other, merged) - truth).abs().max() > 1e-2


def test_merge_refuses_what_it_cannot_join() -> None:
    with pytest.raises(UnsupportedError, match="cnn"):
        widened(cnn([1, 4, 5], 3), 2)
    space = siren([2, 5, 1])
    branches = draw_branches(space, 2, 3, torch.float32)
    with pytest.raises(InputError, match="different numbers"):
        merge(space, {**branches, "2.bias": branches["2.bias"][:, :2]})
    with pytest.raises(InputError, match=r"2\.bias"):
        merge(space, {n: x for n, x in branches.items() if n != "2.bias"})
