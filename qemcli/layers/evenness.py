"""The last step of a model of the diagonal group: from equivariant features to what a pool reads.

Absolute and Products take sign-equivariant features to features on which signs no longer act;
permutations still do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qemcli.errors import UsageError
from qemcli.layers.features import Features, pointwise, relu
from qemcli.registry import suggest
from qemcli.spaces import Chain

ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sin": torch.sin,
    "identity": lambda x: x,
}


class Relu(nn.Module):
    """max(x, 0), for positive scales: the pool takes care of them."""

    widens = 1

    def forward(self, features: Features) -> Features:
        return pointwise(relu, features)


class Absolute(nn.Module):
    """|x| of every entry. Which signs belong together is lost. Source: arXiv:2409.11697."""

    widens = 1

    def forward(self, features: Features) -> Features:
        return pointwise(torch.abs, features)


class Products(nn.Module):
    """|x|, and every entry times the signs of its neurons: two channels for one, nothing learned.

        s_1[j] = tanh(b_1[j]),   s_l[j] = tanh(b_l[j] + n^{-1/2} sum_k W_l[j,k] s_{l-1}[k])
        W_l[j,k] s_l[j] s_{l-1}[k],      b_l[j] s_l[j],      s_0 = s_L = 1

    s_l[j] changes its sign with neuron j, so the products do not: they keep how the neurons' signs
    hang together. Channels apart; the sum is over the taps' mean. Ours; the products are those of
    the sign-equivariant messages of arXiv:2406.10685.
    """

    widens = 2

    def forward(self, features: Features) -> Features:
        products = signed(features, neuron_signs(features))
        return [
            (torch.cat([x, weight.abs()], dim=-1), torch.cat([y, bias.abs()], dim=-1))
            for (x, y), (weight, bias) in zip(products, features, strict=True)
        ]


class Resign(nn.Module):
    """The way back from features that signs leave alone: times a learned odd factor of each neuron.

        W~_l[j,k] t_l[j] t_{l-1}[k],      b~_l[j] t_l[j],      t_l = P_l s_l,   t_0 = t_L = 1

    with the s_l of Products, from sign-equivariant features of c_in channels. Features of k
    channels -> sign-equivariant features of k channels. Ours.
    """

    def __init__(self, space: Chain, c_in: int, k: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(c_in, k, bias=False) for _ in space.hidden)

    def forward(self, features: Features, signs: list[Tensor]) -> Features:
        return signed(features, [p(s) for p, s in zip(self.maps, signs, strict=True)])


def neuron_signs(features: Features) -> list[Tensor]:
    """s_l (b, n_l, channels) of Products, one a hidden layer: it flips as neuron j does."""
    signs: list[Tensor] = []
    for l, (weight, bias) in enumerate(features[:-1]):
        s = bias
        if l > 0:
            taps = weight.unflatten(-1, (bias.shape[-1], -1)).mean(-1)
            s = s + torch.einsum("bjkc,bkc->bjc", taps, signs[-1]) / weight.shape[2] ** 0.5
        signs.append(s.tanh())
    return signs


def signed(features: Features, signs: list[Tensor]) -> Features:
    """Every entry times the numbers s_l (b, n_l, channels) of the hidden neurons it touches."""
    out: Features = []
    for l, (weight, bias) in enumerate(features):
        x, y = weight.unflatten(-1, (bias.shape[-1], -1)), bias
        if l < len(signs):
            x, y = x * signs[l][:, :, None, :, None], y * signs[l]
        if l > 0:
            x = x * signs[l - 1][:, None, :, :, None]
        out.append((x.flatten(-2), y))
    return out


def odd(name: str) -> Callable[[Tensor], Tensor]:
    """What may stand between sign-equivariant layers; UsageError for a name not in ODD."""
    if name not in ODD:
        raise UsageError(f"no odd function is called '{name}'", suggest(name, list(ODD)))
    return ODD[name]


def even(name: str) -> Absolute | Products:
    """The even map of a name, absolute or products; UsageError for another."""
    if name not in ("absolute", "products"):
        raise UsageError(f"no even map is called '{name}'", "choose absolute or products")
    return Absolute() if name == "absolute" else Products()
