"""Batched networks against plain torch modules, one at a time."""

from __future__ import annotations

import pytest
import torch
from strategies import draw_cnn, draw_networks
from torch import Tensor, nn

from qemcli.errors import InputError, UnsupportedError
from qemcli.functions import image_shape, probe_inputs, respond
from qemcli.spaces import ACTIVATIONS, Chain, Forward, Layer, chain, cnn, mlp, siren


class Sine(nn.Module):
    """sin(w0 z)."""

    def __init__(self, w0: float) -> None:
        super().__init__()
        self.w0 = w0

    def forward(self, z: Tensor) -> Tensor:
        return torch.sin(self.w0 * z)


class Erf(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.erf(z)


class Absolute(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.maximum(z, -z)


class Arctan(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.atan(z)


def activation_module(space: Chain) -> nn.Module:
    modules: dict[str, nn.Module] = {
        "relu": nn.ReLU(),
        "leaky_relu": nn.LeakyReLU(),
        "abs": Absolute(),
        "identity": nn.Identity(),
        "tanh": nn.Tanh(),
        "sin": Sine(space.forward.w0),
        "erf": Erf(),
        "arctan": Arctan(),
        "sigmoid": nn.Sigmoid(),
        "gelu": nn.GELU(),
        "silu": nn.SiLU(),
        "softplus": nn.Softplus(),
        "elu": nn.ELU(),
    }
    return modules[space.activation or ""]


def reference(space: Chain, w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The same answers by nn.Sequential, network by network."""
    forward, answers = space.forward, []
    for i in range(len(w[space.tensors[0].name])):
        parts: list[nn.Module] = []
        for layer, following in zip(space.layers, [*space.layers[1:], None], strict=True):
            weight, bias = w[layer.weight][i], w[layer.bias][i] if layer.bias else None
            module: nn.Module
            if layer.conv:
                kernel = (weight.shape[2], weight.shape[3])
                module = nn.Conv2d(layer.cols, layer.rows, kernel, forward.stride, forward.padding)
            else:
                module = nn.Linear(weight.shape[1], layer.rows, bias=bias is not None)
            module.double()
            with torch.no_grad():
                module.weight.copy_(weight)
                if bias is not None:
                    module.bias.copy_(bias)
            parts.append(module)
            if following is None:
                continue
            parts.append(activation_module(space))
            if layer.conv and forward.pooling != "none":
                parts.append(nn.MaxPool2d(2) if forward.pooling == "max" else nn.AvgPool2d(2))
            if layer.conv and not following.conv:
                parts += [nn.AdaptiveAvgPool2d(1)] if forward.junction == "pool" else []
                parts.append(nn.Flatten())
        with torch.no_grad():
            answers.append(nn.Sequential(*parts)(x) + forward.offset)
    return torch.stack(answers)


def two_dense_layers() -> Chain:
    layers = [
        Layer("c1.weight", "c1.bias", 3, 2, 15, conv=True),
        Layer("c2.weight", "c2.bias", 5, 3, 6, conv=True),
        Layer("f1.weight", "f1.bias", 7, 5, 12),
        Layer("f2.weight", "f2.bias", 4, 7),
    ]
    kernels = {"c1.weight": (3, 5), "c2.weight": (3, 2)}
    return chain(layers, "cnn", kernels, "relu", Forward(2, 1, junction="flatten", known=True))


SPACES = {
    "mlp": mlp([3, 5, 4, 2], "relu"),
    "mlp without biases": mlp([3, 5, 4, 2], "tanh", bias=False),
    "one layer": mlp([3, 2], "relu"),
    "siren": siren([2, 5, 7, 3], w0=30.0, convention="dws"),
    "cnn pool": cnn([2, 3, 5, 4], 6),
    "cnn max flatten": draw_cnn([2, 3, 5, 4], "relu", "max", flatten=True),
    "cnn average flatten": draw_cnn([2, 3, 5, 4], "tanh", "average", flatten=True),
    "cnn strides, oblong kernels, two dense": two_dense_layers(),
}


def assert_as_reference(space: Chain, rng: torch.Generator) -> None:
    w = draw_networks(space, batch=3)
    x = probe_inputs(space, 4, rng, torch.float64)
    torch.testing.assert_close(respond(space, w, x), reference(space, w, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SPACES)
def test_respond_equals_plain_modules(name: str, rng: torch.Generator) -> None:
    assert_as_reference(SPACES[name], rng)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_respond_knows_every_activation(activation: str, rng: torch.Generator) -> None:
    assert_as_reference(mlp([3, 5, 4, 2], activation), rng)
    assert_as_reference(cnn([2, 3, 4], 5, activation=activation), rng)


def test_respond_in_chunks_equals_one_piece(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = SPACES["cnn pool"]
    w, x = draw_networks(space, batch=7), probe_inputs(space, 3, rng, torch.float64)
    whole = respond(space, w, x)
    monkeypatch.setattr("qemcli.functions.MEMORY", 3 * 6 * 3 * 2 * 64)
    torch.testing.assert_close(respond(space, w, x), whole)


def test_respond_keeps_the_dtype(rng: torch.Generator) -> None:
    space = SPACES["siren"]
    w = draw_networks(space, batch=2, dtype=torch.float32)
    answers = respond(space, w, probe_inputs(space, 3, rng, torch.float64))
    assert answers.dtype == torch.float32
    assert answers.shape == (2, 3, 3)


def test_respond_refuses_what_it_cannot_run(rng: torch.Generator) -> None:
    space = mlp([3, 5, 2], None)
    w = draw_networks(space, batch=2)
    with pytest.raises(InputError, match="activation is not known"):
        respond(space, w, torch.zeros(4, 3))
    with pytest.raises(InputError, match="do not fit"):
        respond(mlp([3, 5, 2]), w, torch.zeros(4, 2))


def test_probe_inputs_lie_where_the_family_reads(rng: torch.Generator) -> None:
    coordinates = probe_inputs(siren([2, 5, 1]), 200, rng)
    assert coordinates.abs().max() <= 1
    assert coordinates.min() < -0.9
    assert probe_inputs(mlp([3, 4, 2]), 5, rng, torch.float64).dtype == torch.float64
    stated = cnn([1, 3], 2, forward=Forward(padding=1, junction="pool", image=(1, 28, 20)))
    assert probe_inputs(stated, 5, rng).shape == (5, 1, 28, 20)


def test_image_shape_matches_the_flattened_positions() -> None:
    forward = Forward(padding=1, junction="flatten")
    assert image_shape(cnn([2, 3], 2, positions=81, forward=forward)) == (2, 9, 9)
    assert image_shape(cnn([2, 3], 2, positions=90, forward=forward)) == (2, 9, 10)


def test_image_shape_refuses_positions_that_no_image_gives() -> None:
    forward = Forward(padding=1, junction="flatten")
    with pytest.raises(UnsupportedError, match="no image"):
        image_shape(cnn([1, 3], 2, positions=7, forward=forward))
