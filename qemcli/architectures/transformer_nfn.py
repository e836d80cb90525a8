"""Transformer-NFN: invariant to GL of every attention head and to orders of heads and neurons.

Tran et al., Equivariant Neural Functional Networks for Transformers, arXiv:2410.04209.

    H_0 = blocks,   H_i = relu(E_i H_{i-1}) on the feed-forward        z_l = LN(I_l H_n), block l
    y = w . [head(z), classifier branch, embedding branch]

E and I are polynomials (layers/polynomial.py), or of low rank. As published, the classifier is
read flat, which tells its hidden neurons apart; `classifier` = set does not (ours). Embedding and
classifier are read of small transformers alone, and of other blocks neither norms, gates nor
biases of attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from qemcli.errors import UnsupportedError, UsageError
from qemcli.groups import allowed
from qemcli.layers import attention_quasi, low_rank, polynomial, published_init
from qemcli.layers.block_features import Feedforward, feedforward
from qemcli.layers.blockwise import BlockNorm
from qemcli.layers.branches import Flat, classifier, ends
from qemcli.layers.metanetwork import Blocks, Metanetwork
from qemcli.layers.presets import Preset
from qemcli.spaces import Transformer, WeightSpace, transformer_of

CALIBRATED = 1024  # networks of the training set whose features set the constants

READS = (Transformer,)


@dataclass(frozen=True)
class Config:
    """`channels` after each equivariant layer; `answers`: numbers of every branch.

    `init`: official (drawn as published, features as they are), or unit (ours: every term of unit
    variance on the training set, set by `calibrate`). `rank`: 0 for full polynomials, else that of
    the factorised ones. `classifier`: flat or set. `quasi`: none | paper | released | exact, its
    `eps` at the start, whether it is learned, its `bound`: safe, or raw as published, and the
    hidden width of its maps.
    """

    channels: tuple[int, ...] = (10,)
    answers: int = 10
    init: str = "unit"
    rank: int = 0
    classifier: str = "set"
    quasi: str = "none"
    eps: float = 0.01
    eps_learned: bool = True
    bound: str = "safe"
    quasi_width: int = attention_quasi.WIDTH
    outputs: int = 1


_MNIST, _TEXT = "transformer-mnist", "transformer-ag-news"
_PAPER = "arXiv:2410.04209; table of the quasi paper"
_OFFICIAL = Config(init="official", classifier="flat")
_RELEASED = replace(_OFFICIAL, quasi="released", bound="raw")
_LARGE = replace(_OFFICIAL, channels=(15,))
_COUNT = "15 channels; the quasi paper's 2.857M is its block branch alone"
PRESETS = {
    "transformer-nfn-mnist": Preset(_OFFICIAL, 1_812_181, _PAPER, _MNIST),
    "transformer-nfn-ag-news": Preset(_OFFICIAL, 1_804_741, _PAPER, _TEXT),
    "transformer-nfn-mnist-released": Preset(
        _RELEASED, 1_894_489, "the quasi layer of the paper's released code", _MNIST
    ),
    "transformer-nfn-ag-news-released": Preset(
        _RELEASED, 1_887_049, "the quasi layer of the paper's released code", _TEXT
    ),
    "transformer-nfn-mnist-large": Preset(_LARGE, 2_876_651, _COUNT, _MNIST),
    "transformer-nfn-ag-news-large": Preset(_LARGE, 2_869_211, _COUNT, _TEXT),
    "transformer-nfn": Preset(
        Config(), None, "ours: unit variance, the classifier's neurons a set", _MNIST
    ),
    "transformer-nfn-exact": Preset(
        Config(quasi="exact"), None, "ours: exactly invariant, and not a no-op", _MNIST
    ),
    "transformer-nfn-low-rank": Preset(
        Config(rank=16), None, "ours: factorised, for wide networks", _MNIST
    ),
}


class Model(Metanetwork):
    """dict of (b, *shape) -> raw outputs (b, outputs)."""

    layers: Any  # a ModuleList; mypy takes the methods of what it holds for tensors
    branches: Any

    def __init__(self, space: WeightSpace, config: Config = Config()) -> None:
        super().__init__()
        space = _alike(transformer_of(space, "transformer_nfn"))
        _check(config)
        self.space, self.config = space, config
        c, unit = [1, *config.channels], config.init == "unit"
        self.kit: Any = low_rank if config.rank else polynomial
        more: dict[str, Any] = {"rank": config.rank} if config.rank else {}
        sizes, more = (len(space.blocks), space.width), more | {"unit": unit}
        self.layers = nn.ModuleList(
            self.kit.Equivariant(*sizes, a, b, **more) for a, b in pairwise(c)
        )
        self.invariant = self.kit.Invariant(*sizes, c[-1], c[-1], **more)
        self.norm = BlockNorm(len(space.blocks), c[-1])
        self.head = _head(len(space.blocks) * c[-1], config.answers)
        embed, classify = ends(space)
        widths = [config.answers] * 3
        self.branches = nn.ModuleList()
        if classify:
            self.branches.append(classifier(config.classifier, space, classify, widths, unit))
        if embed:
            size = sum(space[name].size for name in embed)
            self.branches.append(Flat(space, embed, nn.Linear(size, config.answers), unit))
        self.last = nn.Linear(config.answers * (1 + len(self.branches)), config.outputs)
        if config.init == "official":
            self._draw_as_published()
        # Drawn last: with one seed, every mode starts from the same network.
        raw = config.bound == "raw"
        told = config.eps, config.eps_learned, raw, config.quasi_width
        self.quasi = attention_quasi.make(config.quasi, space, *told)

    def _draw_as_published(self) -> None:
        groups, queries, keys, values = self.space.heads[0]
        sizes = published_init.Sizes(groups * queries, keys, values, self.space.sizes["f1"])
        for layer in (*self.layers, self.invariant):
            published_init.draw(layer, sizes)

    def claims(self, space: WeightSpace) -> set[str]:
        """GL and orders of heads unless the released layer is there; orders of neurons where the
        classifier is a set; shifts of biases, which are not read."""
        found = {"shift"}
        if self.quasi is None or self.quasi.keeps_invariance:
            found |= {"general-linear", "heads"}
        if self.config.classifier == "set" or "h1" not in space.hidden:
            found.add("permutation")
        return {name for name in found if allowed(name, space) is None}

    def calibrate(self, w: Mapping[str, Tensor]) -> None:
        """Set the constants of `unit` from the first networks of the training set, layer by
        layer."""
        if self.config.init != "unit":
            return
        w = {name: x[:CALIBRATED] for name, x in w.items()}
        for branch in self.branches:
            branch.fit(w)
        roles = self.space.read(w)
        attention, ffn = self.kit.products(roles), feedforward(roles)
        with torch.no_grad():
            for layer in self.layers[:-1]:
                layer.fit(attention, ffn)
                attention, ffn = layer(attention, ffn)
                ffn = ffn.relu()
            self.layers[-1].fit(attention, ffn)
            self.invariant.fit(attention, self.layers[-1].pooled(attention, ffn))

    def roles(self, w: Mapping[str, Tensor]) -> list[tuple[str, Blocks]]:
        """The blocks after every equivariant step, and under the quasi layer."""
        blocks = self.space.read(w)
        attention, ffn = self.kit.products(blocks), feedforward(blocks)
        steps = []
        for i, layer in enumerate(self.layers, start=1):
            attention, ffn = layer(attention, ffn)
            steps.append((f"layer{i}", _joined(attention.factors(blocks), ffn)))
            ffn = ffn.relu()
        if self.quasi is not None:
            changed = attention.factors(self.quasi(blocks))
            steps.append(("quasi", _joined(changed, ffn)))
        return steps

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        blocks = self.space.read(w)
        attention, ffn = self.kit.products(blocks), feedforward(blocks)
        for layer in self.layers[:-1]:
            attention, ffn = layer(attention, ffn)
            ffn = ffn.relu()
        pooled = self.layers[-1].pooled(attention, ffn)
        attention = self.layers[-1].mapped(attention)
        if self.quasi is not None:
            attention = self.kit.products(self.quasi(blocks)).behind(attention)
        z = self.norm(self.invariant(attention, pooled)).transpose(0, 1).flatten(1)
        return self.last(torch.cat([self.head(z), *(b(w) for b in self.branches)], dim=1))


def _head(inputs: int, width: int) -> nn.Sequential:
    """Layer norm, Linear, and twice layer norm, ReLU, Linear (3.4 of the notes to the code)."""
    rest = [p for _ in range(2) for p in (nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width))]
    return nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, width), *rest)


def _joined(factors: Blocks, ffn: Feedforward) -> Blocks:
    """The roles of every block, a channel axis behind the batch."""
    found, channels = [], ffn.up.shape[2]
    for mine, *parts in zip(factors, *ffn, strict=True):
        wide = {role: x.expand(-1, channels, *x.shape[2:]) for role, x in mine.items()}
        found.append(wide | dict(zip(ffn._fields, parts, strict=True)))
    return found


def _alike(space: Transformer) -> Transformer:
    """The space itself where all blocks have the same sizes: they are computed side by side."""
    neurons = {n for axis, n in space.sizes.items() if axis[0] == "f"}
    if len(set(space.heads)) > 1 or len(neurons) > 1:
        raise UnsupportedError(
            "transformer_nfn reads blocks of the same sizes; these differ",
            "use --architecture statnn",
        )
    return space


def _check(config: Config) -> None:
    wrong = {
        "init": (config.init, ("official", "unit")),
        "bound": (config.bound, ("safe", "raw")),
    }
    for setting, (value, known) in wrong.items():
        if value not in known:
            raise UsageError(
                f"transformer_nfn has no {setting} '{value}'", f"choose {' or '.join(known)}"
            )
    if config.rank and config.init == "official":
        raise UsageError("nobody published a rank", "choose init unit")
    if not config.channels:
        raise UsageError("transformer_nfn needs an equivariant layer", "give channels one number")
