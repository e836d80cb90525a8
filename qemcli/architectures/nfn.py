"""NFN: permutation-equivariant neural functionals, HNP and NP.

Zhou et al., Permutation Equivariant Neural Functionals, arXiv:2302.14040.

    H_0 = W,   H_i = relu(E_i H_{i-1}),   i = 1..depth          y = MLP(pool(H_depth))

E_i commutes with permutations of the hidden neurons (layers/equivariant.py); the pool takes means
over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from qemcli.layers import quasi
from qemcli.layers.deltas import Deltas
from qemcli.layers.encoding import encode
from qemcli.layers.equivariant import equivariant_linear
from qemcli.layers.features import ChannelDropout, Features, door, pointwise, relu
from qemcli.layers.heads import mlp_head
from qemcli.layers.metanetwork import Metanetwork
from qemcli.layers.pooling import HNPPool, NPPool
from qemcli.layers.presets import Preset
from qemcli.layers.statistics import StandardiseTensors
from qemcli.spaces import Chain, WeightSpace


@dataclass(frozen=True)
class Config:
    """`channels` after each equivariant layer; `head` width; `dropout` in [0, 1), channels and
    head (`head_dropout`, where the head has its own).

    `linear`: hnp (published), hnp-full (all equivariant maps), np-posemb (NP after learned codes of
    inputs and outputs), np (inputs and outputs exchangeable too, unless `io_code` marks them).
    `standardised`: one mean and std a tensor, by `calibrate`. `fourier`: Fourier features of every
    entry, of so many frequencies (0: none) drawn with `fourier_scale`; `io_code`: (largest
    frequency, bands) of the codes of inputs and outputs, () for none. `quasi`: none | paper |
    released | exact, its `eps` at the start, in (-.999, .999), and whether it is learned. `expand`:
    branches of the editor, which has neither pool nor head.
    """

    channels: tuple[int, ...] = (16, 16, 5)
    linear: str = "hnp"
    head: int = 1000
    dropout: float = 0.0
    head_dropout: float | None = None
    standardised: bool = False
    fourier: int = 0
    fourier_scale: float = 3.0
    io_code: tuple[int, ...] = ()
    quasi: str = "none"
    eps: float = 0.01
    eps_learned: bool = True
    outputs: int = 1
    expand: int = 1


_TABLE = "arXiv:2302.14040; table of the CNN zoo, arXiv:2409.11697"
_INR = "arXiv:2302.14040; table of the INRs, arXiv:2409.11697"
_WIDE = (256, 256, 256)
_HNP_MNIST = Config(_WIDE, dropout=0.1, fourier=128, outputs=10)
_HNP = Config(_WIDE, head_dropout=0.5, fourier=128, fourier_scale=10.0, outputs=10)
PRESETS = {
    "hnp": Preset(Config(), 2_811_743, _TABLE),
    "np-posemb": Preset(Config(linear="np-posemb"), 2_031_390, _TABLE),
    "np": Preset(Config(linear="np"), 1_940_433, "the same without codes, NP pool"),
    "hnp-full": Preset(Config(linear="hnp-full"), None, "ours: every equivariant map"),
    "hnp-inr-mnist": Preset(_HNP_MNIST, 22_083_114, _INR, "siren-mnist"),
    "hnp-inr-fashion": Preset(_HNP, 22_083_114, _INR, "siren-fashion"),
    "hnp-inr-cifar": Preset(_HNP, 42_379_306, _INR, "siren-cifar"),
    "np-inr-mnist": Preset(
        replace(_HNP_MNIST, linear="np", io_code=(3, 3)), 15_118_634, _INR, "siren-mnist"
    ),
    "np-inr-fashion": Preset(
        replace(_HNP, linear="np", io_code=(10, 6)), 15_213_866, _INR, "siren-fashion"
    ),
    "np-inr-cifar": Preset(
        replace(_HNP, linear="np", io_code=(10, 6)), 16_237_866, _INR, "siren-cifar"
    ),
    "hnp-inr-small": Preset(
        Config((16, 16, 16), "hnp-full", head=64, standardised=True, outputs=10),
        None,
        "ours: what two cores train",
        "siren-mnist",
    ),
}
_EDIT = Config((128, 128, 128), fourier=128)
_CODED = replace(_EDIT, linear="np", io_code=(3, 3))
_STYLE = "arXiv:2302.14040; its editing of INRs"
EDITORS = {
    "hnp-edit-mnist": Preset(_EDIT, 6_440_853, _STYLE, "siren-mnist"),
    "hnp-edit-cifar": Preset(_EDIT, 12_878_235, _STYLE, "siren-cifar"),
    "np-edit-mnist": Preset(_CODED, 4_133_656, _STYLE, "siren-mnist"),
    "np-edit-cifar": Preset(_CODED, 4_133_656, _STYLE, "siren-cifar"),
    "hnp-edit-small": Preset(
        Config((16, 16), "hnp-full", standardised=True),
        None,
        "ours: what two cores train",
        "siren-mnist",
    ),
}


class _Permuting(Metanetwork):
    """What model and editor have in common: standardised tensors, and perhaps a quasi layer."""

    space: Chain
    standard: StandardiseTensors
    quasi: quasi.Paper | quasi.Released | quasi.Exact | None

    def claims(self, space: WeightSpace) -> set[str]:
        """Permutations, unless a quasi layer ties its scales to the neurons' indices."""
        return {"permutation"} if self.quasi is None or self.quasi.keeps_invariance else set()

    def calibrate(self, w: Mapping[str, Tensor]) -> None:
        """Set the constants of `standardised` from the training set: one pair a tensor, so none
        breaks the symmetry.
        """
        self.standard.fit(door(self.space, w))


class Model(_Permuting):
    """dict of (b, *shape) -> raw outputs (b, outputs)."""

    def __init__(self, space: Chain, config: Config = Config()) -> None:
        super().__init__()
        self.space, self.config = space, config
        self.standard = StandardiseTensors(space, config.standardised)
        self.encoding, encoded = encode(
            space, 1, config.fourier, config.fourier_scale, config.io_code
        )
        channels = [encoded, *config.channels]
        self.linears = nn.ModuleList(
            equivariant_linear(space, config.linear, a, b) for a, b in pairwise(channels)
        )
        self.dropout = ChannelDropout(config.dropout)
        exchangeable = config.linear == "np" and not config.io_code
        self.pool = NPPool(space) if exchangeable else HNPPool(space)
        inputs = self.pool.per_channel * channels[-1]
        dropout = config.dropout if config.head_dropout is None else config.head_dropout
        self.head = mlp_head(inputs, config.head, config.outputs, dropout)
        # Drawn last: with one seed, every mode starts from the same backbone and head.
        self.quasi = quasi.make(
            config.quasi, space, channels[-2], channels[-1], config.eps, config.eps_learned
        )

    def equivariant(self, w: Mapping[str, Tensor]) -> list[tuple[str, Features]]:
        """Features after every equivariant step, by name; `features.act_on_features` acts on
        them.
        """
        h = self.encoding(self.standard(door(self.space, w)))
        steps = [("input", h)]
        for i, linear in enumerate(self.linears, start=1):
            before, h = h, linear(h)
            steps.append((f"linear{i}", h))
            if i == len(self.linears) and self.quasi is not None:
                h = self.quasi(w, before, h)
                steps.append(("quasi", h))
            h = self.dropout(pointwise(torch.relu, h))
            steps.append((f"relu{i}", h))
        return steps

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        h = before = self.encoding(self.standard(door(self.space, w)))
        for linear in self.linears[:-1]:
            h = before = self.dropout(pointwise(relu, linear(h)))
        h = self.linears[-1](h)
        if self.quasi is not None:
            h = self.quasi(w, before, h)
        return self.head(self.pool(self.dropout(pointwise(relu, h))))


class Editor(_Permuting):
    """dict of (b, *shape) -> what each of k = `expand` branches adds to it, dict of (b, k, *shape).

        H_0 = encoding(W),   H_i = relu(E_i H_{i-1}),   delta = s * E_{depth+1} H_depth

    The last map has k channels, s is one learned scalar a tensor (layers/deltas.py).
    """

    def __init__(self, space: Chain, config: Config = Config()) -> None:
        super().__init__()
        self.space, self.config = space, config
        self.standard = StandardiseTensors(space, config.standardised)
        self.encoding, encoded = encode(
            space, 1, config.fourier, config.fourier_scale, config.io_code
        )
        channels = [encoded, *config.channels, config.expand]
        self.linears = nn.ModuleList(
            equivariant_linear(space, config.linear, a, b) for a, b in pairwise(channels)
        )
        self.dropout = ChannelDropout(config.dropout)
        self.out = Deltas(space)
        self.quasi = quasi.make(
            config.quasi, space, channels[-2], channels[-1], config.eps, config.eps_learned
        )

    def equivariant(self, w: Mapping[str, Tensor]) -> list[tuple[str, Features]]:
        """Features after every step, by name; `features.act_on_features` acts on them."""
        h = self.encoding(self.standard(door(self.space, w)))
        steps = [("input", h)]
        for i, linear in enumerate(self.linears[:-1], start=1):
            h = self.dropout(pointwise(relu, linear(h)))
            steps.append((f"relu{i}", h))
        before, h = h, self.linears[-1](h)
        steps.append((f"linear{len(self.linears)}", h))
        if self.quasi is not None:
            steps.append(("quasi", self.quasi(w, before, h)))
        return steps

    def forward(self, w: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.out(self.equivariant(w)[-1][1])
