"""NFN: permutation-equivariant neural functionals, HNP and NP.

Zhou et al., Permutation Equivariant Neural Functionals, arXiv:2302.14040.

    H_0 = W,   H_i = relu(E_i H_{i-1}),   i = 1..depth          y = MLP(pool(H_depth))

E_i commutes with permutations of the hidden neurons (layers/equivariant.py); the pool takes means
over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from qemcli.errors import UsageError
from qemcli.layers import quasi
from qemcli.layers.equivariant import HNPLinear, NPLinear
from qemcli.layers.features import ChannelDropout, Features, door, pointwise, relu
from qemcli.layers.heads import mlp_head
from qemcli.layers.pooling import HNPPool, NPPool
from qemcli.layers.presets import Preset
from qemcli.registry import suggest
from qemcli.spaces import WeightSpace

LINEAR = ("hnp", "hnp-full", "np-posemb", "np")


@dataclass(frozen=True)
class Config:
    """`channels` after each equivariant layer; `head` width; `dropout` in [0, 1), channels and
    head.

    `linear`: hnp (published), hnp-full (all equivariant maps), np-posemb (NP after learned codes of
    inputs and outputs), np (inputs and outputs exchangeable too). `standardised`: one mean and std
    a tensor, by `calibrate`. `quasi`: none | paper | released | exact, its `eps` at the start, in
    (-.999, .999), and whether it is learned.
    """

    channels: tuple[int, ...] = (16, 16, 5)
    linear: str = "hnp"
    head: int = 1000
    dropout: float = 0.0
    standardised: bool = False
    quasi: str = "none"
    eps: float = 0.01
    eps_learned: bool = True
    outputs: int = 1


_TABLE = "arXiv:2302.14040; table of the CNN zoo, arXiv:2409.11697"
PRESETS = {
    "hnp": Preset(Config(), 2_811_743, _TABLE),
    "np-posemb": Preset(Config(linear="np-posemb"), 2_031_390, _TABLE),
    "np": Preset(Config(linear="np"), 1_940_433, "the same without codes, NP pool"),
    "hnp-full": Preset(Config(linear="hnp-full"), None, "ours: every equivariant map"),
}


class Model(nn.Module):
    """dict of (b, *shape) -> raw outputs (b, outputs)."""

    kind = "invariant"
    shift: Tensor
    scale: Tensor

    def __init__(self, space: WeightSpace, config: Config = Config()) -> None:
        super().__init__()
        self.space, self.config = space, config
        channels = [1, *config.channels]
        self.linears = nn.ModuleList(
            _linear(space, config.linear, a, b) for a, b in pairwise(channels)
        )
        self.dropout = ChannelDropout(config.dropout)
        self.pool = NPPool(space) if config.linear == "np" else HNPPool(space)
        inputs = self.pool.per_channel * channels[-1]
        self.head = mlp_head(inputs, config.head, config.outputs, config.dropout)
        # Drawn last: with one seed, every mode starts from the same backbone and head.
        self.quasi = quasi.make(
            config.quasi, space, channels[-2], channels[-1], config.eps, config.eps_learned
        )
        sizes = (2 * len(space.layers),) if config.standardised else (0,)
        self.register_buffer("shift", torch.zeros(sizes))
        self.register_buffer("scale", torch.ones(sizes))

    def claims(self, space: WeightSpace) -> set[str]:
        """Permutations, unless a quasi layer ties its scales to the neurons' indices."""
        return {"permutation"} if self.quasi is None or self.quasi.keeps_invariance else set()

    def calibrate(self, w: Mapping[str, Tensor]) -> None:
        """Set the constants of `standardised` from the training set: one pair a tensor, so none
        breaks the symmetry.
        """
        if self.config.standardised:
            flat = [x for pair in door(self.space, w) for x in pair]
            shift = [x.mean(dtype=torch.float64) for x in flat]
            spread = [_spread(x, m) for x, m in zip(flat, shift, strict=True)]
            self.shift.copy_(torch.stack(shift))
            self.scale.copy_(torch.stack(spread))

    def equivariant(self, w: Mapping[str, Tensor]) -> list[tuple[str, Features]]:
        """Features after every equivariant step, by name; `features.act_on_features` acts on
        them.
        """
        h = self._standardised(door(self.space, w))
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

    def _standardised(self, h: Features) -> Features:
        if not self.config.standardised:
            return h
        pairs = zip(h, self.shift.view(-1, 2), self.scale.view(-1, 2), strict=True)
        return [((w - m[0]) / s[0], (b - m[1]) / s[1]) for (w, b), m, s in pairs]

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        h = self._standardised(door(self.space, w))
        before = h
        for linear in self.linears[:-1]:
            h = before = self.dropout(pointwise(relu, linear(h)))
        h = self.linears[-1](h)
        if self.quasi is not None:
            h = self.quasi(w, before, h)
        return self.head(self.pool(self.dropout(pointwise(relu, h))))


def _spread(x: Tensor, mean: Tensor) -> Tensor:
    """The standard deviation of a tensor's entries, 1 where they are all the same."""
    std = (x - mean).square().mean(dtype=torch.float64).sqrt()
    return torch.where(std > 0, std, torch.ones_like(std))


def _linear(space: WeightSpace, name: str, c_in: int, c_out: int) -> nn.Module:
    if name in ("hnp", "hnp-full"):
        return HNPLinear(space, c_in, c_out, full_basis=name == "hnp-full")
    if name in ("np", "np-posemb"):
        return NPLinear(space, c_in, c_out, io_embedding=name == "np-posemb")
    raise UsageError(f"nfn has no linear layer '{name}'", suggest(name, list(LINEAR)))
