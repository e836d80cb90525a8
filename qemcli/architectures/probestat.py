"""ProbeStat: what networks say to learned probes, and what their weights are like, under one head.

Ours. Probes after Kahana et al., arXiv:2410.10811, without the generator; statistics after
Unterthiner et al., arXiv:2002.11448, with those of single neurons and of the spectra beside them.

    x_p = 2 tanh(U z_p),  p = 1..P         z_p learned on a grid of half the size, U bilinear
    a = concat_p f_w(x_p)                  f_w the network itself, log-probabilities
    s = log phi(w)                         seven of every tensor; norms, biases, spectra of layers
    y_m = MLP_m(A_m (a - mean) / std + S_m (s - mean) / std)    constants of the training set
    y = mean_m y_m,  m = 1..M                                   members that share their matrices

The members (layers/ensemble.py) see the same probes and learn each on its own. In training whole
probes are left out of a network's answers at random.

a depends on the function alone and s on the weights up to the order of neurons. Behind `balanced`,
which is how it is meant, w is the balanced representative and y is exactly invariant to scales and
signs too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qemcli import groups
from qemcli.errors import UsageError
from qemcli.functions import image_shape, respond
from qemcli.groups import allowed
from qemcli.layers.ensemble import OwnLinear, SharedLinear
from qemcli.layers.metanetwork import Metanetwork, Mixed
from qemcli.layers.presets import Preset
from qemcli.layers.probing import (
    FreeProbes,
    SmoothImages,
    batch_of,
    most_sure,
    require_alike,
    require_runnable,
    settled,
)
from qemcli.layers.statistics import (
    POOLED,
    Standardise,
    compressed,
    neuron_statistics,
    pooled_statistics,
    tensor_statistics,
)
from qemcli.spaces import Layered, WeightSpace, layered_of

NAME = "probestat"
CHUNK = 128  # networks of the training set that answer at a time
LIMIT = 5.0  # of a standardised statistic: one diverged network is not to lead the others

READS = (Layered,)


@dataclass(frozen=True)
class Config:
    """`probes`: how many, 0 none; `statistics`: whether the weights are looked at too.

    `members`: heads whose mean is answered; `head`: width of the two hidden layers; `dropout` in
    [0, 1) after each; `missed` in [0, 1): the share of probes whose answers a network loses in
    training.
    """

    probes: int = 64
    statistics: bool = True
    members: int = 8
    head: int = 256
    dropout: float = 0.1
    missed: float = 0.1
    outputs: int = 1


PRESETS = {
    "probestat": Preset(Config(), None, "ours: behind `balanced`, what qem train begins with"),
    "probestat-probes": Preset(Config(statistics=False), None, "ours: probes alone"),
    "probestat-statistics": Preset(Config(probes=0), None, "ours: statistics alone"),
    "probestat-alone": Preset(Config(members=1), None, "ours: one head instead of eight"),
}


class Reading(nn.Module):
    """Numbers (b, n) standardised by constants of the training set, kept within `limit`, and one
    linear map of them a member: (members, b, channels). `groups` of them are left out together in
    training, each with probability `missed`."""

    def __init__(
        self, numbers: int, config: Config, limit: float, groups: int = 1, missed: float = 0.0
    ) -> None:
        super().__init__()
        self.limit, self.groups = limit, groups
        self.scale, self.missed = Standardise(numbers), nn.Dropout1d(missed)
        self.linear = SharedLinear(config.members, numbers, config.head, apart=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.scale(x).clamp(-self.limit, self.limit)
        return self.linear(self.missed(x.unflatten(1, (self.groups, -1))).flatten(1))


class Head(nn.Module):
    """The probes, and one answer from what networks say to them and what is told of their weights:
    (b, outputs), in training (b members, outputs).

    `space`: one of the networks that are asked; `numbers`: of those that are told.
    """

    def __init__(self, space: Layered, numbers: int, config: Config) -> None:
        super().__init__()
        if not (config.probes or config.statistics):
            raise UsageError("probestat without probes and statistics reads nothing")
        head, members = config.head, config.members
        self.probes: nn.Module | None = None
        self.answers: Reading | None = None
        self.statistics: Reading | None = None
        if config.probes:
            require_runnable(space)
            self.probes = _probes(space, config.probes)
            said = config.probes * space.layers[-1].rows
            self.answers = Reading(said, config, math.inf, config.probes, config.missed)
        if config.statistics:
            self.statistics = Reading(numbers, config, LIMIT)
        self.mlp = nn.Sequential(
            nn.ReLU(),
            nn.Dropout(config.dropout),
            SharedLinear(members, head, head),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            OwnLinear(members, head, config.outputs),
        )

    def fit(self, parts: Iterable[tuple[Layered, Mapping[str, Tensor], Tensor]]) -> None:
        """Set the constants from (space, networks, what is told of them): what they say to the
        probes as they start, and what is told."""
        said, told = [], []
        with torch.no_grad():
            for space, w, numbers in parts:
                for i in range(0, batch_of(w), CHUNK) if self.answers is not None else ():
                    said.append(self._said(space, {k: v[i : i + CHUNK] for k, v in w.items()}))
                told.append(numbers)
        if self.answers is not None:
            self.answers.scale.fit(torch.cat(said))
        if self.statistics is not None:
            self.statistics.scale.fit(torch.cat(told))

    def _said(self, space: Layered, w: Mapping[str, Tensor]) -> Tensor:
        """(b, probes outputs): what the networks answer."""
        assert self.probes is not None
        return settled(space, respond(space, w, self.probes())).flatten(1)

    def forward(self, space: Layered, w: Mapping[str, Tensor], told: Tensor) -> Tensor:
        read = [] if self.answers is None else [self.answers(self._said(space, w))]
        read += [] if self.statistics is None else [self.statistics(told)]
        y = self.mlp(torch.stack(read).sum(0))
        # In training one answer of every member, network by network; then what they say together.
        return y.transpose(0, 1).flatten(0, 1) if self.training else y.mean(0)


def _probes(space: Layered, count: int) -> nn.Module:
    if space.layers[0].conv:
        return SmoothImages(count, image_shape(space))
    return FreeProbes(count, space.layers[0].cols)


class Model(Metanetwork):
    """dict of (b, *shape) -> raw outputs (b, outputs)."""

    def __init__(self, space: WeightSpace, config: Config = Config()) -> None:
        super().__init__()
        self.space, self.config = layered_of(space, NAME), config
        self.members = config.members
        point = {name: torch.zeros(1, *shape) for name, shape in space.shapes.items()}
        self.head = Head(self.space, self._told(point).shape[1], config)

    def claims(self, space: WeightSpace) -> set[str]:
        """Of answers every group of these networks; of statistics the orders of neurons."""
        return _claims(space, self.config)

    def calibrate(self, w: Mapping[str, Tensor]) -> None:
        """Set the constants from the training set."""
        self.head.fit([(self.space, w, self._told(w))])

    def _told(self, w: Mapping[str, Tensor]) -> Tensor:
        """(b, n): what is seen of the weights, layer by layer."""
        with torch.no_grad():
            parts = [tensor_statistics(self.space, w), neuron_statistics(self.space, w)]
            return compressed(torch.cat(parts, dim=1))

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        return self.head(self.space, w, self._told(w))


class Mixture(Mixed):
    """The same probes for networks of many architectures, which must read inputs of one shape and
    give as many answers; their statistics are pooled over layers."""

    def __init__(self, spaces: Sequence[WeightSpace], config: Config = Config()) -> None:
        super().__init__()
        self.config, self.members = config, config.members
        self.asked = most_sure([layered_of(space, NAME) for space in spaces])
        self.head = Head(self.asked, POOLED, config)
        for space in spaces:
            self.on(space)

    def bind(self, space: WeightSpace) -> Metanetwork:
        """Networks that can be run on the probes."""
        layered = layered_of(space, NAME)
        if self.config.probes:
            require_alike(layered, self.asked)
        return Asked(self, layered)

    def calibrate(self, parts: Sequence[tuple[WeightSpace, Mapping[str, Tensor]]]) -> None:
        """Set the constants from all networks."""
        self.head.fit((layered_of(space, NAME), w, _pooled(space, w)) for space, w in parts)


class Asked(Metanetwork):
    """dict of (b, *shape) -> raw outputs (b, outputs), of one of the architectures."""

    def __init__(self, shared: Mixture, space: Layered) -> None:
        super().__init__()
        self.shared, self.space = shared, space

    def claims(self, space: WeightSpace) -> set[str]:
        """As of networks of one architecture."""
        return _claims(space, self.shared.config)

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        return self.shared.head(self.space, w, _pooled(self.space, w))


def _pooled(space: WeightSpace, w: Mapping[str, Tensor]) -> Tensor:
    """(b, POOLED): what is seen of the weights, whatever the depth."""
    with torch.no_grad():
        return compressed(pooled_statistics(space, w))


def _claims(space: WeightSpace, config: Config) -> set[str]:
    if not config.statistics:
        return set(groups.applicable(space))
    return {"permutation"} if allowed("permutation", space) is None else set()
