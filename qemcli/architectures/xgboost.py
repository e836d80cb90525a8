"""XGBoost: gradient-boosted trees on flattened weights; a baseline that knows no symmetry.

Chen and Guestrin, XGBoost, arXiv:1603.02754; on zoos of networks arXiv:2002.11448 and, with these
settings, the Small Transformer Zoo of Transformer-NFN, arXiv:2410.04209.

    y = mean + sum_t eta tree_t(W_1, b_1, ..., W_L, b_L)        squared error on the accuracy

Trees are grown until the validation error is lowest. The package comes with `qemcli[trees]`.
"""

from __future__ import annotations

from dataclasses import dataclass

from qemcli.layers.forests import Examples, Grower, Grown
from qemcli.layers.growing import Xgboost
from qemcli.layers.presets import Preset
from qemcli.spaces import WeightSpace

READS = (WeightSpace,)


@dataclass(frozen=True)
class Config:
    """`reads`: weights, or statistics (seven a tensor: invariant to permutations).

    At most `rounds`, of which those up to the lowest validation error are kept; `patience`: rounds
    without a lower one before stopping (0: never). `rate` in (0, 1]; `depth` and `leaves` of a tree
    at most; `leaf`: networks in a leaf at least; `rows` and `columns`: shares drawn for every tree;
    `l1`, `l2`: penalties on the leaves. `threads`: with one, same seed, same bytes.
    """

    reads: str = "weights"
    rounds: int = 50
    patience: int = 0
    rate: float = 0.1
    depth: int = 10
    leaves: int = 256
    leaf: float = 50
    rows: float = 0.8
    columns: float = 0.8
    l1: float = 0.02
    l2: float = 0.01
    threads: int = 1
    outputs: int = 1


PRESETS = {
    "xgboost": Preset(Config(), None, "arXiv:2410.04209, with the 256 leaves of its text"),
    "xgboost-statistics": Preset(Config(reads="statistics"), None, "ours: seven a tensor"),
}


class Model(Grown):
    """dict of (b, *shape) -> raw outputs (b, outputs)."""

    def __init__(self, space: WeightSpace, config: Config = Config()) -> None:
        super().__init__(space, config)
        self.config = config

    def grower(self, train: Examples, val: Examples, seed: int) -> Grower:
        """XGBoost under this configuration."""
        c = self.config
        settings = {
            "eta": c.rate,
            "max_depth": c.depth,
            "max_leaves": c.leaves,
            "min_child_weight": c.leaf,
            "subsample": c.rows,
            "colsample_bytree": c.columns,
            "alpha": c.l1,
            "lambda": c.l2,
            "seed": seed,
            "nthread": c.threads,
        }
        return Xgboost(train, val, c.outputs, settings)
