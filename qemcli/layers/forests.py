"""Forests: decision trees kept as tensors, and the metanetworks that are grown instead of trained.

A library of the extra `trees` grows them; after that they are five arrays, saved, checked and asked
as any other tensors, so nobody's pickle or parser is run and no library is needed to predict.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from qemcli.errors import InputError, UsageError
from qemcli.groups import allowed
from qemcli.layers.metanetwork import Metanetwork
from qemcli.layers.statistics import tensor_statistics
from qemcli.registry import suggest
from qemcli.spaces import WeightSpace

READS = ("weights", "statistics")
EDGE = 1e-6  # accuracies are kept so far from 0 and 1, where a logit has no end


class Tree(NamedTuple):
    """One tree, (nodes,) each; node 0 is its root and a leaf is its own child.

    At an inner node x[feature] <= number goes left; at a leaf `number` is what it adds.
    """

    feature: np.ndarray
    number: np.ndarray
    left: np.ndarray
    right: np.ndarray


class Examples(NamedTuple):
    """What is learned from: features (n, f) float32, and accuracies (n,) or class numbers (n,)."""

    x: np.ndarray
    y: np.ndarray


class Grower(Protocol):
    """A library that adds a round of trees at a time (layers/growing.py)."""

    bias: float

    def step(self, number: int) -> float | None:
        """The loss on the validation examples after one round more; None where nothing is left to
        split."""

    def trees(self, rounds: int) -> list[Tree]:
        """The trees of the first rounds: tree i adds to output i modulo the number of outputs."""


class Forest(nn.Module):
    """(b, f) -> (b, outputs): the sums of trees.

    number (nodes,) is a Parameter, so that a forest has as many parameters as nodes; feature, left,
    right (nodes,) and root (trees,) are whole numbers. Until it is planted it has no tree and
    answers `bias`.
    """

    feature: Tensor
    left: Tensor
    right: Tensor
    root: Tensor
    bias: Tensor

    def __init__(self, features: int, depth: int, outputs: int) -> None:
        super().__init__()
        self.features, self.depth = features, depth
        self.register_buffer("bias", torch.zeros(outputs))
        for name in ("feature", "left", "right", "root"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int32))
        self.number = nn.Parameter(torch.zeros(0), requires_grad=False)
        self.register_load_state_dict_pre_hook(_sized)

    def plant(self, trees: list[Tree], bias: float) -> None:
        """Take these trees, and `bias` for every output."""
        roots = np.cumsum([0, *(len(t.feature) for t in trees)])[:-1]
        kept = {"feature": [t.feature for t in trees], "root": [roots]}
        for side in ("left", "right"):
            kept[side] = [getattr(t, side) + r for t, r in zip(trees, roots, strict=True)]
        for name, parts in kept.items():
            setattr(self, name, torch.from_numpy(np.concatenate(parts).astype(np.int32)))
        numbers = np.concatenate([t.number for t in trees]).astype(np.float32)
        self.number = nn.Parameter(torch.from_numpy(numbers), requires_grad=False)
        self.bias.fill_(bias)

    def forward(self, x: Tensor) -> Tensor:
        at = self.root.long().expand(len(x), -1)
        for _ in range(self.depth):
            goes = x.gather(1, self.feature[at].long()) <= self.number[at]
            at = torch.where(goes, self.left[at], self.right[at]).long()
        outputs = len(self.bias)
        leaves = self.number[at].double()
        return leaves.reshape(len(x), len(self.root) // outputs, outputs).sum(1) + self.bias


def _sized(
    forest: Forest,
    state: Mapping[str, Tensor],
    prefix: str,
    _metadata: object,
    _strict: bool,
    _missing: list[str],
    _unexpected: list[str],
    errors: list[str],
) -> None:
    """Before a forest is loaded: make room for what a file has, and refuse what points outside."""
    kept = {name: state.get(prefix + name) for name in ("number", "feature", "left", "right")}
    kept["root"] = state.get(prefix + "root")
    given = {name: x for name, x in kept.items() if x is not None}
    errors += _faults(forest, given)
    for name, found in given.items():
        getattr(forest, name).data = torch.empty_like(found)


def _faults(forest: Forest, given: dict[str, Tensor]) -> Iterator[str]:
    sizes = {name: tuple(x.shape) for name, x in given.items() if name != "root"}
    roots = given.get("root", torch.zeros(0))
    if len(set(sizes.values())) > 1 or roots.ndim != 1 or len(roots) % len(forest.bias):
        yield f"a forest of nodes {sizes} and roots {tuple(roots.shape)}"
    nodes = len(given.get("number", ()))
    limits = {"feature": forest.features, "left": nodes, "right": nodes, "root": nodes}
    for name, limit in limits.items():
        x = given.get(name, roots)
        if x.is_floating_point() and x.numel():
            yield f"a forest's '{name}' is not of whole numbers"
        elif x.numel() and not 0 <= int(x.min()) <= int(x.max()) < limit:
            yield f"a forest's '{name}' points outside 0 to {limit - 1}"


class Settings(Protocol):
    """What every kind of trees is told: see the architectures' `Config`."""

    @property
    def reads(self) -> str: ...
    @property
    def depth(self) -> int: ...
    @property
    def rounds(self) -> int: ...
    @property
    def patience(self) -> int: ...
    @property
    def outputs(self) -> int: ...


class Grown(Metanetwork):
    """dict of (b, *shape) -> raw outputs (b, outputs) in float64: a forest on what it `reads`.

    With one output the trees say an accuracy, and the answer is its logit; with more they say the
    classes' logits. It has no gradients: `training.learn` calls `grow`.
    """

    def __init__(self, space: WeightSpace, told: Settings) -> None:
        super().__init__()
        reads, self.limits = told.reads, (told.rounds, told.patience)
        if reads not in READS:
            raise UsageError(f"trees cannot read '{reads}'", suggest(reads, list(READS)))
        if told.depth < 1:
            raise UsageError(f"depth = {told.depth}: a tree asks at least one question")
        self.space, self.reads, self.outputs = space, reads, told.outputs
        features = space.size if reads == "weights" else 7 * len(space.names)
        self.forest = Forest(features, told.depth, told.outputs)

    @abstractmethod
    def grower(self, train: Examples, val: Examples, seed: int) -> Grower:
        """The library at work on these examples, before the first round.

        Raises EnvironmentFailure where it is not installed.
        """

    def claims(self, space: WeightSpace) -> set[str]:
        """What the features are invariant to: statistics to orders of neurons and of heads, weights
        to nothing."""
        orders = ("permutation", "heads") if self.reads == "statistics" else ()
        return {name for name in orders if allowed(name, space) is None}

    def seen(self, w: Mapping[str, Tensor]) -> Tensor:
        """(b, f): the features of the networks."""
        if self.reads == "statistics":
            return tensor_statistics(self.space, w)
        return torch.cat([w[name].flatten(1) for name in self.space.names], dim=1)

    def grow(
        self,
        train: tuple[Mapping[str, Tensor], Tensor],
        val: tuple[Mapping[str, Tensor], Tensor],
        seed: int,
        on_round: Callable[[dict[str, float]], None] = lambda row: None,
    ) -> list[dict[str, float]]:
        """Grow on (weights, target (n,)) up to the round of the lowest validation loss; returns one
        row a round.

        Raises InputError where no tree finds anything to split.
        """
        grower = self.grower(self._examples(*train), self._examples(*val), seed)
        most, patience = self.limits
        history: list[dict[str, float]] = []
        best = 0
        for number in range(most):
            loss = grower.step(number)
            if loss is None:
                break
            history.append({"epoch": number + 1, "val_loss": loss})
            on_round(history[-1])
            if loss < history[best]["val_loss"]:
                best = number
            if patience and number - best >= patience:
                break
        trees = grower.trees(best + 1) if history else []
        if all(len(tree.feature) == 1 for tree in trees):
            raise InputError(
                f"no tree splits the {len(train[1])} training networks",
                "let a leaf hold fewer of them: [config] leaf = 5",
            )
        self.forest.plant(trees, grower.bias)
        return history

    def _examples(self, w: Mapping[str, Tensor], target: Tensor) -> Examples:
        x = self.seen(w).detach().cpu().numpy()
        return Examples(np.ascontiguousarray(x, dtype=np.float32), target.numpy())

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        found = self.forest(self.seen(w))
        return found.clamp(EDGE, 1 - EDGE).logit() if self.outputs == 1 else found


def below(threshold: np.ndarray) -> np.ndarray:
    """The largest float32 at most each float64 threshold, so that x <= it says the same of every
    float32 x; no denormal, for those are read as zero. It needs no denormal to say so."""
    tiny = np.finfo(np.float32).tiny
    found = threshold.astype(np.float32)
    found = np.where(found > threshold, np.nextafter(found, np.float32(-np.inf)), found)
    edge = np.where(threshold < 0, -tiny, np.float32(0))
    return np.where(np.abs(threshold) < tiny, edge, found)


def strictly_below(threshold: np.ndarray) -> np.ndarray:
    """As `below`, of float32 thresholds, so that x <= it says x < threshold."""
    exact, tiny = threshold.astype(np.float64), float(np.finfo(np.float32).tiny)
    return below(np.where(np.abs(exact) < tiny, -tiny / 2, np.nextafter(exact, -np.inf)))
