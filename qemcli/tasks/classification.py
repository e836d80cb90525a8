"""What does each network show? The class of its image, read from the weights alone.

The target is `label`, the number of a class; a metanetwork answers one logit a class and the loss
is the cross-entropy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qemcli.errors import InputError

if TYPE_CHECKING:
    import pandas
    from torch import Tensor

TARGET = "label"
METRIC = "accuracy"
ORDERED = False  # a class is neither more nor less than another; `resampled`: METRIC of resamples
MOST = 1000  # class numbers that are believed of a zoo of any size


def target(index: pandas.DataFrame) -> np.ndarray:
    """(n,) class numbers 0, 1, ..., NaN where none is recorded; InputError where they are none."""
    if TARGET not in index:
        return np.full(len(index), np.nan)
    try:
        values = index[TARGET].to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError):
        raise InputError(
            f"column '{TARGET}' has {index[TARGET].dropna().iloc[0]!r}, which is no class number",
            "number the classes 0, 1, 2, ...",
        ) from None
    known = values[~np.isnan(values)]
    wrong = known[(known < 0) | (known % 1 != 0)]
    if wrong.size:
        raise InputError(
            f"column '{TARGET}' has {wrong[0]:g}, which is no class number",
            "number the classes 0, 1, 2, ...",
        )
    return values


def classes(target: np.ndarray, records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The names of the classes: what a zoo's record says under `classes`, else their numbers.

    There are as many as the largest label needs; InputError where that is beyond belief.
    """
    count = int(target.max()) + 1
    if count > max(MOST, len(target)):
        raise InputError(
            f"column '{TARGET}' goes up to {count - 1} in {len(target)} networks: no class numbers",
            "number the classes 0, 1, 2, ...",
        )
    named = next((r["classes"] for r in records if len(r.get("classes") or ()) >= count), None)
    return tuple(map(str, named if named else range(count)))


def outputs(classes: Sequence[str]) -> int:
    """One logit a class."""
    return len(classes)


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of (b, classes) logits with (b,) class numbers, the mean over the batch."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(output, target.long())


def answer(output: Tensor) -> Tensor:
    """(b, classes) logits -> probabilities."""
    return output.softmax(dim=1)


def row(prediction: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """What a person is told of one network: its likeliest class, and how likely that is."""
    best = int(prediction.argmax())
    return {"class": classes[best], "probability": float(prediction[best])}


def named(label: float, classes: Sequence[str]) -> str:
    """A label as a person reads it: the name of the class, its number where it has none."""
    return classes[int(label)] if label < len(classes) else str(int(label))


def accuracy(prediction: np.ndarray, label: np.ndarray) -> float:
    """The share of networks (n, classes) whose likeliest class is their label (n,)."""
    return float(np.mean(prediction.argmax(axis=1) == label))


def resampled(prediction: np.ndarray, label: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(r,): the accuracies of r resamples that hold each of n networks counts (r, n) times."""
    hits = (prediction.argmax(axis=1) == label).astype(np.float64)
    return (counts @ hits) / counts.sum(axis=1)


def macro_f1(prediction: np.ndarray, label: np.ndarray) -> float:
    """The mean over classes of 2 hits / (predicted + labelled); classes that neither has are left
    out."""
    found, wanted = prediction.argmax(axis=1), label.astype(np.int64)
    count = max(prediction.shape[1], int(wanted.max()) + 1)
    hits = np.bincount(wanted[found == wanted], minlength=count)
    both = np.bincount(found, minlength=count) + np.bincount(wanted, minlength=count)
    return float(np.mean(2 * hits[both > 0] / both[both > 0]))


def score(prediction: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Accuracy and macro-F1 over the networks that have a label."""
    known = np.isfinite(label) & np.isfinite(prediction).all(axis=1)
    prediction, label = prediction[known], label[known]
    if not known.any():
        return {}
    return {"accuracy": accuracy(prediction, label), "macro_f1": macro_f1(prediction, label)}
