"""Seven statistics, standardisation."""

import torch
from layer_kit import SPACES, draw_weights

from qemcli.layers.statistics import Standardise, seven, tensor_statistics


def test_seven_equals_torch(rng):
    x = torch.randn(3, 41, generator=rng, dtype=torch.float64)
    q = torch.quantile(x, torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64), dim=-1)
    expected = torch.stack([x.mean(-1), x.var(-1), *q], dim=-1)
    assert torch.allclose(seven(x), expected, atol=1e-12)


def test_seven_of_one_entry_is_finite():
    assert seven(torch.tensor([[2.0]])).tolist() == [[2.0, 0.0, 2.0, 2.0, 2.0, 2.0, 2.0]]


def test_statistics_do_not_even_round_differently_when_entries_are_shuffled(rng):
    space = SPACES["pool"]
    w = draw_weights(space, 2, rng)
    shuffled = {n: x.flatten(1).flip(1).view_as(x) for n, x in w.items()}
    assert torch.equal(tensor_statistics(space, w), tensor_statistics(space, shuffled))


def test_standardise_brings_the_training_set_to_unit_variance(rng):
    x = torch.randn(100, 3, generator=rng) * torch.tensor([1e6, 1.0, 0.0]) + 5
    layer = Standardise(3)
    assert torch.equal(layer(x), x)
    layer.fit(x)
    y = layer(x)
    assert torch.allclose(y.std(0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-4)
    assert torch.allclose(y.mean(0), torch.zeros(3), atol=1e-3)
