"""Signals: rows are rows in both conventions, black is 0, and the gradient goes through."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from qemcli.errors import InputError
from qemcli.signals import check, coordinates, psnr, render
from qemcli.spaces import Chain, Forward, mlp, siren

IMAGE = (1, 5, 7)


def draw(space: Chain, count: int, rng: torch.Generator) -> dict[str, torch.Tensor]:
    flat = torch.randn(count, space.size, generator=rng, dtype=torch.float64) / 30
    return space.unflatten(flat)


def by_hand(w: dict[str, torch.Tensor], i: int, convention: str, row: float, col: float) -> float:
    """One pixel of network i, written out."""
    x = torch.tensor([row, col] if convention == "nfn" else [col, row], dtype=torch.float64)
    for name in ("0", "2"):
        x = torch.sin(30 * (w[f"{name}.weight"][i] @ x + w[f"{name}.bias"][i]))
    y = w["4.weight"][i] @ x + w["4.bias"][i]
    return float((y + 1) / 2 if convention == "nfn" else y + 0.5)


@pytest.mark.parametrize("convention", ["nfn", "dws"])
def test_render_is_the_network_at_each_pixel(convention: str, rng: torch.Generator) -> None:
    space = siren([2, 5, 3, 1], convention=convention, image=IMAGE)
    w = draw(space, 2, rng)
    image = render(space, w)
    assert image.shape == (2, *IMAGE)
    assert image.dtype == torch.float64
    for row, col in ((0, 0), (0, 6), (4, 0), (3, 2)):
        want = by_hand(w, 1, convention, -1 + 2 * row / 4, -1 + 2 * col / 6)
        assert float(image[1, 0, row, col]) == pytest.approx(want, abs=1e-12)


def test_conventions_differ_by_a_transpose_and_the_levels(rng: torch.Generator) -> None:
    nfn = siren([2, 5, 3, 1], convention="nfn", image=(1, 6, 6))
    dws = siren([2, 5, 3, 1], convention="dws", image=(1, 6, 6))
    w = draw(nfn, 3, rng)
    raw_nfn, raw_dws = 2 * render(nfn, w) - 1, render(dws, w) - 0.5
    assert torch.allclose(raw_nfn.transpose(2, 3), raw_dws, atol=1e-12)
    assert not torch.allclose(raw_nfn, raw_dws, atol=1e-3)


def test_coordinates_reach_both_ends_row_by_row() -> None:
    grid = coordinates(siren([2, 3, 1], convention="dws"), 2, 3)
    want = [[-1, -1], [0, -1], [1, -1], [-1, 1], [0, 1], [1, 1]]
    assert grid.tolist() == want
    assert coordinates(siren([2, 3, 1]), 2, 3).tolist() == [[b, a] for a, b in want]


def test_render_keeps_channels_apart_and_takes_another_size(rng: torch.Generator) -> None:
    space = siren([2, 5, 3], image=(3, 4, 4))
    w = draw(space, 2, rng)
    w["2.bias"] = w["2.bias"] + torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64)
    means = render(space, w, (9, 2)).mean(dim=(2, 3))
    assert render(space, w, (9, 2)).shape == (2, 3, 9, 2)
    assert torch.allclose(means.diff(dim=1), torch.ones(2, 2, dtype=torch.float64), atol=0.3)


def test_render_is_not_clipped_and_differentiable(rng: torch.Generator) -> None:
    space = siren([2, 5, 1], image=(1, 3, 3))
    w = {k: v.requires_grad_() for k, v in draw(space, 1, rng).items()}
    image = render(space, {**w, "2.bias": w["2.bias"] + 9})
    assert float(image.detach().min()) > 1
    image.sum().backward()
    assert all(bool(v.grad.abs().sum() > 0) for v in w.values() if v.grad is not None)
    assert w["0.weight"].grad is not None


def test_psnr_is_of_the_unit_scale_and_one_a_network() -> None:
    truth = torch.zeros(1, 4, 4)
    image = torch.stack([truth + 0.1, truth + 1.0, truth])
    found = psnr(image, truth)
    assert found[:2].tolist() == pytest.approx([20.0, 0.0], abs=1e-5)
    assert math.isinf(float(found[2]))


SIREN = siren([2, 4, 1], image=(1, 4, 4))
NO_IMAGE = {
    "one input": (siren([1, 4, 1], image=(1, 4, 4)), "1 inputs"),
    "two outputs": (siren([2, 4, 2], image=(2, 4, 4)), "2 outputs"),
    "relu": (mlp([2, 4, 1], "relu"), "network with relu"),
    "unknown activation": (mlp([2, 4, 1], None), "not known to be one"),
    "no w0": (replace(SIREN, forward=Forward(image=(1, 4, 4))), "w0"),
    "no size": (siren([2, 4, 1]), "size"),
    "other channels": (siren([2, 4, 1], image=(3, 4, 4)), "3 channels"),
}


@pytest.mark.parametrize("case", NO_IMAGE)
def test_render_refuses_what_is_no_image_inr(case: str) -> None:
    space, said = NO_IMAGE[case]
    with pytest.raises(InputError, match=said):
        check(space)
    assert check(SIREN) == (1, 4, 4)
