"""Linear maps of weight spaces that commute with monomial groups: permutations with scales, or with
signs.

Tran et al., Monomial Matrix Group Equivariant Neural Functional Networks, arXiv:2409.11697. A map
that commutes with the diagonal can only join coordinates of the same character: W_l[j,k] has
d_l[j]/d_{l-1}[k], b_l[j] has d_l[j]; so there are no means, no cross terms between layers, and no
constant but on b_L.

    W~_1[j,:], b~_1[j] = M_1 [W_1[j,:], b_1[j]]        W~_l = A_l W_l,  b~_l = D_l b_l  (1 < l < L)
    W~_L[:,k] = A_L W_L[:,k]                           b~_L = D_L b_L + tau
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from qemcli.layers.features import Features, require_hidden
from qemcli.spaces import Chain


def _xavier(blocks: list[Tensor], reads: list[int], writes: int) -> None:
    """Normal with variance 2/(fan_in + fan_out), summed over the maps that write the same
    tensor.
    """
    std = math.sqrt(2 / (sum(reads) + writes * len(reads)))
    for block in blocks:
        nn.init.normal_(block.detach(), 0, std)


class PositiveScaleLinear(nn.Module):
    """All linear maps that commute with permutations and POSITIVE scales of the hidden neurons
    (ReLU).

    They also commute with signs, but are not all that do. Features of c_in -> c_out channels; L >=
    2. Source: arXiv:2409.11697, section 4 (weights and biases of the ReLU case).
    """

    def __init__(self, space: Chain, c_in: int, c_out: int) -> None:
        super().__init__()
        require_hidden(space, "a monomial layer")
        first, *middle, last = space.layers
        c, m = c_in, c_out
        self.n0, self.n_out, self.c_in, self.c_out = first.cols, last.rows, c, m
        a, z = first.cols * first.taps, last.rows * last.taps
        self.first = nn.Parameter(torch.empty((1 + a) * m, (1 + a) * c))
        self.weights = nn.ParameterList(torch.empty(la.taps * m, la.taps * c) for la in middle)
        self.biases = nn.ParameterList(torch.empty(m, c) for _ in middle)
        self.last = nn.Parameter(torch.empty(z * m, z * c))
        self.last_bias = nn.Parameter(torch.empty(last.rows * m, last.rows * c))
        self.tau = nn.Parameter(torch.empty(last.rows * m))
        _xavier([self.first[:m]], [c, a * c], m)
        _xavier([self.first[m:]], [c, a * c], a * m)
        for theta in [*self.weights, *self.biases, self.last]:
            _xavier([theta], [theta.shape[1]], theta.shape[0])
        _xavier([self.last_bias, self.tau], [last.rows * c], last.rows * m)

    def forward(self, features: Features) -> Features:
        (first, bias), *middle, (last, last_bias) = features
        y = linear(torch.cat([bias, first.flatten(2)], dim=-1), self.first)
        out = [(y[..., self.c_out :].unflatten(-1, (self.n0, -1)), y[..., : self.c_out])]
        for (weight, bias), a, d in zip(middle, self.weights, self.biases, strict=True):
            out.append((linear(weight, a), linear(bias, d)))
        folded = linear(last.transpose(1, 2).flatten(2), self.last)
        end = linear(last_bias.flatten(1), self.last_bias, self.tau)
        out.append(
            (
                folded.unflatten(-1, (self.n_out, -1)).transpose(1, 2),
                end.unflatten(-1, (self.n_out, -1)),
            )
        )
        return out


class SignLinear(nn.Module):
    """All linear maps that commute with permutations and SIGNS of the hidden neurons (tanh, sine).

    A sign is its own inverse, so W_L[j,k] has the character of b_{L-1}[k] too, and for L = 2 that
    of W_1[k,:]. `complete=False` leaves out what the published code does for L = 2: W_1 with W_2
    and b_1, W_2 into b_1 (a span of 30 of 45 for widths 2, 4, 3). Not equivariant to positive
    scales. Source: arXiv:2409.11697.
    """

    def __init__(self, space: Chain, c_in: int, c_out: int, complete: bool = True) -> None:
        super().__init__()
        self.base = PositiveScaleLinear(space, c_in, c_out)
        c, m = c_in, c_out
        last = space.layers[-1]
        self.shallow = len(space.layers) == 2
        z = last.rows * last.taps
        a = space.layers[0].cols * space.layers[0].taps if self.shallow else 0
        self.to_last = nn.Parameter(torch.empty(z * m, (1 + a * complete) * c))
        writes = 0 if self.shallow and not complete else 1 + a
        self.from_last = nn.Parameter(torch.empty(writes * m, z * c))
        _xavier([self.to_last], [self.to_last.shape[1], z * c], z * m)
        _xavier([self.base.last], [self.to_last.shape[1], z * c], z * m)
        if writes:
            _xavier([self.from_last], [z * c, c], writes * m)

    def forward(self, features: Features) -> Features:
        out = self.base(features)
        last = features[-1][0].transpose(1, 2).flatten(2)
        weight, bias = features[-2]
        reads = self.to_last.shape[1]
        seen = bias if reads == bias.shape[-1] else torch.cat([bias, weight.flatten(2)], dim=-1)
        y = linear(seen, self.to_last).unflatten(-1, (self.base.n_out, -1)).transpose(1, 2)
        out[-1] = (out[-1][0] + y, out[-1][1])
        if len(self.from_last):
            y = linear(last, self.from_last)
            m = self.base.c_out
            weight, bias = out[-2]
            if self.shallow:
                weight = weight + y[..., m:].unflatten(-1, (self.base.n0, -1))
            out[-2] = (weight, bias + y[..., :m])
        return out
