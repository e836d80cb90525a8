"""How Transformer-NFN's released code draws its polynomial layers.

Terms that feed one output form groups; a group is drawn from N(0, s^2), s^2 = 2 / sum (fan_in +
fan_out), and from N(0, s^4) where it holds products of weights or sums over neurons ("degree 2").
So attention starts about a thousand times too small beside biases (math: arXiv:2410.04209's code;
the fans below are those of the code, slips included).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor, nn

from qemcli.layers.polynomial import Equivariant, Invariant

# Sources of a map, in the order of what is gathered, by the group that they are drawn in.
WHOLE = ("products", "products", "sums", "sums", "sums", "biases")


@dataclass(frozen=True)
class Sizes:
    """Heads, their key and value numbers, and hidden neurons of the networks that are read."""

    heads: int
    keys: int
    values: int
    neurons: int


def draw(layer: Equivariant | Invariant, sizes: Sizes) -> None:
    """Draw the parameters of a layer anew."""
    if isinstance(layer, Equivariant):
        _equivariant(layer, sizes)
    else:
        _invariant(layer, sizes)


def _normal(x: Tensor, fans: int, degree: int = 1) -> None:
    nn.init.normal_(x, std=(2 / fans) ** (degree / 2))


def _equivariant(layer: Equivariant, s: Sizes) -> None:
    d, c, e, a = layer.width, layer.c_in, layer.c_out, s.neurons
    for maps, n in zip(layer.maps.data, (s.keys, s.keys, s.values), strict=True):
        _normal(maps, c * n + s.heads * d)
    _normal(layer.out.data, c * d + s.heads * s.values + c + s.heads * s.values * d)
    product, up, down = c * s.heads * d * d + 1, c * d * a + 1, c * a * d + 1
    bias, neuron = c * a + 1, c * d + a
    groups = {
        "up": {
            "products": 2 * product + c * s.heads * d + d,
            "sums": bias + down + neuron + up + c * a + d + neuron + c + d * a,
            "biases": c + a + c * a + 1 + e,
        },
        "up_bias": {
            "products": 2 * product,
            "sums": down + neuron + up + neuron + bias,
            "biases": c + a + c * d + 1 + e,
        },
        "down": {
            "products": 2 * product,
            "sums": down + bias + up + 2 * neuron,
            "biases": c + a + c * d + 1 + e * d,
        },
        "down_bias": {
            "products": 2 * product,
            "sums": 2 * down + bias + up,
            "biases": bias + c * d + 1 + e * d,
        },
    }
    targets = dict(zip(groups, (e, e, e * d, e * d), strict=True))
    for name, columns in _runs(targets).items():
        fans = groups[name]
        for group, rows in zip(WHOLE, _runs(layer.sources["whole"]).values(), strict=True):
            part = layer.whole.weight.data[:, rows, columns]
            _normal(part, fans[group], 1 if group == "biases" else 2)
        assert layer.whole.bias is not None
        _normal(layer.whole.bias.data[:, columns], fans["biases"])
        if name == "down_bias":
            continue
        own = zip(("sums", "sums", "biases"), _runs(layer.sources["neuron"]).values(), strict=True)
        for group, rows in own:
            part = layer.neuron.weight.data[:, rows, columns]
            _normal(part, fans[group], 1 if group == "biases" else 2)
    inputs = zip(("products", "sums"), _runs(layer.sources["input"]).values(), strict=True)
    for group, rows in inputs:
        _normal(layer.input.weight.data[:, rows], groups["up"][group], 2)
    _normal(layer.entry.data, groups["up"]["sums"], 2)


def _invariant(layer: Invariant, s: Sizes) -> None:
    c, d, e, a = layer.scores.shape[1], layer.width, layer.outputs, s.neurons
    for x in (layer.scores, layer.values):
        _normal(x.data, 2 * (c * s.heads * d * d + 1), 2)
    sums, biases = 2 * (c * d * a + 1), c * a + 1 + 2 + e
    parts = layer.ffn.weight.data.split([c, c * d, c, c * d], dim=1)
    for x, fans, degree in zip(parts, (sums, sums, biases, biases), (2, 2, 1, 1), strict=True):
        _normal(x, fans, degree)
    assert layer.ffn.bias is not None
    _normal(layer.ffn.bias.data, biases)


def _runs(sizes: dict[str, int] | list[int]) -> dict[str, slice]:
    """Consecutive slices of the given sizes."""
    named = sizes if isinstance(sizes, dict) else {str(i): n for i, n in enumerate(sizes)}
    ends = list(accumulate(named.values()))
    return {name: slice(end - n, end) for (name, n), end in zip(named.items(), ends, strict=True)}
