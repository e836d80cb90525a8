"""Bootstrap intervals over networks, for one score or for the difference of two on the same
networks."""

from __future__ import annotations

from collections.abc import Callable

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
    metric: Metric,
    ours: np.ndarray,
    theirs: np.ndarray,
    label: np.ndarray,
    seed: int = 0,
    resamples: int = 1000,
) -> tuple[float, float, float]:
    """(difference, low, high): metric of `ours` minus that of `theirs`, averaged over seeds.

    `ours` and `theirs` are (seeds, n) predictions of the same networks; both the seeds and the
    networks are resampled, so the interval speaks of new seeds and new networks. NaN where the
    metric of some run is no number (tau of a constant answer).
    """
    seeds = len(ours)

    def difference(a: np.ndarray, b: np.ndarray, rows: np.ndarray) -> float:
        each = [
            metric(x[rows], label[rows]) - metric(y[rows], label[rows])
            for x, y in zip(a, b, strict=True)
        ]
        return float(np.mean(each))

    rng = np.random.default_rng(seed)

    def resampled(rows: np.ndarray) -> float:
        pick = rng.integers(seeds, size=seeds)
        return difference(ours[pick], theirs[pick], rows)

    found = difference(ours, theirs, np.arange(len(label)))
    if np.isnan(found):
        return found, found, found
    return found, *_bootstrap(resampled, len(label), seed, resamples)


def over_seeds(
    many: Many, predictions: np.ndarray, label: np.ndarray, seed: int = 0, resamples: int = 1000
) -> tuple[float, float, float]:
    """(score, low, high): the score averaged over seeds, with its 95 % percentile interval.

    `predictions` are (seeds, n); both the seeds and the networks are resampled. `many` is
    many(prediction (n,), label (n,), counts (r, n)) -> (r,): the scores of r resamples that hold
    each network so many times. NaN where some seed's score is no number.
    """
    seeds, n = predictions.shape
    once = np.ones((1, n))
    found = float(np.mean([many(p, label, once)[0] for p in predictions]))
    if np.isnan(found):
        return found, found, found
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
    drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    each = np.stack([many(p, label, counts) for p in predictions], axis=1)
    low, high = np.nanquantile((each * drawn).sum(axis=1) / seeds, [0.025, 0.975])
    return found, float(low), float(high)
