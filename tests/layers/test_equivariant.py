"""NP and HNP layers: equal to PyPI's nfn, equivariant, complete."""

import pytest
import torch
from layer_kit import SPACES, draw_features, largest, span
from nfn.layers import HNPLinear as TheirHNP
from nfn.layers import NPLinear as TheirNP
from nfn_bridge import copy_hnp, copy_np, network_spec, ours, theirs

from qemcli import groups
from qemcli.errors import UnsupportedError
from qemcli.layers.equivariant import HNPLinear, NPLinear
from qemcli.layers.features import act_on_features
from qemcli.layers.neurons import mix, seen
from qemcli.spaces import cnn, mlp

MAKERS = {
    "hnp": lambda s, a, b: HNPLinear(s, a, b),
    "hnp-full": lambda s, a, b: HNPLinear(s, a, b, full_basis=True),
    "np": lambda s, a, b: NPLinear(s, a, b),
    "np-posemb": lambda s, a, b: NPLinear(s, a, b, io_embedding=True),
}


def assert_same(space, layer, other, channels):
    """Answers, and gradients of what is read."""
    features = [(w.requires_grad_(), b.requires_grad_()) for w, b in draw_features(space, channels)]
    pairs = layer(features), ours(other(theirs(space, features)))
    assert largest(*pairs) < 1e-10
    leaves = [x for pair in features for x in pair]
    found, expected = (
        torch.autograd.grad(sum(x.cos().sum() for pair in out for x in pair), leaves)
        for out in pairs
    )
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 1e-10 * b.abs().max()


@pytest.mark.parametrize("io_embedding", [False, True])
@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("channels", [(1, 3), (3, 2)])
def test_np_equals_nfn(name, channels, io_embedding):
    space = SPACES[name]
    layer = NPLinear(space, *channels, io_embedding=io_embedding).double()
    other = TheirNP(network_spec(space), *channels, io_embed=io_embedding).double()
    copy_np(layer, other)
    assert_same(space, layer, other, channels[0])
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in other.parameters())


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("channels", [(1, 3), (3, 2)])
def test_hnp_equals_nfn(name, channels):
    space = SPACES[name]
    layer = HNPLinear(space, *channels).double()
    other = TheirHNP(network_spec(space), *channels).double()
    copy_hnp(space, layer, other)
    assert_same(space, layer, other, channels[0])
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in other.parameters())


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("kind", MAKERS)
def test_layer_commutes_with_hidden_permutations(name, kind):
    space = SPACES[name]
    layer = MAKERS[kind](space, 2, 3).double()
    features = draw_features(space, 2)
    g = groups.sample("permutation", space, 3, torch.Generator().manual_seed(1))
    moved = layer(act_on_features(space, g, features))
    assert largest(moved, act_on_features(space, g, layer(features))) < 1e-10


@pytest.mark.parametrize("kind", MAKERS)
def test_layer_does_not_commute_with_scales_or_uncoupled_permutations(kind):
    space = SPACES["pool"]
    layer = MAKERS[kind](space, 2, 3).double()
    features = draw_features(space, 2)
    g = groups.sample("scale", space, 3, torch.Generator().manual_seed(1))
    moved = act_on_features(space, g, features)
    assert largest(layer(moved), act_on_features(space, g, layer(features))) > 1e-3

    def uncoupled(pairs):
        return [(w.flip(1) if l == 1 else w, b) for l, (w, b) in enumerate(pairs)]

    assert largest(layer(uncoupled(features)), uncoupled(layer(features))) > 1e-3


@pytest.mark.parametrize(
    ("widths", "dimension", "published"),
    [((2, 4, 4, 3), 163, 160), ((2, 4, 4, 4, 3), 221, 218), ((2, 4, 3), 117, 114)],
)
def test_hnp_spans_every_equivariant_map(widths, dimension, published):
    space = mlp(widths)
    assert span(lambda s: HNPLinear(s, 1, 1, full_basis=True), space, dimension + 20) == dimension
    assert span(lambda s: HNPLinear(s, 1, 1), space, dimension + 20) == published


@pytest.mark.parametrize(
    ("widths", "dimension"), [((4, 4, 4, 4), 62), ((4, 4, 4, 4, 4), 100), ((4, 4, 4), 32)]
)
def test_np_spans_every_equivariant_map(widths, dimension):
    assert span(lambda s: NPLinear(s, 1, 1), mlp(widths), dimension + 20) == dimension


@pytest.mark.parametrize("kind", ["hnp", "np"])
def test_layer_starts_as_nfn_does(kind):
    space = cnn([1, 8, 8, 8], 10)
    torch.manual_seed(0)
    layer, copy = MAKERS[kind](space, 8, 8), MAKERS[kind](space, 8, 8)
    if kind == "hnp":
        copy_hnp(space, copy, TheirHNP(network_spec(space), 8, 8))
    else:
        copy_np(copy, TheirNP(network_spec(space), 8, 8))
    for (name, p), q in zip(layer.named_parameters(), copy.parameters(), strict=True):
        assert 0.9 < (p.std() / q.std()).item() < 1.1, name
        if p.dim() == 2 and p.shape[1] > 100:  # each row of the map has the bound of its target
            ratio = p.abs().amax(1) / q.abs().amax(1)
            assert ratio.min() > 0.8, name
            assert ratio.max() < 1.25, name


def test_layer_refuses_one_layer():
    with pytest.raises(UnsupportedError, match="at least two layers"):
        HNPLinear(mlp([3, 2]), 1, 1)


def test_the_gradients_of_mix_are_those_of_its_formula():
    rng = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_()

    def run(x, weight, left, right):
        entries, over_k, over_j = seen(x)
        return mix(entries, weight, left, right), over_k, over_j

    given = draw(2, 3, 4, 5), draw(6, 5), draw(2, 3, 6), draw(2, 4, 6)
    y, over_k, over_j = run(*given)
    x, weight, left, right = given
    assert torch.allclose(y, x @ weight.T + left[:, :, None] + right[:, None])
    assert torch.allclose(over_k, x.mean(2))
    assert torch.allclose(over_j, x.mean(1))
    assert torch.autograd.gradcheck(run, given)
