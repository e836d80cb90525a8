"""Monomial layers: equivariant to their group and not to the other one, and complete."""

import pytest
import torch
from layer_kit import SPACES, draw_features, largest, randomise, span

from qemcli import groups
from qemcli.layers.features import act_on_features, pointwise
from qemcli.layers.monomial import PositiveScaleLinear, SignLinear
from qemcli.spaces import mlp

ACTIVATION = {PositiveScaleLinear: "relu", SignLinear: "tanh"}


def error(layer, space, group, between=None):
    """The largest relative error of equivariance over three random networks."""
    features = draw_features(space, 2)
    g = groups.sample(group, space, 3, torch.Generator().manual_seed(1), (0.01, 100.0))

    def run(x):
        return pointwise(between, layer(x)) if between else layer(x)

    moved = run(act_on_features(space, g, features))
    return largest(moved, act_on_features(space, g, run(features)))


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("kind", ACTIVATION)
def test_layer_commutes_with_its_monomial_group(name, kind):
    space = SPACES[name].running(ACTIVATION[kind])
    layer = randomise(kind(space, 2, 3).double())
    assert error(layer, space, "monomial") < 1e-10


@pytest.mark.parametrize("name", SPACES)
def test_scale_layer_commutes_with_signs_too(name):
    space = SPACES[name].running("tanh")
    layer = randomise(PositiveScaleLinear(space, 2, 3).double())
    assert error(layer, space, "monomial", torch.tanh) < 1e-10


def test_sign_layer_does_not_commute_with_scales():
    space = SPACES["mlp3"]
    layer = randomise(SignLinear(space, 2, 3).double())
    assert error(layer, space, "scale") > 1e-2


def test_tanh_between_scale_layers_breaks_scales():
    space = SPACES["pool"]
    layer = randomise(PositiveScaleLinear(space, 2, 3).double())
    assert error(layer, space, "scale", torch.relu) < 1e-10
    assert error(layer, space, "scale", torch.tanh) > 1e-2


@pytest.mark.parametrize(
    ("widths", "scale", "sign", "published"),
    [((2, 4, 4, 3), 29, 35, 35), ((2, 4, 4, 4, 3), 31, 37, 37), ((2, 4, 3), 27, 45, 30)],
)
def test_monomial_layers_span_every_equivariant_map(widths, scale, sign, published):
    space = mlp(widths)
    assert span(lambda s: PositiveScaleLinear(s, 1, 1), space, scale + 10) == scale
    assert span(lambda s: SignLinear(s, 1, 1), space, sign + 10) == sign
    assert span(lambda s: SignLinear(s, 1, 1, complete=False), space, sign + 10) == published
