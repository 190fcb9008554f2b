"""Scores of predictions, and how far chance could have moved them.

Every function takes a weight for each pair, so that the bootstrap (Efron, 1979) need not copy anything: a resample is
how often it draws each pair. Intervals are percentiles over the resamples; what varies is the pairs, not the training.

Shapes: P pairs, R resamples, S statistics.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
MOST_DRAWS = (
    10**8
)  # resamples times pairs: with more pairs than 100,000 fewer resamples are made, though no fewer than 100
LEVEL = 0.95
BINS = 10

Statistic = Callable[[np.ndarray], float]  # of the weights (P)


@dataclass(frozen=True)
class Interval:
    """A value and the range that holds LEVEL of its resamples."""

    value: float
    low: float
    high: float


def mean_of(sum_P: np.ndarray, count_P: np.ndarray | None = None) -> Statistic:
    """The mean of what the pairs have sums and counts of (a count of one, if none is given); NaN without any."""
    counts = np.ones(len(sum_P)) if count_P is None else count_P.astype(float)

    def statistic(weight_P: np.ndarray) -> float:
        total = float(weight_P @ counts)
        return float(weight_P @ sum_P) / total if total else float("nan")

    return statistic


def auc_of(score_P: np.ndarray, positive_P: np.ndarray) -> Statistic:
    """The area under the ROC curve: how often a positive scores above a negative, ties half (Hanley and McNeil, 1982)."""
    order = np.argsort(score_P, kind="stable")
    positive = positive_P[order].astype(float)
    first = np.flatnonzero(np.append(True, np.diff(score_P[order]) > 0))

    def statistic(weight_P: np.ndarray) -> float:
        weight = weight_P[order]
        positives, negatives = (
            np.add.reduceat(weight * positive, first),
            np.add.reduceat(weight * (1 - positive), first),
        )
        below = np.cumsum(negatives) - negatives
        total = positives.sum() * negatives.sum()
        return float(positives @ (below + negatives / 2) / total) if total else float("nan")

    return statistic


def bin_of(probability_P: np.ndarray) -> np.ndarray:
    """Which of BINS equally wide bins each probability is in."""
    return np.minimum((probability_P * BINS).astype(np.int64), BINS - 1)


def calibration_error_of(probability_P: np.ndarray, positive_P: np.ndarray) -> Statistic:
    """Expected calibration error (Naeini et al., 2015): |share of positives - mean probability| over bins, weighted by their pairs."""
    bins, gap_P = bin_of(probability_P), probability_P - positive_P

    def statistic(weight_P: np.ndarray) -> float:
        return float(np.abs(np.bincount(bins, weight_P * gap_P, BINS)).sum() / weight_P.sum())

    return statistic


def calibration_bins(probability_P: np.ndarray, positive_P: np.ndarray) -> list[dict[str, float]]:
    """What the error is made of: of each bin that has pairs, how many, their mean probability and share of positives."""
    bins, found = bin_of(probability_P), []
    for number in range(BINS):
        own = bins == number
        if own.any():
            found.append(
                {
                    "from": number / BINS,
                    "to": (number + 1) / BINS,
                    "pairs": int(own.sum()),
                    "probability": float(probability_P[own].mean()),
                    "share": float(positive_P[own].mean()),
                }
            )
    return found


def bootstrap(statistics: dict[str, Statistic], units: int, seed: int = 0) -> dict[str, Interval]:
    """Each statistic of all `units` pairs (or documents), with its interval; the resamples are the same for all."""
    rng = np.random.default_rng(seed)
    resamples = int(np.clip(MOST_DRAWS // max(units, 1), 100, RESAMPLES))
    sample_RS = np.empty((resamples, len(statistics)))
    for row in sample_RS:
        weight_P = np.bincount(rng.integers(units, size=units), minlength=units).astype(float)
        row[:] = [statistic(weight_P) for statistic in statistics.values()]
    tail = 100 * (1 - LEVEL) / 2
    ones_P, found = np.ones(units), {}
    for (name, statistic), sample_R in zip(statistics.items(), sample_RS.T, strict=True):
        known = sample_R[~np.isnan(sample_R)]
        low, high = np.percentile(known, [tail, 100 - tail]) if len(known) else (float("nan"), float("nan"))
        found[name] = Interval(statistic(ones_P), float(low), float(high))
    return found
