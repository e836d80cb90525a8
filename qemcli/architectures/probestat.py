"""ProbeStat: what networks say to learned probes, and what their weights are like, under one head.

Ours. Probes after Kahana et al., arXiv:2410.10811, without the generator; statistics after
Unterthiner et al., arXiv:2002.11448, with those of single neurons and of the spectra beside them.

    x_p = 2 tanh(U z_p),  p = 1..P         z_p learned on a grid of half the size, U bilinear
    a = concat_p f_w(x_p)                  f_w the network itself, log-probabilities
    s = log phi(w)                         seven of every tensor; norms, biases, spectra of layers
    y = MLP(A (a - mean) / std + S (s - mean) / std)            constants of the training set

a depends on the function alone and s on the weights up to the order of neurons. Behind `balanced`,
which is how it is meant, w is the balanced representative and y is exactly invariant to scales and
signs too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qemcli import groups
from qemcli.errors import UsageError
from qemcli.functions import image_shape, respond
from qemcli.groups import allowed
from qemcli.layers.metanetwork import Metanetwork
from qemcli.layers.presets import Preset
from qemcli.layers.probing import FreeProbes, SmoothImages, batch_of, require_runnable, settled
from qemcli.layers.statistics import (
    Standardise,
    compressed,
    neuron_statistics,
    tensor_statistics,
)
from qemcli.spaces import Chain, WeightSpace, chain_of

CHUNK = 128  # networks of the training set that answer at a time
LIMIT = 5.0  # of a standardised statistic: one diverged network is not to lead the others


@dataclass(frozen=True)
class Config:
    """`probes`: how many, 0 none; `statistics`: whether the weights are looked at too.

    `head`: width of the two hidden layers; `dropout` in [0, 1) after each.
    """

    probes: int = 64
    statistics: bool = True
    head: int = 256
    dropout: float = 0.2
    outputs: int = 1


PRESETS = {
    "probestat": Preset(Config(), None, "ours: behind `balanced`, what qem train begins with"),
    "probestat-probes": Preset(Config(statistics=False), None, "ours: probes alone"),
    "probestat-statistics": Preset(Config(probes=0), None, "ours: statistics alone"),
}


class Reading(nn.Module):
    """Numbers (b, n) standardised by constants of the training set, kept within `limit`, and one
    linear map of them."""

    def __init__(self, numbers: int, channels: int, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.scale, self.linear = Standardise(numbers), nn.Linear(numbers, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.scale(x).clamp(-self.limit, self.limit))


class Model(Metanetwork):
    """dict of (b, *shape) -> raw outputs (b, outputs)."""

    def __init__(self, space: WeightSpace, config: Config = Config()) -> None:
        super().__init__()
        self.space, self.config = chain_of(space, "probestat"), config
        if not (config.probes or config.statistics):
            raise UsageError("probestat without probes and statistics reads nothing")
        head, dropout = config.head, config.dropout
        self.probes: nn.Module | None = None
        self.answers: Reading | None = None
        self.statistics: Reading | None = None
        if config.probes:
            require_runnable(self.space)
            self.probes = _probes(self.space, config.probes)
            numbers = config.probes * self.space.layers[-1].rows
            self.answers = Reading(numbers, head, math.inf)
        if config.statistics:
            self.statistics = Reading(_told(self.space, _point(self.space)).shape[1], head, LIMIT)
        self.head = nn.Sequential(
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(head, head),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(head, config.outputs),
        )

    def claims(self, space: WeightSpace) -> set[str]:
        """Of answers every group of these networks; of statistics the orders of neurons."""
        if not self.config.statistics:
            return set(groups.applicable(space))
        return {"permutation"} if allowed("permutation", space) is None else set()

    def calibrate(self, w: Mapping[str, Tensor]) -> None:
        """Set the constants from the training set: its statistics, and its answers to the probes
        as they start."""
        starts = range(0, batch_of(w), CHUNK)
        parts = [{k: v[i : i + CHUNK] for k, v in w.items()} for i in starts]
        with torch.no_grad():
            if self.answers is not None:
                self.answers.scale.fit(torch.cat([self._said(part) for part in parts]))
            if self.statistics is not None:
                told = torch.cat([_told(self.space, part) for part in parts])
                self.statistics.scale.fit(told)

    def _said(self, w: Mapping[str, Tensor]) -> Tensor:
        """(b, probes outputs): what the networks answer."""
        assert self.probes is not None
        return settled(self.space, respond(self.space, w, self.probes())).flatten(1)

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        read = []
        if self.answers is not None:
            read.append(self.answers(self._said(w)))
        if self.statistics is not None:
            read.append(self.statistics(_told(self.space, w)))
        return self.head(torch.stack(read).sum(0))


def _told(space: Chain, w: Mapping[str, Tensor]) -> Tensor:
    """(b, n): what is seen of the weights."""
    with torch.no_grad():
        parts = [tensor_statistics(space, w), neuron_statistics(space, w)]
        return compressed(torch.cat(parts, dim=1))


def _probes(space: Chain, count: int) -> nn.Module:
    if space.layers[0].conv:
        return SmoothImages(count, image_shape(space))
    return FreeProbes(count, space.layers[0].cols)


def _point(space: Chain) -> dict[str, Tensor]:
    """One network, to count what is told of it."""
    return {name: torch.zeros(1, *shape) for name, shape in space.shapes.items()}
