"""How well does each network generalise? Its test accuracy, read from the weights alone.

The target is `test_accuracy` in [0, 1]; a metanetwork answers one logit a network and the loss is
the cross-entropy
with the accuracy as a soft label (Unterthiner et al., arXiv:2002.11448, use the same target; Zhou
et al.,
arXiv:2302.14040, the same loss).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qemcli.errors import InputError

if TYPE_CHECKING:
    import pandas
    from torch import Tensor

TARGET = "test_accuracy"
METRIC = "tau"
BLOCK = 1024  # networks whose pairs with all others are in memory at a time
ORDERED = True  # networks are ranked by it, best first; `resampled` gives METRIC of resamples


def target(index: pandas.DataFrame) -> np.ndarray:
    """(n,) accuracies in [0, 1], NaN where none is recorded; InputError where they are not
    fractions."""
    if TARGET not in index:
        return np.full(len(index), np.nan)
    values = index[TARGET].to_numpy(dtype=np.float64, na_value=np.nan)
    known = values[np.isfinite(values)]
    if known.size and (known.min() < 0 or known.max() > 1):
        raise InputError(
            f"column '{TARGET}' has {known.min():.4g} to {known.max():.4g}, not within [0, 1]",
            "give accuracies as fractions (percent / 100)",
        )
    return values


def classes(target: np.ndarray, records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """None: the answer is a number."""
    return ()


def outputs(classes: Sequence[str]) -> int:
    """One logit."""
    return 1


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of (b, 1) logits with (b,) soft labels, the mean over the batch."""
    from torch.nn.functional import binary_cross_entropy_with_logits

    return binary_cross_entropy_with_logits(output[:, 0], target)


def answer(output: Tensor) -> Tensor:
    """(b, 1) logits -> (b,) accuracies in (0, 1)."""
    return output[:, 0].sigmoid()


def row(prediction: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """What a person is told of one network: its predicted accuracy."""
    return {"prediction": float(prediction)}


def named(label: float, classes: Sequence[str]) -> float:
    """A label as a person reads it."""
    return float(label)


def tau(prediction: np.ndarray, label: np.ndarray) -> float:
    """Kendall's tau-b; NaN where either side is constant, which is a failure and not a zero."""
    from scipy.stats import kendalltau

    return float(kendalltau(prediction, label).statistic)


def resampled(prediction: np.ndarray, label: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(r,): tau-b of r resamples that hold each of n networks counts (r, n) times.

    sum_ij c_i c_j a_ij b_ij / sqrt(sum c c |a| sum c c |b|), a and b the signs of the differences:
    a thousand times as fast as one tau after another. Rows of the pairs are taken BLOCK at a time.
    """
    c = counts.astype(np.float32)  # whole numbers below 2^24 are exact
    both = np.zeros((3, len(c)))
    for start in range(0, len(label), BLOCK):
        rows = slice(start, start + BLOCK)
        a, b = (np.sign(x[rows, None] - x[None, :]).astype(np.float32) for x in (prediction, label))
        for i, signs in enumerate((a * b, np.abs(a), np.abs(b))):
            met = (c @ signs.T).astype(np.float64)
            both[i] += np.einsum("rj,rj->r", met, counts[:, rows].astype(np.float64))
    scale = np.sqrt(both[1] * both[2])
    return np.divide(both[0], scale, out=np.full(len(c), np.nan), where=scale > 0)


def r2(prediction: np.ndarray, label: np.ndarray) -> float:
    """1 - SSE / SST over the whole set; NaN for constant labels."""
    total = float(np.sum((label - label.mean()) ** 2))
    return 1 - float(np.sum((label - prediction) ** 2)) / total if total else float("nan")


def score(prediction: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Kendall's tau, R2 and the mean absolute error over the networks that have a label."""
    known = np.isfinite(label) & np.isfinite(prediction)
    prediction, label = prediction[known], label[known]
    if known.sum() < 2:
        return {}
    error = float(np.abs(prediction - label).mean())
    return {"tau": tau(prediction, label), "r2": r2(prediction, label), "mae": error}
