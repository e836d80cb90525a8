"""Bootstrap intervals: right on what is known, and paired where networks are shared."""

from __future__ import annotations

import numpy as np

from qemcli.intervals import interval, paired
from qemcli.tasks.generalization import score, tau


def test_interval_holds_the_score() -> None:
    rng = np.random.default_rng(0)
    label = rng.random(200)
    prediction = label + 0.2 * rng.normal(size=200)
    low, high = interval(tau, prediction, label)
    assert low < tau(prediction, label) < high
    assert 0 < high - low < 0.2


def test_paired_is_zero_for_the_same_predictions_and_narrower_than_unpaired() -> None:
    rng = np.random.default_rng(1)
    label = rng.random(300)
    worse = label + 0.3 * rng.normal(size=(3, 300))
    better = label + (worse - label) * 0.8
    assert paired(tau, worse, worse, label, resamples=100) == (0.0, 0.0, 0.0)
    difference, low, high = paired(tau, better, worse, label, resamples=200)
    assert 0 < low < difference < high
    alone = interval(tau, better[0], label, resamples=200)
    assert high - low < alone[1] - alone[0]


def test_score_of_a_constant_is_nan_not_zero() -> None:
    label = np.linspace(0, 1, 20)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.isnan(score(np.full(20, 0.5), label)["tau"])


def test_score_leaves_out_what_has_no_label() -> None:
    label = np.array([0.1, np.nan, 0.3, 0.4])
    assert score(np.array([0.1, 9.0, 0.3, 0.4]), label)["mae"] == 0


def test_paired_difference_to_a_constant_answer_is_no_number() -> None:
    label = np.linspace(0, 1, 30)
    ours, theirs = np.zeros((2, 30)), np.tile(label, (2, 1))
    assert np.isnan(paired(tau, ours, theirs, label)).all()
