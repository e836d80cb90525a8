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
    assert paired(resampled, worse, worse, label, resamples=100) == (0.0, 0.0, 0.0)
    difference, low, high = paired(resampled, better, worse, label, resamples=200)
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
    assert np.isnan(paired(resampled, ours, theirs, label)).all()


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


def test_resampled_scores_of_classes_and_pictures_are_those_of_the_resamples() -> None:
    from qemcli.tasks import classification, editing

    rng = np.random.default_rng(4)
    counts = rng.multinomial(30, np.full(30, 1 / 30), size=4)
    label = rng.integers(3, size=30).astype(float)
    answers, errors = rng.random((30, 3)), rng.random(30)
    for task, given, wanted in (
        (classification, answers, label), (editing, errors, np.zeros(30)),
    ):  # fmt: skip
        found = task.resampled(given, wanted, counts)
        for value, c in zip(found, counts, strict=True):
            rows = np.repeat(np.arange(30), c)
            again = getattr(task, task.METRIC)(given[rows], wanted[rows])
            assert abs(value - again) < 1e-12


def test_pairs_are_taken_in_blocks(monkeypatch) -> None:
    from qemcli.tasks import generalization

    rng = np.random.default_rng(5)
    label, prediction = rng.random(50), rng.random(50)
    counts = rng.multinomial(50, np.full(50, 1 / 50), size=3)
    whole = resampled(prediction, label, counts)
    monkeypatch.setattr(generalization, "BLOCK", 7)
    assert np.allclose(resampled(prediction, label, counts), whole, atol=1e-12)


def test_paired_interval_is_that_of_the_resamples_one_by_one() -> None:
    """The same seeds and networks for both sides."""
    rng = np.random.default_rng(6)
    label = rng.random(60)
    ours, theirs = (label + s * rng.normal(size=(2, 60)) for s in (0.2, 0.4))
    found = paired(resampled, ours, theirs, label, seed=3, resamples=50)
    again = np.random.default_rng(3)
    counts = again.multinomial(60, np.full(60, 1 / 60), size=50)
    drawn = again.multinomial(2, [0.5, 0.5], size=50)
    gaps = []
    for c, d in zip(counts, drawn, strict=True):
        rows = np.repeat(np.arange(60), c)
        each = [
            tau(a[rows], label[rows]) - tau(b[rows], label[rows])
            for a, b in zip(ours, theirs, strict=True)
        ]
        gaps.append(np.dot(each, d) / 2)
    assert np.allclose(found[1:], np.quantile(gaps, [0.025, 0.975]), atol=1e-9)


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
