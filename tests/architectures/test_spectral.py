"""Spectral statistics: against slow obvious ones, known spectra, and what the answer keeps."""

import math

import numpy as np
import pytest
import torch
from layer_kit import SPACES, draw_weights

from qemcli import groups
from qemcli.architectures import spectral
from qemcli.layers.spectra import (
    POOLED,
    STATISTICS,
    matrices,
    pooled,
    power_law,
    spectral_statistics,
    spectrum,
    statistics,
)
from qemcli.spaces import mlp, siren, small_transformer

ALPHA = STATISTICS.index("alpha")


def slow_alpha(values):
    """Clauset's fit, one tail after another."""
    data = np.sort(values[values > 0])
    best, found = math.inf, 0.0
    for i in range(len(data) - 1):
        tail = data[i:]
        below = np.log(tail / data[i]).sum()
        if below * 99 <= len(tail):  # steeper than 100
            continue
        alpha = 1 + len(tail) / below
        fitted = 1 - (tail / data[i]) ** (1 - alpha)
        gap = np.abs(fitted - np.arange(len(tail)) / len(tail)).max()
        if gap < best:
            best, found = gap, alpha
    return found


def slow(x):
    """The seven of one matrix (rows, columns) or convolution (rows, columns, height, width)."""
    taps = x.reshape(*x.shape[:2], -1).transpose(2, 0, 1) if x.ndim == 4 else x[None]
    values = np.concatenate([np.linalg.svd(t, compute_uv=False) ** 2 for t in taps])
    values = values / 2 if x.ndim == 4 else values
    top, p = values.max(), values / values.sum()
    rank = np.linalg.matrix_rank(x) if x.ndim == 2 else len(values)
    alpha = slow_alpha(values)
    large, small = max(x.shape[:2]), min(x.shape[:2])
    return [
        math.log10(values.sum()),
        math.log10(top),
        values.sum() / top,
        alpha,
        alpha * math.log10(top),
        -(p[p > 0] * np.log(p[p > 0])).sum() / math.log(max(rank, 2)),
        values.mean() * (1 + math.sqrt(small / large)) ** 2 / top,
    ]


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (1, 6), (11, 3, 3, 3), (4, 1, 3, 2)])
def test_statistics_equal_slow_ones(shape, rng):
    x = torch.randn(5, *shape, generator=rng, dtype=torch.float64)
    expected = np.array([slow(one.numpy()) for one in x])
    np.testing.assert_allclose(statistics(x).numpy(), expected, rtol=1e-9, atol=1e-12)


def test_power_law_finds_the_exponent_of_one(rng):
    """Density x^-2.5 on [1, inf): by inversion; the standard error of 2,000 values is .03."""
    u = torch.rand(3, 2000, generator=rng, dtype=torch.float64)
    values = (1 - u).pow(-1 / 1.5).sort(-1).values
    assert (power_law(values) - 2.5).abs().max() < 0.25


def test_known_spectra(rng):
    identity = torch.eye(6)[None]
    found = dict(zip(STATISTICS, statistics(identity)[0].tolist(), strict=True))
    assert found["norm"] == pytest.approx(math.log10(6))
    assert found["stable"] == pytest.approx(6)
    assert found["entropy"] == pytest.approx(1)
    assert found["alpha"] == 0  # one value, six times: no tail has two that differ
    line = torch.randn(2, 9, 1, generator=rng) * torch.randn(2, 1, 4, generator=rng)
    assert (spectrum(line).values > 0).sum(-1).tolist() == [1, 1]  # rounding is no rank
    noise = torch.randn(1, 900, 300, generator=rng)
    assert statistics(noise)[0, STATISTICS.index("soft")] == pytest.approx(1, abs=0.03)


def test_dead_matrices_have_finite_statistics():
    found = statistics(torch.zeros(2, 5, 4))
    assert found.isfinite().all()
    half = torch.zeros(1, 5, 4)
    half[0, 2, 1] = 1e-20
    assert statistics(half).isfinite().all()


def test_every_matrix_is_read_and_biases_are_not():
    space = small_transformer(8, 2, 12, 2, 5, (1, 2))
    names = matrices(space)
    assert not [name for name in names if name.endswith("bias")]
    assert len(names) == sum(len(t.shape) > 1 for t in space.tensors)


def build(space):
    torch.manual_seed(0)
    model = spectral.Model(space, spectral.Config(head=16)).double().eval()
    model.calibrate(draw_weights(space, 32, torch.Generator().manual_seed(1)))
    return model


def moved(space, group, rng):
    """The largest change of the answer over its spread."""
    model, w = build(space), draw_weights(space, 16, rng)
    g = groups.sample(group, space, 16, rng)
    with torch.no_grad():
        before, after = model(w), model(groups.act(g, space, w))
    assert before.std() > 1e-3
    return ((after - before).abs().max() / before.std()).item()


CASES = {
    "conv": (SPACES["pool"], {"permutation"}, {"scale"}),
    "flatten": (SPACES["flatten"], {"permutation"}, {"scale", "monomial"}),
    "tanh": (mlp([3, 7, 5, 4], "tanh"), {"permutation", "sign"}, set()),
    "siren": (siren([2, 7, 5, 1]), {"permutation", "sign", "phase"}, set()),
    "transformer": (
        small_transformer(8, 2, 12, 2, 5, (1, 2)),
        {"permutation", "heads"},
        {"general-linear", "scale"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_orthogonal_moves_change_nothing_and_others_do(case, rng):
    space, kept, broken = CASES[case]
    claims = build(space).claims(space)
    assert kept <= claims
    assert not broken & claims
    for group in claims:
        assert moved(space, group, rng) < 1e-9, group
    for group in broken:
        assert moved(space, group, rng) > 1e-3, group


def test_rotated_networks_have_the_same_statistics(rng):
    """Not a symmetry of networks, but of the statistics: any orthogonal matrix on either side."""
    x = torch.randn(4, 9, 6, 3, 3, generator=rng, dtype=torch.float64)
    q, r = (torch.linalg.qr(torch.randn(n, n, generator=rng).double())[0] for n in (9, 6))
    turned = torch.einsum("ij,bjkuv,kl->biluv", q, x, r)
    assert torch.allclose(statistics(turned), statistics(x), atol=1e-9)
    stretched = statistics(x * 2) - statistics(x)
    assert stretched[:, 0].tolist() == pytest.approx([math.log10(4)] * 4)
    assert stretched[:, ALPHA].abs().max() < 1e-9


def test_pooled_statistics_are_those_of_the_layers(rng):
    """One predictor over many architectures: ends, means, extremes, and how many there are."""
    for space in (SPACES["pool"], SPACES["mlp4"]):
        w = draw_weights(space, 3, rng)
        found, each = pooled(space, w), spectral_statistics(space, w)
        assert found.shape == (3, POOLED)
        assert torch.equal(found[:, :7], each[:, 0])
        assert torch.equal(found[:, 7:14], each[:, -1])
        assert torch.allclose(found[:, 14:21], each.mean(1))
        assert (found[:, 21:28] <= each.amin(1)).all()
        assert torch.allclose(
            found[0, 35:].exp(), torch.tensor([each.shape[1], space.size]).double()
        )


def test_mixture_reads_every_space_and_keeps_what_one_keeps(rng):
    spaces = [SPACES["pool"], mlp([3, 7, 5, 4], "tanh"), small_transformer(8, 2, 12, 2, 5, (1, 2))]
    torch.manual_seed(0)
    model = spectral.Mixture(spaces, spectral.Config(head=8)).double().eval()
    model.calibrate([(space, draw_weights(space, 8, rng)) for space in spaces])
    for space in spaces:
        one, w = model.on(space), draw_weights(space, 6, rng)
        for group in one.claims(space):
            g = groups.sample(group, space, 6, rng)
            gap = (one(groups.act(g, space, w)) - one(w)).detach().abs().max()
            assert gap < 1e-9, group
