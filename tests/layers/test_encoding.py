"""Encodings: their formula, and what stays equivariant behind them."""

import math

import pytest
import torch
from layer_kit import SPACES, draw_features, largest

from qemcli import groups
from qemcli.errors import UsageError
from qemcli.layers.encoding import Fourier, IOCode, encode
from qemcli.layers.features import act_on_features


@pytest.mark.parametrize("name", ["mlp3", "pool", "flatten"])
def test_encodings_are_equivariant_to_permutations_and_to_no_signs(name, rng):
    space = SPACES[name].running("tanh")
    module, channels = encode(space, 2, fourier=3, fourier_scale=1.0, io_code=(10, 6))
    module.double()
    h = draw_features(space, 2)
    assert [b.shape[-1] for _, b in module(h)] == [channels] * len(h)
    for group, exact in (("permutation", True), ("sign", False)):
        g = groups.sample(group, space, 3, rng)
        moved = module(act_on_features(space, g, h))
        gap = largest(moved, act_on_features(space, g, module(h)))
        assert (gap < 1e-12) is exact


def test_fourier_features_are_the_formula():
    torch.manual_seed(0)
    module = Fourier(2, 3, 0.5).double()
    taps = 4
    x = torch.randn(1, 2, 3, 2 * taps, dtype=torch.float64)
    (y, _), _ = module([(x, x[0, :1, :, :2]), (x, x[0, :1, :, :2])])
    for t in range(taps):
        entry = torch.tensor([x[0, 1, 2, t], x[0, 1, 2, taps + t]])
        for i in range(3):
            angle = 2 * math.pi * (entry @ module.frequencies[:, i])
            assert torch.isclose(y[0, 1, 2, i * taps + t], angle.sin())
            assert torch.isclose(y[0, 1, 2, (3 + i) * taps + t], angle.cos())


def test_fourier_frequencies_are_saved_and_not_trained():
    module = Fourier(1, 4, 3.0)
    assert not list(module.parameters())
    assert "frequencies" in module.state_dict()


def test_io_codes_mark_inputs_and_outputs_only():
    space = SPACES["mlp3"]
    module = IOCode(space, 1, 3, 3).double()
    (w1, b1), (w2, b2), (w3, b3) = module(draw_features(space, 1))
    code = module.outputs
    assert code.shape == (3, 7)
    # p = -1, 0, 1; f = 1, 1.25, 1.5
    assert torch.allclose(code[2, :3], torch.tensor([0, -(0.5**0.5), -1.0]).double(), atol=1e-6)
    assert code[:, -1].tolist() == [-1, 0, 1]
    assert torch.equal(w1[1, 2, :, 1:], module.inputs)
    assert torch.equal(w3[1, :, 2, 1:], code)
    assert torch.equal(b3[0, :, 1:], code)
    for x in (b1, w2, b2):
        assert not x[..., 1:].any()
    assert w3.transpose(1, 2).is_contiguous()


def test_io_code_needs_two_numbers():
    with pytest.raises(UsageError, match="io_code"):
        encode(SPACES["mlp3"], 1, io_code=(3,))
