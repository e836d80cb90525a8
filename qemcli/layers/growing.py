"""Growers: XGBoost and LightGBM, one round of trees at a time; they come with the extra `trees`.

Seeded, on as many threads as are asked for (one: same seed, same bytes), and silent.
"""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

import numpy as np

from qemcli.errors import EnvironmentFailure
from qemcli.layers.forests import Examples, Tree, below, strictly_below


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise EnvironmentFailure(
            f"growing these trees needs {name}", "pip install 'qemcli[trees]'"
        ) from None


class Xgboost:
    """Boosted trees of XGBoost's histogram method; `settings` are its own parameters.

    `bias` is the mean target, or 0 for classes.
    """

    def __init__(
        self, train: Examples, val: Examples, outputs: int, settings: dict[str, Any]
    ) -> None:
        library = _library("xgboost")
        self.bias = float(np.mean(train.y, dtype=np.float64)) if outputs == 1 else 0.0
        asked = (
            {"objective": "reg:squarederror", "eval_metric": "rmse"}
            if outputs == 1
            else {"objective": "multi:softprob", "eval_metric": "mlogloss", "num_class": outputs}
        )
        threads = settings["nthread"]
        self.train, self.val = (library.DMatrix(e.x, e.y, nthread=threads) for e in (train, val))
        always = {"tree_method": "hist", "base_score": self.bias, "verbosity": 0}
        self.booster = library.Booster(asked | always | settings, [self.train, self.val])
        self.outputs = outputs

    def step(self, number: int) -> float | None:
        """One round, and the loss on the validation examples: squared error's root, or the
        cross-entropy."""
        self.booster.update(self.train, number)
        return float(self.booster.eval_set([(self.val, "val")], number).rpartition(":")[2])

    def trees(self, rounds: int) -> list[Tree]:
        """From the library's own JSON."""
        learned = json.loads(self.booster[:rounds].save_raw("json"))["learner"]
        return [_from_xgboost(t) for t in learned["gradient_booster"]["model"]["trees"]]


def _from_xgboost(tree: dict[str, Any]) -> Tree:
    left, right = (np.array(tree[f"{side}_children"]) for side in ("left", "right"))
    leaf, own = left < 0, np.arange(len(left))
    number = np.array(tree["split_conditions"], dtype=np.float32)
    return Tree(
        np.where(leaf, 0, np.array(tree["split_indices"])),
        np.where(leaf, number, strictly_below(number)),
        np.where(leaf, own, left),
        np.where(leaf, own, right),
    )


class Lightgbm:
    """Trees of LightGBM: boosted or, where its `boosting` is "rf", a forest, the mean of rounds."""

    bias = 0.0  # it is in the leaves

    def __init__(
        self, train: Examples, val: Examples, outputs: int, settings: dict[str, Any]
    ) -> None:
        library = _library("lightgbm")
        asked = (
            {"objective": "regression", "metric": "l2"}
            if outputs == 1
            else {"objective": "multiclass", "metric": "multi_logloss", "num_class": outputs}
        )
        always = {"verbosity": -1, "deterministic": True, "force_col_wise": True}
        given = asked | always | settings
        kept = library.Dataset(train.x, train.y, params=given)
        self.booster = library.Booster(given, kept)
        self.booster.add_valid(library.Dataset(val.x, val.y, reference=kept, params=given), "val")

    def step(self, number: int) -> float | None:
        """One round, and the loss on the validation examples: squared error, or the
        cross-entropy."""
        stuck = self.booster.update()
        return None if stuck else float(self.booster.eval_valid()[0][2])

    def trees(self, rounds: int) -> list[Tree]:
        """From the library's own text."""
        head, *parts = self.booster.model_to_string(num_iteration=rounds).split("\nTree=")
        weight = 1 / rounds if "\naverage_output\n" in head else 1.0
        return [_from_lightgbm(part, weight) for part in parts]


def _from_lightgbm(text: str, weight: float) -> Tree:
    """Inner nodes first, then leaves, whose children are written as -1 - leaf."""
    pairs = (line.partition("=") for line in text.splitlines())
    told = {name: value.split() for name, _, value in pairs}
    leaves = np.array(told["leaf_value"], dtype=np.float64) * weight
    inner = len(leaves) - 1
    own = np.arange(inner, inner + len(leaves))
    if not inner:
        return Tree(np.zeros(1, int), leaves, np.zeros(1, int), np.zeros(1, int))
    sides = (np.array(told[f"{side}_child"], dtype=int) for side in ("left", "right"))
    left, right = (np.concatenate([np.where(s < 0, inner - 1 - s, s), own]) for s in sides)
    feature = np.concatenate([np.array(told["split_feature"], dtype=int), np.zeros_like(own)])
    threshold = below(np.array(told["threshold"], dtype=np.float64))
    return Tree(feature, np.concatenate([threshold, leaves]), left, right)
