"""Pools: invariant to what they claim, finite on dead neurons."""

import pytest
import torch
from layer_kit import SPACES, draw_features, randomise

from qemcli import groups
from qemcli.layers.features import act_on_features
from qemcli.layers.pooling import (
    HNPPool,
    NormalisingPool,
    NPPool,
    PublishedNormalisingPool,
    direction,
    reciprocal_length,
)


def gap(pool, space, group, features=None, scales=(0.1, 10.0)):
    features = features or draw_features(space, 2)
    g = groups.sample(group, space, 3, torch.Generator().manual_seed(1), scales)
    before, after = pool(features), pool(act_on_features(space, g, features))
    assert before.isfinite().all()
    return ((after - before).abs().max() / before.std(0).mean()).item()


@pytest.mark.parametrize("name", SPACES)
def test_means_are_invariant_to_permutations_only(name):
    space = SPACES[name]
    for pool in (NPPool(space), HNPPool(space)):
        assert pool(draw_features(space, 2)).shape[1] == 2 * pool.per_channel
        assert gap(pool, space, "permutation") < 1e-10
        assert gap(pool, space, "scale") > 1e-3


@pytest.mark.parametrize("name", SPACES)
def test_normalising_pool_is_invariant_to_scales_of_any_size(name):
    space = SPACES[name]
    pool = randomise(NormalisingPool(space, 2).double())
    assert gap(pool, space, "monomial", scales=(1e-120, 1e120)) < 1e-10


def with_dead_neurons(space):
    """Neuron 0 of every hidden layer: zero row, bias and column after it; tiny rows too."""
    features = draw_features(space, 2)
    for l, (w, b) in enumerate(features):
        if l < len(features) - 1:
            w[:, 0], b[:, 0] = 0, 0
            w[:, 1:2] *= 1e-13
        if l > 0:
            w[:, :, 0] = 0
    return features


def test_normalising_pool_is_exact_with_dead_neurons_where_the_published_floor_is_not():
    space = SPACES["pool"]
    exact = randomise(NormalisingPool(space, 2).double())
    floor = randomise(PublishedNormalisingPool(space, 2).double())
    assert gap(exact, space, "monomial", with_dead_neurons(space)) < 1e-10
    assert gap(floor, space, "monomial", with_dead_neurons(space)) > 1e-6


def test_direction_of_zero_is_zero_with_a_finite_gradient():
    v = torch.tensor(
        [[0.0, 0.0], [3.0, 4.0], [1e-300, 0.0]], dtype=torch.float64, requires_grad=True
    )
    u = direction(v)
    u.sum().backward()
    expected = torch.tensor([[0.0, 0.0], [0.6, 0.8], [1.0, 0.0]], dtype=torch.float64)
    assert torch.allclose(u, expected, rtol=1e-14, atol=0)
    assert v.grad[:2].isfinite().all()
    assert reciprocal_length(v).flatten().tolist() == pytest.approx([0.0, 0.2, 1e300])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_direction_is_that_of_vectors_of_any_size(dtype):
    kind = torch.finfo(dtype)
    sizes = [kind.tiny, kind.tiny**0.5, kind.tiny**0.25, 1.0, kind.max**0.5, kind.max / 8]
    v = torch.tensor(sizes, dtype=dtype)[:, None] * torch.tensor([3.0, -4.0], dtype=dtype)
    expected = torch.tensor([0.6, -0.8], dtype=dtype).expand_as(v)
    assert torch.allclose(direction(v), expected, rtol=4 * kind.eps, atol=0)
    assert torch.allclose(direction(v[3:4]), expected[3:4], rtol=4 * kind.eps, atol=0)
    assert torch.allclose(v * reciprocal_length(v), expected, rtol=4 * kind.eps, atol=0)


def test_direction_has_the_gradient_of_the_normalised_vector():
    v = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(direction, v.requires_grad_())
    assert torch.autograd.gradcheck(reciprocal_length, v)
