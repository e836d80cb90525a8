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
        signs = self.signs(features)
        out: Features = []
        for l, (weight, bias) in enumerate(features):
            channels = bias.shape[-1]
            x, y = weight.unflatten(-1, (channels, -1)), bias
            if l < len(signs):
                x, y = x * signs[l][:, :, None, :, None], y * signs[l]
            if l > 0:
                x = x * signs[l - 1][:, None, :, :, None]
            both = torch.cat([x.flatten(-2), weight.abs()], dim=-1)
            out.append((both, torch.cat([y, bias.abs()], dim=-1)))
        return out

    def signs(self, features: Features) -> list[Tensor]:
        """s_l (b, n_l, channels), one a hidden layer."""
        signs: list[Tensor] = []
        for l, (weight, bias) in enumerate(features[:-1]):
            s = bias
            if l > 0:
                taps = weight.unflatten(-1, (bias.shape[-1], -1)).mean(-1)
                s = s + torch.einsum("bjkc,bkc->bjc", taps, signs[-1]) / weight.shape[2] ** 0.5
            signs.append(s.tanh())
        return signs


def odd(name: str) -> Callable[[Tensor], Tensor]:
    """What may stand between sign-equivariant layers: tanh or sin; UsageError for another."""
    if name not in ("tanh", "sin"):
        raise UsageError(f"no odd function is called '{name}'", "choose tanh or sin")
    return torch.tanh if name == "tanh" else torch.sin


def even(name: str) -> Absolute | Products:
    """The even map of a name, absolute or products; UsageError for another."""
    if name not in ("absolute", "products"):
        raise UsageError(f"no even map is called '{name}'", "choose absolute or products")
    return Absolute() if name == "absolute" else Products()
