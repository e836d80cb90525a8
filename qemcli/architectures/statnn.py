"""StatNN: seven statistics of every tensor, and a multilayer perceptron.

Unterthiner et al., Predicting Neural Network Accuracy from Weights, arXiv:2002.11448 (with this
head: arXiv:2302.14040).

    phi(T) = [mean, var, q0, q25, q50, q75, q100](T)          y = MLP(phi(T_1), ..., phi(T_n))

Any shuffle of a tensor's entries leaves phi unchanged: invariant to permutations, and to nothing
else. A quasi layer takes the identity for its equivariant map: phi sees alpha(x) x.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from qemcli.groups import allowed
from qemcli.layers import quasi
from qemcli.layers.features import Features, door, exit_door
from qemcli.layers.heads import mlp_head
from qemcli.layers.metanetwork import Metanetwork
from qemcli.layers.presets import Preset
from qemcli.layers.statistics import Standardise, tensor_statistics
from qemcli.spaces import Chain, WeightSpace, chain_of


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


QUASI = "this quasi layer"


class Model(Metanetwork):
    """dict of (b, *shape) -> raw outputs (b, outputs)."""

    def __init__(self, space: WeightSpace, config: Config = Config()) -> None:
        super().__init__()
        self.space, self.config = space, config
        features = 7 * len(space.tensors)
        self.scale = Standardise(features) if config.standardised else nn.Identity()
        self.head = mlp_head(features, config.head, config.outputs, config.dropout)
        # Drawn last: with one seed, every mode starts from the same head.
        self.quasi = (
            quasi.make(config.quasi, chain_of(space, QUASI), 1, 1, config.eps, config.eps_learned)
            if config.quasi != "none"
            else None
        )

    def claims(self, space: WeightSpace) -> set[str]:
        """Permutations, of heads too, unless a quasi layer ties its scales to the neurons'
        indices."""
        if self.quasi is not None and not self.quasi.keeps_invariance:
            return set()
        heads = {"heads"} if allowed("heads", space) is None else set()
        return {"permutation"} | heads

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
        if self.quasi is not None:
            w = exit_door(chain_of(self.space, QUASI), self.equivariant(w)[-1][1])
        return self.head(self.scale(tensor_statistics(self.space, w)))
