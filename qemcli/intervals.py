"""Bootstrap intervals over networks, for one score or for the difference of two on the same
networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Metric = Callable[[np.ndarray, np.ndarray], float]
Many = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def _bootstrap(
    statistic: Callable[..., float], n: int, seed: int, resamples: int
) -> tuple[float, float]:
    from scipy.stats import bootstrap

    result = bootstrap(
        (np.arange(n),),
        lambda rows: statistic(rows),
        n_resamples=resamples,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def interval(
    metric: Metric, prediction: np.ndarray, label: np.ndarray, seed: int = 0, resamples: int = 1000
) -> tuple[float, float]:
    """95 % percentile interval of metric(prediction, label), resampling networks."""
    return _bootstrap(lambda r: metric(prediction[r], label[r]), len(label), seed, resamples)


def paired(
    many: Many,
    ours: np.ndarray,
    theirs: np.ndarray,
    label: np.ndarray,
    seed: int = 0,
    resamples: int = 1000,
) -> tuple[float, float, float]:
    """(difference, low, high): the score of `ours` minus that of `theirs`, averaged over seeds.

    `ours` and `theirs` are (seeds, n, ...) predictions of the same networks; both the seeds and the
    networks are resampled, the same for both, so the interval speaks of new seeds and new networks.
    `many` as in `over_seeds`. NaN where the score of some run is no number (tau of a constant
    answer).
    """
    found, drawn, counts = _drawn(many, [*ours, *theirs], label, len(ours), seed, resamples)
    gap = float(np.mean(found[: len(ours)] - found[len(ours) :]))
    if np.isnan(gap):
        return gap, gap, gap
    a, b = (_each(many, predictions, label, counts) for predictions in (ours, theirs))
    return gap, *_percentiles((a - b) * drawn, len(ours))


def over_seeds(
    many: Many, predictions: np.ndarray, label: np.ndarray, seed: int = 0, resamples: int = 1000
) -> tuple[float, float, float]:
    """(score, low, high): the score averaged over seeds, with its 95 % percentile interval.

    `predictions` are (seeds, n, ...); both the seeds and the networks are resampled. `many` is
    many(prediction (n, ...), label (n,), counts (r, n)) -> (r,): the scores of r resamples that
    hold each network so many times. NaN where some seed's score is no number.
    """
    each, drawn, counts = _drawn(many, predictions, label, len(predictions), seed, resamples)
    found = float(np.mean(each))
    if np.isnan(found):
        return found, found, found
    return found, *_percentiles(_each(many, predictions, label, counts) * drawn, len(predictions))


def _drawn(
    many: Many,
    predictions: Sequence[np.ndarray] | np.ndarray,
    label: np.ndarray,
    seeds: int,
    seed: int,
    resamples: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(the score of each prediction, how often each resample holds each seed (r, seeds), and each
    network (r, n))."""
    n, rng = len(label), np.random.default_rng(seed)
    each = np.array([many(p, label, np.ones((1, n), dtype=np.int64))[0] for p in predictions])
    counts = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
    drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    return each, drawn, counts


def _each(many: Many, predictions: np.ndarray, label: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(r, seeds): the scores of the resamples."""
    return np.stack([many(p, label, counts) for p in predictions], axis=1)


def _percentiles(weighted: np.ndarray, seeds: int) -> tuple[float, float]:
    low, high = np.nanquantile(weighted.sum(axis=1) / seeds, [0.025, 0.975])
    return float(low), float(high)
