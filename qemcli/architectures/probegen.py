"""ProbeGen: networks are run on probes from a deep linear generator, and their answers are read.

Kahana, Horwitz, Shuval and Hoshen, Deep Linear Probe Generators for Weight Space Learning,
arXiv:2410.10811.

    x_p = G(z_p),  p = 1..P       G deep linear (layers/probing.py); for images tanh(G(z_p))
    a = concat_p f_w(x_p)         f_w the network itself;  with `slopes`, df_w/dx(x_p) beside it
    y = MLP((a - mean) / std)     constants of the training set

y depends on f_w alone: it is exactly invariant to every symmetry that the networks have. Networks
of many architectures that read the same images (or numbers) and give as many answers are asked the
same probes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from qemcli import groups
from qemcli.errors import UsageError
from qemcli.functions import differentiate, image_shape, respond
from qemcli.layers.metanetwork import Metanetwork, Mixed
from qemcli.layers.presets import Preset
from qemcli.layers.probing import (
    FreeImages,
    FreeProbes,
    GeneratedImages,
    GeneratedProbes,
    Jitter,
    batch_of,
    most_sure,
    require_alike,
    require_runnable,
    settled,
)
from qemcli.layers.statistics import Standardise
from qemcli.registry import suggest
from qemcli.spaces import Layered, WeightSpace, chain_of, layered_of

MAKERS = ("generated", "free")
NAME = "probegen"
CHUNK = 512  # networks of the training set that answer at a time

READS = (Layered,)


@dataclass(frozen=True)
class Config:
    """`probes`: how many; `maker`: generated, or free (no generator: "vanilla probing").

    For SIRENs, `slopes`: the networks' derivatives at the probes are read too; `jitter`: size of
    the random affine map through which a network sees the probes in training, 0 none.
    `head`: widths of the hidden layers; `dropout` in [0, 1) between them.
    """

    probes: int = 128
    maker: str = "generated"
    slopes: bool = False
    jitter: float = 0.0
    head: tuple[int, ...] = (256, 256, 256, 256, 256)
    dropout: float = 0.0
    outputs: int = 1


_PAPER = "arXiv:2410.10811, with constants of the training set"
PRESETS = {
    "probegen-inr": Preset(Config(outputs=10), None, _PAPER, "siren-mnist"),
    "vanilla-probing-inr": Preset(Config(maker="free", outputs=10), None, _PAPER, "siren-mnist"),
    "probegen-inr-slopes": Preset(
        Config(slopes=True, jitter=0.15, head=(512, 512), dropout=0.2, outputs=10),
        None,
        "ours: derivatives at the probes, jitter",
        "siren-mnist",
    ),
    "probegen-cnn": Preset(Config(), None, _PAPER),
    "vanilla-probing-cnn": Preset(Config(maker="free"), None, _PAPER),
}


class Model(Metanetwork):
    """dict of (b, *shape) -> raw outputs (b, outputs)."""

    def __init__(self, space: Layered, config: Config = Config()) -> None:
        super().__init__()
        require_runnable(space)
        self.space, self.config = space, config
        self.image = space.layers[0].conv
        if space.family != "siren" and (config.slopes or config.jitter):
            raise UsageError(
                f"slopes and jitter are for SIRENs, and these are {space.family} networks",
                "leave `slopes` and `jitter` out",
            )
        self.probes = self._probes()
        self.jitter = Jitter(config.jitter)
        numbers = config.probes * space.layers[-1].rows
        numbers *= 1 + (space.layers[0].cols if config.slopes else 0)
        self.scale = Standardise(numbers)
        self.head = _head([numbers, *config.head, config.outputs], config.dropout)

    def _probes(self) -> nn.Module:
        if self.config.maker not in MAKERS:
            raise UsageError(
                f"probegen has no probes '{self.config.maker}'",
                suggest(self.config.maker, list(MAKERS)),
            )
        free = self.config.maker == "free"
        if self.image:
            shape = image_shape(self.space)
            return (FreeImages if free else GeneratedImages)(self.config.probes, shape)
        inputs = self.space.layers[0].cols
        return (FreeProbes if free else GeneratedProbes)(self.config.probes, inputs)

    def claims(self, space: WeightSpace) -> set[str]:
        """Every group of these networks."""
        return set(groups.applicable(space))

    def calibrate(self, w: Mapping[str, Tensor]) -> None:
        """Set the constants from the training set's answers to the probes as they start."""
        starts = range(0, batch_of(w), CHUNK)
        with torch.no_grad(), self.jitter.still():
            parts = [
                self.answers(self.space, {k: v[i : i + CHUNK] for k, v in w.items()})
                for i in starts
            ]
        self.scale.fit(torch.cat(parts))

    def answers(self, space: Layered, w: Mapping[str, Tensor]) -> Tensor:
        """(b, numbers): what networks say to the probes."""
        x = self.probes()
        if self.image:
            return settled(space, respond(space, w, x)).flatten(1)
        maps, shifts = self.jitter(batch_of(w), x)
        x = x @ maps + shifts
        if not self.config.slopes:
            return settled(space, respond(space, w, x)).flatten(1)
        values, slopes = differentiate(chain_of(space, "slopes"), w, x)
        # Of the function that is seen through the map: d/dx f(x M) = M f'.
        slopes = torch.einsum("bij,bpoj->bpoi", maps, slopes)
        return torch.cat([settled(space, values).flatten(1), slopes.flatten(1)], dim=1)

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        return self.head(self.scale(self.answers(self.space, w)))


class Mixture(Mixed):
    """The same probes for networks of many architectures, which must read inputs of one shape and
    give as many answers."""

    def __init__(self, spaces: Sequence[WeightSpace], config: Config = Config()) -> None:
        super().__init__()
        self.core = Model(most_sure([layered_of(space, NAME) for space in spaces]), config)
        for space in spaces:
            self.on(space)

    def bind(self, space: WeightSpace) -> Metanetwork:
        """Networks that can be run on the probes."""
        asked = layered_of(space, NAME)
        require_alike(asked, self.core.space)
        return Asked(self, asked)

    def calibrate(self, parts: Sequence[tuple[WeightSpace, Mapping[str, Tensor]]]) -> None:
        """Set the constants from all networks' answers to the probes as they start."""
        found = []
        with torch.no_grad(), self.core.jitter.still():
            for space, w in parts:
                for i in range(0, batch_of(w), CHUNK):
                    some = {k: v[i : i + CHUNK] for k, v in w.items()}
                    found.append(self.core.answers(layered_of(space, NAME), some))
        self.core.scale.fit(torch.cat(found))


class Asked(Metanetwork):
    """dict of (b, *shape) -> raw outputs (b, outputs), of one of the architectures."""

    def __init__(self, shared: Mixture, space: Layered) -> None:
        super().__init__()
        self.shared, self.space = shared, space

    def claims(self, space: WeightSpace) -> set[str]:
        """Every group of these networks."""
        return set(groups.applicable(space))

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        core = self.shared.core
        return core.head(core.scale(core.answers(self.space, w)))


def _head(widths: list[int], dropout: float) -> nn.Sequential:
    """Linear maps with ReLU (and dropout) between them."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths[:-1]):
        layers += [nn.Linear(a, b), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))
