"""Spectral statistics: seven numbers of every matrix's spectrum, and a small head; a baseline.

Martin, Peng and Mahoney, Predicting trends in the quality of state-of-the-art neural networks
without access to training or testing data, arXiv:2002.06716 (WeightWatcher); there the numbers are
averaged over layers and correlated with the accuracy, here a head reads those of every layer.

    phi(W) = [log |W|_F^2, log |W|_2^2, stable rank, alpha, alpha log |W|_2^2, entropy, soft rank]
    y = MLP(phi(W_1), ..., phi(W_L))                     layers/spectra.py says what each of them is

phi(Q W R) = phi(W) for orthogonal Q and R: orders and signs of neurons, of heads and of the stream
change nothing, and neither do biases, which are not read. Scales and general-linear moves of heads
do; `balanced` takes those away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qemcli.errors import UnsupportedError
from qemcli.groups import allowed
from qemcli.layers.heads import mlp_head
from qemcli.layers.metanetwork import Metanetwork
from qemcli.layers.presets import Preset
from qemcli.layers.spectra import STATISTICS, matrices, spectral_statistics
from qemcli.layers.statistics import Standardise, compressed
from qemcli.spaces import WeightSpace

# Moves by orthogonal matrices, or of biases alone.
KEPT = ("permutation", "sign", "phase", "heads", "stream", "shift")


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
        self.space, self.config = space, config
        if not (count := len(STATISTICS) * len(matrices(space))):
            raise UnsupportedError("spectral: the networks have no matrix", "see `qem models`")
        self.scale = Standardise(count)
        self.head = (
            mlp_head(count, config.head, config.outputs, config.dropout)
            if config.head
            else nn.Linear(count, config.outputs)
        )

    def claims(self, space: WeightSpace) -> set[str]:
        """Moves by orthogonal matrices, and of biases alone."""
        return {name for name in KEPT if allowed(name, space) is None}

    def calibrate(self, w: Mapping[str, Tensor]) -> None:
        """Set the constants that standardise the statistics from the training set's weights."""
        self.scale.fit(self._statistics(w))

    def _statistics(self, w: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return compressed(spectral_statistics(self.space, w))

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        found = self._statistics(w).to(self.scale.mean.dtype)
        return self.head(self.scale(found))
