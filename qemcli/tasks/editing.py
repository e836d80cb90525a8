"""Editing: what should each network show? The picture that an edit makes of the one it shows now.

A metanetwork answers with weights; the picture that they show is compared with the edited picture
on the [0, 1] scale, unclipped, and the mean squared error is loss and metric (Zhou et al.,
arXiv:2302.14040; arXiv:2602.01083 for the mean over branches).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas
    from torch import Tensor

TARGET = "picture"
METRIC = "psnr"
ORDERED = False
TRUE = 40.0  # dB: what an INR shows is taken for its picture from here on


def target(index: pandas.DataFrame) -> np.ndarray:
    """(n,): 0 where what the network shows may stand for its picture, NaN where its recorded PSNR
    says that it may not. The pictures themselves are made from the weights (qemcli.edits)."""
    if "psnr" not in index:
        return np.zeros(len(index))
    known = index["psnr"].to_numpy(dtype=np.float64, na_value=np.inf)
    return np.where(known < TRUE, np.nan, 0.0)


def classes(target: np.ndarray, records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """None: the answer is a picture."""
    return ()


def outputs(classes: Sequence[str]) -> int:
    """As many as there are weights: not chosen here."""
    return 0


def loss(output: Any, target: Tensor) -> Tensor:
    """The mean squared error of a Glimpse (layers/shown.py) of (b, c h w) pictures."""
    wanted = target.unflatten(1, (output.values.shape[1], -1))[..., output.at]
    return (output.values - wanted).square().mean()


def answer(output: Tensor) -> Tensor:
    """(b, c h w): the pictures as they are."""
    return output


def row(prediction: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Nothing: a picture is not told in a line."""
    return {}


def named(label: float, classes: Sequence[str]) -> float:
    """A label as a person reads it."""
    return float(label)


def reduced(prediction: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (n, c h w) -> their root mean squared errors (n,), to be compared with zeros."""
    error = np.sqrt(np.square(prediction - label).mean(axis=1))
    return error, np.zeros_like(error)


def mse(prediction: np.ndarray, label: np.ndarray) -> float:
    """The mean squared error over networks, and over pixels where they are given."""
    return float(np.square(prediction - label).mean())


def psnr(prediction: np.ndarray, label: np.ndarray) -> float:
    """-10 log10 of the mean squared error, in dB."""
    error = mse(prediction, label)
    return -10 * math.log10(error) if error else math.inf


def resampled(prediction: np.ndarray, label: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(r,): the PSNR of r resamples that hold each of n networks, of these root mean squared errors
    (`reduced`), counts (r, n) times."""
    error = (counts @ np.square(prediction - label)) / counts.sum(axis=1)
    with np.errstate(divide="ignore"):
        return -10 * np.log10(error)


def score(prediction: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """The mean squared error on the [0, 1] scale and the same in dB, of the finite answers."""
    known = np.isfinite(prediction).reshape(len(prediction), -1).all(axis=1)
    prediction, label = prediction[known], label[known]
    if not known.any():
        return {}
    return {"psnr": psnr(prediction, label), "mse": mse(prediction, label)}
