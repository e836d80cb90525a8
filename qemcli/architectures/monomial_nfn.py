"""Monomial-NFN: neural functionals equivariant to permutations with scales (ReLU) or with signs
(tanh, sine).

Tran et al., Monomial Matrix Group Equivariant Neural Functional Networks, arXiv:2409.11697.

    H_0 = W,   H_i = sigma(E_i H_{i-1}),   i = 1..depth         y = MLP(pool(H_depth))

The activation of the INPUT networks chooses the group: homogeneous -> positive scales, sigma =
relu; odd -> signs, sigma = tanh or sin, and an even map at the end. The pool normalises the
channels of every entry. With no cross terms between layers, a middle tensor is a set of entries to
this model: it is blind to how the neurons are connected (a test shows it; the quasi mode `exact` is
not).

For INRs the even map is followed by a `reader`, a permutation-equivariant network (HNP or NP on
Fourier features): invariant to signs because what it reads is, and to permutations by its pool.
With |.| it never sees which signs belong together; `products` (ours) shows it W_l[j,k] s_l[j]
s_{l-1}[k].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from qemcli.errors import UnsupportedError, UsageError
from qemcli.layers import quasi
from qemcli.layers.deltas import Deltas
from qemcli.layers.equivariant import equivariant_linear
from qemcli.layers.evenness import Relu, Resign, even, neuron_signs, odd
from qemcli.layers.features import ChannelDropout, Features, door, pointwise, relu
from qemcli.layers.heads import mlp_head
from qemcli.layers.metanetwork import Metanetwork
from qemcli.layers.monomial import PositiveScaleLinear, SignLinear
from qemcli.layers.pooling import HNPPool, NormalisingPool, PublishedNormalisingPool
from qemcli.layers.presets import Preset
from qemcli.layers.stack import Stack
from qemcli.layers.statistics import ScaleTensors
from qemcli.registry import suggest
from qemcli.spaces import HOMOGENEOUS, ODD, Chain, WeightSpace

POOLS = ("exact", "published", "means")


@dataclass(frozen=True)
class Config:
    """`channels` after each equivariant layer; `head` width; `dropout` in [0, 1), channels and
    head (`head_dropout`, where the head has its own).

    `pool`: exact (dead entries stay 0), published (a floor of 1e-12, not exactly invariant), means
    (no normalisation: signs only). `signs`: complete (all sign-equivariant maps) or published (the
    scale layer); between them `odd`: tanh, sin or identity; behind them `even`: absolute or
    products (or none, in the published editor).
    `reader`: none, or hnp | hnp-full | np | np-posemb of `reader_channels` behind the even map,
    with `fourier`, `fourier_scale`, `io_code` as in nfn; the dropout of channels is in it.
    `scaled`: every tensor by its size in the training set, set by `calibrate`. `quasi`: none |
    paper | released | exact, its `eps` at the start, in (-.999, .999), and whether it is learned.
    `expand`: branches of the editor, which has neither pool nor head.
    """

    channels: tuple[int, ...] = (16, 16, 5)
    head: int = 200
    dropout: float = 0.0
    pool: str = "exact"
    signs: str = "complete"
    odd: str = "tanh"
    even: str = "absolute"
    reader: str = "none"
    reader_channels: tuple[int, ...] = (256, 256, 256)
    fourier: int = 0
    fourier_scale: float = 3.0
    io_code: tuple[int, ...] = ()
    head_dropout: float | None = None
    scaled: bool = False
    quasi: str = "none"
    eps: float = 0.01
    eps_learned: bool = True
    outputs: int = 1
    expand: int = 1


_LARGE = "large row of the quasi paper"
_TABLE = "table of the CNN zoo, arXiv:2409.11697"
_MNIST = Config((64, 64, 1), 1000, 0.1, "means", odd="sin", reader="hnp", fourier=128, outputs=10)
_FASHION = replace(_MNIST, head=500, dropout=0.0, head_dropout=0.5, fourier_scale=10.0)
_CIFAR = replace(_FASHION, channels=(16, 16, 1), head=1000, reader="np", io_code=(10, 6))
_SMALL = Config((8, 8), 64, 0.0, "means", even="products", scaled=True, outputs=10)
_SMALL = replace(_SMALL, reader="hnp-full", reader_channels=(16, 16))


def _inr(data: str, config: Config, count: int, tuned: tuple[int, ...] = ()) -> Preset:
    """A published classifier of INRs, or the tuned one of the quasi paper."""
    source = _LARGE if tuned else "table of the INRs, arXiv:2409.11697"
    config = replace(config, channels=tuned or config.channels)
    return Preset(config, count, source, f"siren-{data}")


PRESETS = {
    "monomial-nfn": Preset(Config(), 254_619, _TABLE),
    "monomial-nfn-floor": Preset(
        Config(pool="published"), 254_619, f"{_TABLE}; with its 1e-12 floor"
    ),
    "monomial-nfn-large": Preset(
        Config((20, 20, 10)), 429_421, f"{_LARGE}; its table: [20, 20, 5]"
    ),
    "monomial-nfn-released": Preset(
        Config(quasi="released"), 264_525, "the quasi layer of the paper's released code"
    ),
    "monomial-nfn-tanh": Preset(
        Config(signs="published"), 254_619, f"{_TABLE}; tanh: the scale layer", "cnn-zoo-tanh"
    ),
    "monomial-nfn-paper": Preset(
        Config(quasi="paper"), None, "the quasi layer of the paper's text: a no-op"
    ),
    "monomial-nfn-exact": Preset(
        Config(quasi="exact"), None, "ours: exactly invariant, and not a no-op"
    ),
    "monomial-nfn-sign": Preset(
        Config(pool="means"), None, "ours: every sign map, means", "cnn-zoo-tanh"
    ),
    "monomial-nfn-inr-mnist": _inr("mnist", _MNIST, 22_146_603),
    "monomial-nfn-inr-fashion": _inr("fashion", _FASHION, 20_494_603),
    "monomial-nfn-inr-cifar": _inr("cifar", _CIFAR, 16_248_045),
    "monomial-nfn-inr-mnist-large": _inr("mnist", _MNIST, 22_332_971, (128, 128, 1)),
    "monomial-nfn-inr-fashion-large": _inr("fashion", _FASHION, 20_680_971, (128, 128, 1)),
    "monomial-nfn-inr-cifar-large": _inr("cifar", _CIFAR, 16_386_093, (64, 64, 1)),
    "monomial-nfn-inr-paper": Preset(
        replace(_MNIST, quasi="paper"), None, "the quasi paper's gated unit", "siren-mnist"
    ),
    "monomial-nfn-inr-small": Preset(
        _SMALL, None, "ours: exactly invariant to signs, what two cores train", "siren-mnist"
    ),
}
_EDIT = Config((16, 1), odd="identity", even="none", reader="np", fourier=128, io_code=(3, 3))
_EDIT = replace(_EDIT, pool="means", reader_channels=(128, 128, 128))
_STYLE = "editing of INRs, arXiv:2409.11697; loses the signs"
EDITORS = {
    "monomial-nfn-edit-mnist": Preset(_EDIT, 4_134_153, _STYLE, "siren-mnist"),
    "monomial-nfn-edit-cifar": Preset(_EDIT, 4_134_827, _STYLE, "siren-cifar"),
    "monomial-nfn-edit-small": Preset(
        _SMALL, None, "ours: equivariant to signs, what two cores train", "siren-mnist"
    ),
}


class Model(Metanetwork):
    """dict of (b, *shape) -> raw outputs (b, outputs)."""

    def __init__(self, space: Chain, config: Config = Config()) -> None:
        super().__init__()
        self.space, self.config = space, config
        self.signs = _signs(space, config)
        channels = [1, *config.channels]
        self.scale = ScaleTensors(space, config.scaled)
        self.linears = _linears(space, config, self.signs, channels)
        self.between = odd(config.odd) if self.signs else relu
        self.end = even(config.even) if self.signs else Relu()
        read = channels[-1] * self.end.widens
        self.reader = _reader(space, config, self.signs, read)
        self.dropout = ChannelDropout(config.dropout if self.reader is None else 0.0)
        pooled = read if self.reader is None else config.reader_channels[-1]
        self.pool = _pool(space, config, pooled)
        dropout = config.dropout if config.head_dropout is None else config.head_dropout
        inputs = self.pool.per_channel * pooled
        self.head = mlp_head(inputs, config.head, config.outputs, dropout)
        # Drawn last: with one seed, every mode starts from the same backbone and head.
        self.quasi = quasi.make(
            config.quasi, space, channels[-2], channels[-1], config.eps, config.eps_learned
        )

    def claims(self, space: WeightSpace) -> set[str]:
        """Permutations with the activation's diagonal, as far as pool and quasi layer are exact."""
        if self.quasi is not None and not self.quasi.keeps_invariance and not self._no_op():
            return set()
        if self.signs:
            return {"permutation", "sign", "monomial"}
        if self.space.activation in ODD:  # identity: its diagonal has signs too, relu does not
            return {"permutation", "scale"} if self.config.pool == "exact" else {"permutation"}
        return (
            {"permutation", "scale", "monomial"} if self.config.pool == "exact" else {"permutation"}
        )

    def calibrate(self, w: Mapping[str, Tensor]) -> None:
        """Set the constants of `scaled` from the training set: one a tensor, and no shift."""
        self.scale.fit(door(self.space, w))

    def _no_op(self) -> bool:
        exact = self.config.pool == "exact"
        return isinstance(self.quasi, quasi.Paper) and exact and not self.signs

    def equivariant(self, w: Mapping[str, Tensor]) -> list[tuple[str, Features]]:
        """Features after every equivariant step, by name; `features.act_on_features` acts on them.

        The list ends before the even map of the sign group, whose values are invariant to it.
        """
        h = self.scale(door(self.space, w))
        steps = [("input", h)]
        for i, linear in enumerate(self.linears, start=1):
            before, h = h, linear(h)
            steps.append((f"linear{i}", h))
            if i < len(self.linears):
                h = self.dropout(pointwise(self.between, pointwise(torch.clone, h)))
                steps.append((f"between{i}", h))
        if self.quasi is not None:
            h = self.quasi(w, before, h)
            steps.append(("quasi", h))
        return steps

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        h = before = self.scale(door(self.space, w))
        for linear in self.linears[:-1]:
            h = before = self.dropout(pointwise(self.between, linear(h)))
        h = self.linears[-1](h)
        if self.quasi is not None:
            h = self.quasi(w, before, h)
        h = self.dropout(self.end(h))
        return self.head(self.pool(h if self.reader is None else self.reader(h)))


class Editor(Metanetwork):
    """dict of (b, *shape) -> what each of k = `expand` branches adds to it, dict of (b, k, *shape).

        delta = s * E_{depth+1} H_depth                                        without a reader
        delta = s * R(H_depth) t t',   R = E reader(even(H_depth))             with one

    Without a reader, sigma stands behind H_depth too. The reader's answer gets its signs back
    (`Resign`): both are equivariant to permutations and signs (without a reader, to scales where
    the networks have those). `even` = none is the published editor: the reader takes H_depth as it
    is, and only permutations are left. A quasi layer stands on H_depth. s is one learned scalar a
    tensor.
    """

    def __init__(self, space: Chain, config: Config = Config()) -> None:
        super().__init__()
        self.space, self.config = space, config
        self.signs = _signs(space, config)
        k, channels = config.expand, [1, *config.channels]
        own = [] if config.reader != "none" else [k]
        self.scale = ScaleTensors(space, config.scaled)
        self.linears = _linears(space, config, self.signs, [*channels, *own])
        self.between = odd(config.odd) if self.signs else relu
        published = config.even == "none"
        self.end = None if published else even(config.even)
        read = channels[-1] * (1 if self.end is None else self.end.widens)
        self.reader = _reader(space, config, self.signs, read)
        self.dropout = ChannelDropout(config.dropout if self.reader is None else 0.0)
        if self.reader is not None:
            self.last = equivariant_linear(space, config.reader, config.reader_channels[-1], k)
            self.resign = None if published else Resign(space, channels[-1], k)
        self.out = Deltas(space)
        last, out = [*channels, *own][-2:]
        self.quasi = quasi.make(config.quasi, space, last, out, config.eps, config.eps_learned)

    def claims(self, space: WeightSpace) -> set[str]:
        """Permutations with the activation's diagonal, unless the published editor or the quasi
        layer loses it."""
        if self.quasi is not None and not self.quasi.keeps_invariance:
            return set()
        if self.reader is not None and self.end is None:
            return {"permutation"}
        if self.signs:
            return {"permutation", "sign", "monomial"}
        both = set() if self.space.activation in ODD else {"monomial"}
        return {"permutation", "scale"} | both

    def calibrate(self, w: Mapping[str, Tensor]) -> None:
        """Set the constants of `scaled` from the training set: one a tensor, and no shift."""
        self.scale.fit(door(self.space, w))

    def equivariant(self, w: Mapping[str, Tensor]) -> list[tuple[str, Features]]:
        """Features after every equivariant step, by name; `features.act_on_features` acts on
        them."""
        h = self.scale(door(self.space, w))
        steps = [("input", h)]
        for i, linear in enumerate(self.linears, start=1):
            before, h = h, linear(h)
            if i < len(self.linears):
                h = self.dropout(pointwise(self.between, h))
            steps.append((f"linear{i}", h))
        if self.quasi is not None:
            h = self.quasi(w, before, h)
            steps.append(("quasi", h))
        if self.reader is not None:
            answer = self.last(self.reader(h if self.end is None else self.end(h)))
            if self.resign is not None:
                answer = self.resign(answer, neuron_signs(h))
            steps.append(("reader", answer))
        return steps

    def forward(self, w: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.out(self.equivariant(w)[-1][1])


def _linears(space: Chain, config: Config, signs: bool, channels: list[int]) -> nn.ModuleList:
    """The equivariant layers from one number of channels to the next."""
    made = SignLinear if signs and config.signs == "complete" else PositiveScaleLinear
    return nn.ModuleList(made(space, a, b) for a, b in pairwise(channels))


def _reader(space: Chain, config: Config, signs: bool, channels: int) -> Stack | None:
    """What reads the features behind the even map, where a reader is asked for."""
    if config.reader == "none":
        return None
    if not signs:
        raise UsageError("a reader is not invariant to scales", "choose reader none")
    c = config
    coded = (c.fourier, c.fourier_scale, c.io_code)
    return Stack(space, channels, c.reader_channels, c.reader, c.dropout, *coded)


def _signs(space: Chain, config: Config) -> bool:
    """True for the sign group, False for positive scales; an error where the activation has
    neither.
    """
    if config.signs not in ("complete", "published"):
        raise UsageError(
            f"monomial_nfn has no sign layer '{config.signs}'", "choose complete or published"
        )
    if space.activation in HOMOGENEOUS:
        if config.pool == "means":
            raise UsageError(
                "the pool 'means' is not invariant to scales", "choose exact or published"
            )
        return False
    if space.activation in ODD:
        return True
    what = space.activation or "not known"
    raise UnsupportedError(
        f"monomial_nfn needs the networks' activation, and it is {what}",
        "say --activation relu (or tanh, ...); for others use --architecture nfn",
    )


def _pool(space: Chain, config: Config, channels: int) -> NormalisingPool | HNPPool:
    if config.pool == "exact":
        return NormalisingPool(space, channels)
    if config.pool == "published":
        return PublishedNormalisingPool(space, channels)
    if config.pool == "means":
        return HNPPool(space)
    raise UsageError(f"monomial_nfn has no pool '{config.pool}'", suggest(config.pool, list(POOLS)))
