"""StatNN: seven statistics of every tensor, and a multilayer perceptron.

Unterthiner et al., Predicting Neural Network Accuracy from Weights, arXiv:2002.11448 (with this
head: arXiv:2302.14040).

    phi(T) = [mean, var, q0, q25, q50, q75, q100](T)          y = MLP(phi(T_1), ..., phi(T_n))

Any shuffle of a tensor's entries leaves phi unchanged: invariant to permutations, and to nothing
else. A quasi layer takes the identity for its equivariant map: phi sees alpha(x) x.

Over many architectures the tensors are pooled instead of joined: the statistics of the first and
the last map, the mean, least and largest over all of them, the same of the biases, and a few
numbers of the architecture itself (layers/statistics.py), by constants of the training set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qemcli.errors import UnsupportedError
from qemcli.groups import allowed
from qemcli.layers import quasi
from qemcli.layers.features import Features, door
from qemcli.layers.heads import mlp_head
from qemcli.layers.metanetwork import Metanetwork, Mixed
from qemcli.layers.presets import Preset
from qemcli.layers.statistics import (
    POOLED,
    Standardise,
    pooled_statistics,
    tensor_statistics,
)
from qemcli.spaces import Chain, Opaque, WeightSpace

READS = (WeightSpace,)


@dataclass(frozen=True)
class Config:
    """`head`: width of the two hidden layers; `dropout` in [0, 1).

    `standardised`: each statistic by constants of the training set, set by `Model.calibrate`.
    `quasi`: none | paper | released | exact, its `eps` at the start, in (-.999, .999), and whether
    it is learned.
    """

    head: int = 1000
    dropout: float = 0.0
    standardised: bool = False
    quasi: str = "none"
    eps: float = 0.01
    eps_learned: bool = True
    outputs: int = 1


PRESETS = {
    "statnn": Preset(
        Config(), 1_059_001, "arXiv:2302.14040; table of the CNN zoo, arXiv:2409.11697"
    ),
    "statnn-standardised": Preset(
        Config(standardised=True), None, "ours: constants of the training set"
    ),
}


class Model(Metanetwork):
    """dict of (b, *shape) -> raw outputs (b, outputs)."""

    def __init__(self, space: WeightSpace, config: Config = Config()) -> None:
        super().__init__()
        self.space, self.config = space, config
        features = 7 * len(space.tensors)
        self.scale = Standardise(features) if config.standardised else nn.Identity()
        self.head = mlp_head(features, config.head, config.outputs, config.dropout)
        # Drawn last: with one seed, every mode starts from the same head.
        self.quasi = quasi.make(config.quasi, space, 1, 1, config.eps, config.eps_learned)

    def claims(self, space: WeightSpace) -> set[str]:
        """Permutations, of heads too, unless a quasi layer ties its scales to the neurons'
        indices."""
        return _of_bags(space) if quasi.keeps(self.quasi) else set()

    def calibrate(self, w: Mapping[str, Tensor]) -> None:
        """Set the constants of `standardised` from the training set's weights; else nothing."""
        if isinstance(self.scale, Standardise):
            self.scale.fit(tensor_statistics(self.space, w))

    def equivariant(self, w: Mapping[str, Tensor]) -> list[tuple[str, Features]]:
        """The weights, and what the quasi layer makes of them; by name, as features."""
        if not isinstance(self.space, Chain):
            return []
        h = door(self.space, w)
        steps = [("input", h)]
        return steps if self.quasi is None else [*steps, ("quasi", self.quasi(w, h, h))]

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        seen = quasi.entered(self.quasi, self.space, w)
        return self.head(self.scale(tensor_statistics(self.space, seen)))


def _of_bags(space: WeightSpace) -> set[str]:
    """What a bag of entries a tensor is invariant to: permutations, of heads too."""
    heads = {"heads"} if allowed("heads", space) is None else set()
    return {"permutation"} | heads


class Mixture(Mixed):
    """StatNN over many architectures."""

    def __init__(self, spaces: Sequence[WeightSpace], config: Config = Config()) -> None:
        super().__init__()
        quasi.refuse_many(config.quasi)
        self.scale = Standardise(POOLED)
        self.head = mlp_head(POOLED, config.head, config.outputs, config.dropout)

    def bind(self, space: WeightSpace) -> Metanetwork:
        """Reads any network whose tensors are understood."""
        if isinstance(space, Opaque):
            raise UnsupportedError(f"statnn reads statistics of layers; this is {space.title}")
        return Pooled(self, space)

    def calibrate(self, parts: Sequence[tuple[WeightSpace, Mapping[str, Tensor]]]) -> None:
        """Set the constants of every statistic from the training set."""
        self.scale.fit(torch.cat([pooled_statistics(space, w) for space, w in parts]))


class Pooled(Metanetwork):
    """dict of (b, *shape) -> raw outputs (b, outputs), of one of the architectures."""

    def __init__(self, shared: Mixture, space: WeightSpace) -> None:
        super().__init__()
        self.shared, self.space = shared, space

    def claims(self, space: WeightSpace) -> set[str]:
        """Permutations, of heads too."""
        return _of_bags(space)

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        return self.shared.head(self.shared.scale(pooled_statistics(self.space, w)))
