"""Spectral statistics: seven numbers of every matrix's spectrum, and a small head; a baseline.

Martin, Peng and Mahoney, Predicting trends in the quality of state-of-the-art neural networks
without access to training or testing data, arXiv:2002.06716 (WeightWatcher); there the numbers are
averaged over layers and correlated with the accuracy, here a head reads those of every layer.

    phi(W) = [log |W|_F^2, log |W|_2^2, stable rank, alpha, alpha log |W|_2^2, entropy, soft rank]
    y = MLP(phi(W_1), ..., phi(W_L))                     layers/spectra.py says what each of them is

phi(Q W R) = phi(W) for orthogonal Q and R: orders and signs of neurons, of heads and of the stream
change nothing, and neither do biases, which are not read. Scales and general-linear moves of heads
do; `balanced` takes those away. Over many architectures the numbers are pooled over the layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qemcli.errors import UnsupportedError
from qemcli.groups import allowed
from qemcli.layers.heads import mlp_head
from qemcli.layers.metanetwork import Metanetwork, Mixed
from qemcli.layers.presets import Preset
from qemcli.layers.spectra import POOLED, STATISTICS, matrices, pooled, spectral_statistics
from qemcli.layers.statistics import Standardise, compressed
from qemcli.spaces import WeightSpace

# Moves by orthogonal matrices, or of biases alone.
KEPT = ("permutation", "sign", "phase", "heads", "stream", "shift")

READS = (WeightSpace,)


@dataclass(frozen=True)
class Config:
    """`head`: width of the two hidden layers, 0 for one linear map (a ridge regression under the
    schedule's weight decay); `dropout` in [0, 1) of the hidden ones."""

    head: int = 128
    dropout: float = 0.0
    outputs: int = 1


PRESETS = {
    "spectral": Preset(Config(), None, "ours: the statistics of arXiv:2002.06716, every layer's"),
    "spectral-linear": Preset(Config(head=0), None, "ours: one linear map of them"),
}


class Model(Metanetwork):
    """dict of (b, *shape) -> raw outputs (b, outputs)."""

    def __init__(self, space: WeightSpace, config: Config = Config()) -> None:
        super().__init__()
        _check(space)
        self.space, self.config = space, config
        count = len(STATISTICS) * len(matrices(space))
        self.scale = Standardise(count)
        self.head = _head(count, config)

    def claims(self, space: WeightSpace) -> set[str]:
        """Moves by orthogonal matrices, and of biases alone."""
        return _kept(space)

    def calibrate(self, w: Mapping[str, Tensor]) -> None:
        """Set the constants that standardise the statistics from the training set's weights."""
        self.scale.fit(self._statistics(w))

    def _statistics(self, w: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return compressed(spectral_statistics(self.space, w).flatten(1))

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        found = self._statistics(w).to(self.scale.mean.dtype)
        return self.head(self.scale(found))


class Mixture(Mixed):
    """Spectral statistics over many architectures: pooled over the layers."""

    def __init__(self, spaces: Sequence[WeightSpace], config: Config = Config()) -> None:
        super().__init__()
        self.scale = Standardise(POOLED)
        self.head = _head(POOLED, config)

    def bind(self, space: WeightSpace) -> Metanetwork:
        """Reads any network that has a matrix."""
        _check(space)
        return Pooled(self, space)

    def calibrate(self, parts: Sequence[tuple[WeightSpace, Mapping[str, Tensor]]]) -> None:
        """Set the constants of every statistic from the training set."""
        with torch.no_grad():
            self.scale.fit(torch.cat([compressed(pooled(space, w)) for space, w in parts]))


class Pooled(Metanetwork):
    """dict of (b, *shape) -> raw outputs (b, outputs), of one of the architectures."""

    def __init__(self, shared: Mixture, space: WeightSpace) -> None:
        super().__init__()
        self.shared, self.space = shared, space

    def claims(self, space: WeightSpace) -> set[str]:
        """Moves by orthogonal matrices, and of biases alone."""
        return _kept(space)

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            found = compressed(pooled(self.space, w)).to(self.shared.scale.mean.dtype)
        return self.shared.head(self.shared.scale(found))


def _head(inputs: int, config: Config) -> nn.Module:
    if not config.head:
        return nn.Linear(inputs, config.outputs)
    return mlp_head(inputs, config.head, config.outputs, config.dropout)


def _kept(space: WeightSpace) -> set[str]:
    return {name for name in KEPT if allowed(name, space) is None}


def _check(space: WeightSpace) -> None:
    if not matrices(space):
        raise UnsupportedError("spectral: the networks have no matrix", "see `qem models`")
