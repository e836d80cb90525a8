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
from qemcli.layers.evenness import Relu, even, odd
from qemcli.layers.features import ChannelDropout, Features, door, pointwise, relu
from qemcli.layers.heads import mlp_head
from qemcli.layers.monomial import PositiveScaleLinear, SignLinear
from qemcli.layers.pooling import HNPPool, NormalisingPool, PublishedNormalisingPool
from qemcli.layers.presets import Preset
from qemcli.layers.stack import Stack
from qemcli.registry import suggest
from qemcli.spaces import HOMOGENEOUS, ODD, WeightSpace

POOLS = ("exact", "published", "means")


@dataclass(frozen=True)
class Config:
    """`channels` after each equivariant layer; `head` width; `dropout` in [0, 1), channels and
    head (`head_dropout`, where the head has its own).

    `pool`: exact (dead entries stay 0), published (a floor of 1e-12, not exactly invariant), means
    (no normalisation: signs only). `signs`: complete (all sign-equivariant maps) or published (the
    scale layer); between them `odd`: tanh or sin; behind them `even`: absolute or products.
    `reader`: none, or hnp | hnp-full | np | np-posemb of `reader_channels` behind the even map,
    with `fourier`, `fourier_scale`, `io_code` as in nfn; the dropout of channels is in it. `quasi`:
    none | paper | released | exact, its `eps` at the start, in (-.999, .999), and whether it is
    learned.
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
    quasi: str = "none"
    eps: float = 0.01
    eps_learned: bool = True
    outputs: int = 1


_TABLE = "table of the CNN zoo, arXiv:2409.11697"
_INR = "table of the INRs, arXiv:2409.11697"
_MNIST = Config(
    (64, 64, 1),
    head=1000,
    dropout=0.1,
    pool="means",
    odd="sin",
    reader="hnp",
    fourier=128,
    outputs=10,
)
_FASHION = replace(_MNIST, head=500, dropout=0.0, head_dropout=0.5, fourier_scale=10.0)
_CIFAR = replace(_FASHION, channels=(16, 16, 1), head=1000, reader="np", io_code=(10, 6))
_LARGE = "large row of the quasi paper"
_TUNED = (128, 128, 1)
PRESETS = {
    "monomial-nfn": Preset(Config(), 254_619, _TABLE),
    "monomial-nfn-floor": Preset(
        Config(pool="published"), 254_619, f"{_TABLE}; with its 1e-12 floor"
    ),
    "monomial-nfn-large": Preset(
        Config(channels=(20, 20, 10)),
        429_421,
        "large row of the quasi paper; its table says [20, 20, 5]",
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
    "monomial-nfn-inr-mnist": Preset(_MNIST, 22_146_603, _INR, "siren-mnist"),
    "monomial-nfn-inr-fashion": Preset(_FASHION, 20_494_603, _INR, "siren-fashion"),
    "monomial-nfn-inr-cifar": Preset(_CIFAR, 16_248_045, _INR, "siren-cifar"),
    "monomial-nfn-inr-mnist-large": Preset(
        replace(_MNIST, channels=_TUNED), 22_332_971, _LARGE, "siren-mnist"
    ),
    "monomial-nfn-inr-fashion-large": Preset(
        replace(_FASHION, channels=_TUNED), 20_680_971, _LARGE, "siren-fashion"
    ),
    "monomial-nfn-inr-cifar-large": Preset(
        replace(_CIFAR, channels=(64, 64, 1)), 16_386_093, _LARGE, "siren-cifar"
    ),
    "monomial-nfn-inr-paper": Preset(
        replace(_MNIST, quasi="paper"),
        None,
        "the quasi paper's text, its gated unit",
        "siren-mnist",
    ),
    "monomial-nfn-inr-small": Preset(
        Config(
            (8, 8),
            64,
            pool="means",
            even="products",
            reader="hnp-full",
            reader_channels=(16, 16),
            outputs=10,
        ),
        None,
        "ours: exactly invariant to signs, what two cores train",
        "siren-mnist",
    ),
}


class Model(nn.Module):
    """dict of (b, *shape) -> raw outputs (b, outputs)."""

    kind = "invariant"

    def __init__(self, space: WeightSpace, config: Config = Config()) -> None:
        super().__init__()
        self.space, self.config = space, config
        self.signs = _signs(space, config)
        channels = [1, *config.channels]
        self.linears = nn.ModuleList(self._linear(a, b) for a, b in pairwise(channels))
        self.between = odd(config.odd) if self.signs else relu
        self.end = even(config.even) if self.signs else Relu()
        read = channels[-1] * self.end.widens
        self.reader = None if config.reader == "none" else self._reader(read)
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

    def _linear(self, c_in: int, c_out: int) -> nn.Module:
        if self.signs and self.config.signs == "complete":
            return SignLinear(self.space, c_in, c_out)
        return PositiveScaleLinear(self.space, c_in, c_out)

    def _reader(self, channels: int) -> Stack:
        if not self.signs:
            raise UsageError("a reader is not invariant to scales", "choose reader none")
        c = self.config
        return Stack(
            self.space,
            channels,
            c.reader_channels,
            c.reader,
            c.dropout,
            c.fourier,
            c.fourier_scale,
            c.io_code,
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

    def _no_op(self) -> bool:
        exact = self.config.pool == "exact"
        return isinstance(self.quasi, quasi.Paper) and exact and not self.signs

    def equivariant(self, w: Mapping[str, Tensor]) -> list[tuple[str, Features]]:
        """Features after every equivariant step, by name; `features.act_on_features` acts on them.

        The list ends before the even map of the sign group, whose values are invariant to it.
        """
        h = door(self.space, w)
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
        h = before = door(self.space, w)
        for linear in self.linears[:-1]:
            h = before = self.dropout(pointwise(self.between, linear(h)))
        h = self.linears[-1](h)
        if self.quasi is not None:
            h = self.quasi(w, before, h)
        h = self.dropout(self.end(h))
        return self.head(self.pool(h if self.reader is None else self.reader(h)))


def _signs(space: WeightSpace, config: Config) -> bool:
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


def _pool(space: WeightSpace, config: Config, channels: int) -> NormalisingPool | HNPPool:
    if config.pool == "exact":
        return NormalisingPool(space, channels)
    if config.pool == "published":
        return PublishedNormalisingPool(space, channels)
    if config.pool == "means":
        return HNPPool(space)
    raise UsageError(f"monomial_nfn has no pool '{config.pool}'", suggest(config.pool, list(POOLS)))
