"""Encodings of features: Gaussian Fourier features of every entry, codes of inputs and outputs.

    x in R^c of one entry   ->   [sin(2 pi B^T x), cos(2 pi B^T x)],      B_ij ~ N(0, scale^2)

Neither odd nor homogeneous: what follows is equivariant to permutations only. B is drawn once and
saved with the model, but not trained: another draw is another model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qemcli.errors import UsageError
from qemcli.layers.features import Features, require_hidden
from qemcli.spaces import Chain


class Fourier(nn.Module):
    """Fourier features of every entry, taps apart: c channels -> 2 * frequencies channels.

    Source: arXiv:2302.14040 (128 frequencies; scale 3 for MNIST, 10 for CIFAR and Fashion-MNIST).
    """

    frequencies: Tensor

    def __init__(self, c_in: int, frequencies: int, scale: float) -> None:
        super().__init__()
        self.channels = 2 * frequencies
        self.register_buffer("frequencies", scale * torch.randn(c_in, frequencies))

    def forward(self, features: Features) -> Features:
        *front, (last, bias) = features
        coded = [(self._encode(w), self._encode(b)) for w, b in front]
        # The last weight keeps its layout in memory (features.py).
        return [*coded, (self._encode(last.transpose(1, 2)).transpose(1, 2), self._encode(bias))]

    def _encode(self, x: Tensor) -> Tensor:
        """(..., c f) -> (..., 2 frequencies f), channels outer and taps inner."""
        entries = x.unflatten(-1, (len(self.frequencies), -1)).transpose(-1, -2)
        angle = 2 * math.pi * (entries @ self.frequencies)
        coded = torch.cat([angle.sin(), angle.cos()], dim=-1)
        return coded.transpose(-1, -2).flatten(-2)


class IOCode(nn.Module):
    """Sinusoidal codes of inputs and outputs, joined to the channels: c -> c + 2 * bands + 1.

    p = linspace(-1, 1, n);  code = [sin(pi f p), cos(pi f p), p],  f = linspace(1, largest/2,
    bands). The inputs' along the columns of W_1, the outputs' along the rows of W_L and on b_L,
    zeros elsewhere. Behind it an NP layer commutes with permutations of the hidden neurons only.
    Source: arXiv:2302.14040 (largest 10 and 6 bands, or 3 and 3).
    """

    inputs: Tensor
    outputs: Tensor

    def __init__(self, space: Chain, c_in: int, largest: float, bands: int) -> None:
        super().__init__()
        require_hidden(space, "a code of inputs and outputs")
        self.width = 2 * bands + 1
        self.channels = c_in + self.width
        first, last = space.layers[0], space.layers[-1]
        inputs = _code(first.cols, largest, bands).repeat_interleave(first.taps, dim=-1)
        outputs = _code(last.rows, largest, bands)
        self.register_buffer("inputs", inputs, persistent=False)
        self.register_buffer("outputs", outputs, persistent=False)
        self.taps = last.taps

    def forward(self, features: Features) -> Features:
        (first, bias), *middle, (last, last_bias) = features
        taps = [first.shape[-1] // bias.shape[-1]]
        taps += [w.shape[-1] // b.shape[-1] for w, b in middle]
        empty = [bias.new_zeros(1, 1, self.width * t) for t in taps]
        zeros = bias.new_zeros(self.width)
        head = (_joined(first, self.inputs), _joined(bias, zeros))
        body = [
            (_joined(w, code), _joined(b, zeros))
            for (w, b), code in zip(middle, empty[1:], strict=True)
        ]
        code = self.outputs.repeat_interleave(self.taps, dim=-1)
        end = _joined(last.transpose(1, 2), code).transpose(1, 2)
        return [head, *body, (end, _joined(last_bias, self.outputs))]


def _code(n: int, largest: float, bands: int) -> Tensor:
    """(n, 2 bands + 1)."""
    place = torch.linspace(-1, 1, n)[:, None]
    angle = math.pi * place * torch.linspace(1, largest / 2, bands)
    return torch.cat([angle.sin(), angle.cos(), place], dim=-1)


def _joined(x: Tensor, code: Tensor) -> Tensor:
    """The code (its axes are the last ones of x) behind the channels of x."""
    return torch.cat([x, code.expand(*x.shape[:-1], -1)], dim=-1)


def encode(
    space: Chain,
    channels: int,
    fourier: int = 0,
    fourier_scale: float = 3.0,
    io_code: tuple[int, ...] = (),
) -> tuple[nn.Module, int]:
    """The encodings asked for, one after the other, and how many channels come out.

    `fourier`: number of frequencies, 0 for none. `io_code`: (largest frequency, bands), () for
    none. UsageError where it is neither.
    """
    if len(io_code) not in (0, 2):
        raise UsageError(
            f"io_code is {list(io_code)}", "give the largest frequency and the bands, as in [10, 6]"
        )
    parts: list[nn.Module] = []
    if fourier:
        first = Fourier(channels, fourier, fourier_scale)
        parts, channels = [first], first.channels
    if io_code:
        code = IOCode(space, channels, *io_code)
        parts, channels = [*parts, code], code.channels
    return nn.Sequential(*parts), channels
