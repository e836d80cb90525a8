"""NFT: neural functional transformers, attention among the weights that share neurons.

Zhou et al., Neural Functional Transformers, arXiv:2305.13546.

    H_0 = A encode(W) + codes of tensors, inputs and outputs
    H_i = block(H_{i-1}),  i = 1..depth  (layers/nft.py)            y = MLP(pool(norm H_depth))

The blocks commute with permutations of all neurons; the codes tell inputs and outputs apart, so the
whole with those of the hidden neurons only. The pool takes means over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qemcli.layers import quasi
from qemcli.layers.deltas import Deltas
from qemcli.layers.encoding import encode
from qemcli.layers.features import Features, require_hidden
from qemcli.layers.heads import mlp_head
from qemcli.layers.metanetwork import Bodied, Body
from qemcli.layers.nft import Block, Sequence
from qemcli.layers.pooling import HNPPool
from qemcli.layers.presets import Preset
from qemcli.layers.statistics import StandardiseTensors
from qemcli.spaces import Chain


@dataclass(frozen=True)
class Config:
    """`channels`, a multiple of `heads`; `depth` blocks; `widening` of their feed-forward maps.

    `fourier`: Fourier features of every entry, of so many frequencies (0: none) drawn with
    `fourier_scale`. `head` width; `dropout` in [0, 1). `standardised`: one mean and std a tensor,
    by `calibrate`. `quasi`: none | paper | released | exact, its `eps` at the start, in
    (-.999, .999), and whether it is learned. `expand`: branches of the editor, which has neither
    pool nor head.
    """

    channels: int = 64
    heads: int = 4
    depth: int = 4
    widening: int = 2
    fourier: int = 128
    fourier_scale: float = 3.0
    head: int = 1000
    dropout: float = 0.0
    standardised: bool = False
    quasi: str = "none"
    eps: float = 0.01
    eps_learned: bool = True
    outputs: int = 1
    expand: int = 1


_SMALL = Config(16, 1, 2, 2, 8, 0.2, head=64, standardised=True, outputs=10)
PRESETS = {
    "nft": Preset(
        Config(256, dropout=0.1, outputs=10),
        None,
        "arXiv:2305.13546; its released code has no count",
        "siren-mnist",
    ),
    "nft-small": Preset(_SMALL, None, "ours: what two cores train", "siren-mnist"),
    "nft-cnn-small": Preset(replace(_SMALL, outputs=1), None, "ours: what two cores train"),
}
EDITORS = {
    "nft-edit-small": Preset(_SMALL, None, "ours: what two cores train", "siren-mnist"),
}


class _Body(Body):
    """Encoding, codes and blocks: one-channel features -> features of C, a tap as an entry."""

    def __init__(self, space: Chain, config: Config) -> None:
        super().__init__()
        require_hidden(space, "NFT")
        c = config.channels
        self.sequence = Sequence(space)
        self.standard = StandardiseTensors(space, config.standardised)
        self.encoding, encoded = encode(space, 1, config.fourier, config.fourier_scale)
        self.weights = nn.ModuleList(nn.Linear(la.taps * encoded, c) for la in space.layers)
        self.biases = nn.ModuleList(nn.Linear(encoded, c) for _ in space.layers)
        self.inputs = nn.Parameter(torch.randn(space.layers[0].cols, c))
        self.outputs = nn.Parameter(torch.randn(space.layers[-1].rows, c))
        self.blocks = nn.ModuleList(
            Block(space, c, config.heads, config.widening, config.dropout)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(c)

    def _coded(self, features: Features) -> Features:
        """The entries' channels and the codes: a tensor's is the bias of its own map."""
        maps = zip(features, self.weights, self.biases, strict=True)
        h = [(weight(w), bias(b)) for (w, b), weight, bias in maps]
        h[0] = (h[0][0] + self.inputs, h[0][1])
        last, last_bias = h[-1]
        h[-1] = (last + self.outputs[:, None], last_bias + self.outputs)
        return h

    def steps(self, features: Features) -> list[tuple[str, Features]]:
        h = self._coded(self.encoding(self.standard(features)))
        steps = [("input", h)]
        x = self.sequence.join(h)
        for i, block in enumerate(self.blocks, start=1):
            x = block(x)
            steps.append((f"block{i}", self.sequence.split(x)))
        return [*steps, ("norm", self.sequence.split(self.norm(x)))]

    def forward(self, features: Features) -> Features:
        return self.steps(features)[-1][1]


class Model(Bodied):
    """dict of (b, *shape) -> raw outputs (b, outputs)."""

    def __init__(self, space: Chain, config: Config = Config()) -> None:
        super().__init__()
        self.space, self.config = space, config
        self.body = _Body(space, config)
        self.pool = HNPPool(space)
        first, *middle, last = space.layers
        pooled = first.cols + 1 + 2 * len(middle) + 2 * last.rows  # taps are in the channels
        inputs = pooled * config.channels
        self.head = mlp_head(inputs, config.head, config.outputs, config.dropout)
        # Drawn last: with one seed, every mode starts from the same backbone and head.
        self.quasi = _quasi(space, config)

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        return self.head(self.pool(self.read(w)))


class Editor(Bodied):
    """dict of (b, *shape) -> what each of k = `expand` branches adds to it, dict of (b, k, *shape).

    The body, a linear map of every tensor to k channels (and its taps), times one learned scalar a
    tensor.
    """

    def __init__(self, space: Chain, config: Config = Config()) -> None:
        super().__init__()
        self.space, self.config = space, config
        self.body = _Body(space, config)
        c, k = config.channels, config.expand
        self.weights = nn.ModuleList(nn.Linear(c, la.taps * k) for la in space.layers)
        self.biases = nn.ModuleList(nn.Linear(c, k) for _ in space.layers)
        self.out = Deltas(space)
        self.quasi = _quasi(space, config)

    def equivariant(self, w: Mapping[str, Tensor]) -> list[tuple[str, Features]]:
        """Features after every block and the last map; `features.act_on_features` acts on them."""
        steps = super().equivariant(w)
        maps = zip(steps[-1][1], self.weights, self.biases, strict=True)
        return [*steps, ("linear", [(weight(x), bias(b)) for (x, b), weight, bias in maps])]

    def forward(self, w: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.out(self.equivariant(w)[-1][1])


def _quasi(space: Chain, config: Config) -> quasi.Layer | None:
    """Behind the last norm, on all channels."""
    c = config.channels
    return quasi.make(config.quasi, space, c, c, config.eps, config.eps_learned)
