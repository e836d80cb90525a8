"""Deltas: every channel of the features is one branch, in the tensors' own shapes."""

import pytest
import torch
from layer_kit import SPACES, draw_features

from qemcli.layers.deltas import Deltas
from qemcli.layers.features import exit_door


@pytest.mark.parametrize("name", ["mlp3", "pool", "flatten"])
def test_deltas_are_the_channels_of_the_features(name):
    space = SPACES[name]
    features = draw_features(space, 3)
    module = Deltas(space, 0.5).double()
    with torch.no_grad():
        module.scales.mul_(torch.arange(1, len(space.tensors) + 1))
    deltas = module(features)
    for j in range(3):
        one = [(w.unflatten(-1, (3, -1))[..., j, :], b[..., j : j + 1]) for w, b in features]
        expected = exit_door(space, one)
        for i, tensor in enumerate(space.names, start=1):
            assert torch.allclose(deltas[tensor][:, j], 0.5 * i * expected[tensor])
