"""A stack of permutation-equivariant layers behind encodings: the body of the INR models."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from qemcli.layers.encoding import encode
from qemcli.layers.equivariant import equivariant_linear
from qemcli.layers.features import ChannelDropout, Features, pointwise, relu
from qemcli.spaces import Chain


class Stack(nn.Module):
    """encode, then [equivariant linear map, ReLU, channel dropout] for each of `channels`.

    Features of c_in channels -> features of channels[-1]; `linear` is a name of
    equivariant.LINEAR, the encodings are those of `encoding.encode`. Source: arXiv:2302.14040.
    """

    def __init__(
        self,
        space: Chain,
        c_in: int,
        channels: tuple[int, ...],
        linear: str,
        dropout: float = 0.0,
        fourier: int = 0,
        fourier_scale: float = 3.0,
        io_code: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.encoding, encoded = encode(space, c_in, fourier, fourier_scale, io_code)
        self.linears = nn.ModuleList(
            equivariant_linear(space, linear, a, b) for a, b in pairwise([encoded, *channels])
        )
        self.dropout = ChannelDropout(dropout)

    def forward(self, features: Features) -> Features:
        h = self.encoding(features)
        for linear in self.linears:
            h = self.dropout(pointwise(relu, linear(h)))
        return h
