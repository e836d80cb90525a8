"""Bootstrap intervals: right on what is known, and paired where networks are shared."""

from __future__ import annotations

import numpy as np

from qemcli.intervals import interval, over_seeds, paired
from qemcli.tasks.generalization import resampled, score, tau


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


def test_resampled_is_the_tau_of_every_resample() -> None:
    rng = np.random.default_rng(2)
    label = np.round(rng.random(40), 1)  # ties, as chance accuracies have
    prediction = np.round(label + 0.2 * rng.normal(size=40), 1)
    counts = rng.multinomial(40, np.full(40, 1 / 40), size=5)
    counts[4] = 0
    counts[4, 0] = 40  # one network forty times has no order
    found = resampled(prediction, label, counts)
    for value, c in zip(found[:4], counts, strict=False):
        rows = np.repeat(np.arange(40), c)
        assert abs(value - tau(prediction[rows], label[rows])) < 1e-12
    assert np.isnan(found[4])


def test_interval_over_seeds_speaks_of_new_seeds_and_new_networks() -> None:
    rng = np.random.default_rng(3)
    label = rng.random(200)
    one = label + 0.2 * rng.normal(size=200)
    found, low, high = over_seeds(resampled, np.stack([one, one, one]), label)
    assert found == tau(one, label)
    alone = interval(tau, one, label)
    assert abs(low - alone[0]) < 0.02
    assert abs(high - alone[1]) < 0.02
    apart = np.stack([one, label + 0.05 * rng.normal(size=200), label + rng.normal(size=200)])
    _, wide_low, wide_high = over_seeds(resampled, apart, label)
    assert wide_high - wide_low > 2 * (high - low)
    assert np.isnan(over_seeds(resampled, np.stack([one, 0 * one]), label)).all()
