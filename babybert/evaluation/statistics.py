"""Scores of predictions with bootstrap confidence intervals.

A statistic is a function of the pairs' weights. The bootstrap (Efron, 1979) then need not copy any predictions: a
resample is how often it draws each pair. Intervals are percentiles over the resamples. They show how far the choice of
held-out pairs matters, not how far another training run would differ.

Cost: each resample evaluates every statistic once, which reads one or two numbers for each pair.

Shapes: P pairs (or documents), R resamples, S statistics.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
MOST_RESAMPLES = 1000
FEWEST_RESAMPLES = 100
# Bounds resamples x pairs: above 100,000 pairs fewer resamples are drawn.
MOST_DRAWS = 10**8
CALIBRATION_BINS = 10

Statistic = Callable[[np.ndarray], float]  # of the weights (P, float64)


@dataclass(frozen=True)
class Interval:
    """The value of a statistic, and the range that holds LEVEL of its resamples."""

    value: float
    low: float
    high: float


def mean_of(sum_P: np.ndarray, count_P: np.ndarray | None = None) -> Statistic:
    """The mean over items of which each pair has a sum and a count (1 by default); NaN where there are no items."""
    items_P = np.ones(len(sum_P)) if count_P is None else count_P.astype(float)

    def statistic(weight_P: np.ndarray) -> float:
        items = float(weight_P @ items_P)
        return float(weight_P @ sum_P) / items if items else float("nan")

    return statistic


def auc_of(score_P: np.ndarray, positive_P: np.ndarray) -> Statistic:
    """The area under the ROC curve (Hanley and McNeil, 1982); NaN where one of the classes is missing.

    It is the probability that a positive pair scores above a negative one, where ties count half.
    """
    order = np.argsort(score_P, kind="stable")
    sorted_positive_P = positive_P[order].astype(float)
    # Where each group of equal scores begins.
    first = np.flatnonzero(np.append(True, np.diff(score_P[order]) > 0))

    def statistic(weight_P: np.ndarray) -> float:
        sorted_weight_P = weight_P[order]
        positives = np.add.reduceat(sorted_weight_P * sorted_positive_P, first)
        negatives = np.add.reduceat(sorted_weight_P * (1 - sorted_positive_P), first)
        negatives_below = np.cumsum(negatives) - negatives
        comparisons = positives.sum() * negatives.sum()
        return float(positives @ (negatives_below + negatives / 2) / comparisons) if comparisons else float("nan")

    return statistic


def calibration_error_of(probability_P: np.ndarray, positive_P: np.ndarray) -> Statistic:
    """Expected calibration error (Naeini et al., 2015).

    The gap between a bin's mean probability and its share of positive pairs, averaged over bins by their pairs.
    """
    bin_P = _bin_of(probability_P)
    gap_P = probability_P - positive_P

    def statistic(weight_P: np.ndarray) -> float:
        gap_sums = np.bincount(bin_P, weight_P * gap_P, CALIBRATION_BINS)
        return float(np.abs(gap_sums).sum() / weight_P.sum())

    return statistic


def calibration_bins(probability_P: np.ndarray, positive_P: np.ndarray) -> list[dict[str, float]]:
    """The non-empty bins of the calibration error: bounds, pairs, mean probability and share of positives."""
    bin_P = _bin_of(probability_P)
    bins = []
    for index in range(CALIBRATION_BINS):
        in_bin_P = bin_P == index
        if in_bin_P.any():
            bins.append(
                {
                    "from": index / CALIBRATION_BINS,
                    "to": (index + 1) / CALIBRATION_BINS,
                    "pairs": int(in_bin_P.sum()),
                    "probability": float(probability_P[in_bin_P].mean()),
                    "share": float(positive_P[in_bin_P].mean()),
                }
            )
    return bins


def _bin_of(probability_P: np.ndarray) -> np.ndarray:
    """Which of equally wide bins each probability falls into; 1.0 belongs to the last."""
    return np.minimum((probability_P * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)


def bootstrap(statistics: dict[str, Statistic], pairs: int, seed: int = 0) -> dict[str, Interval]:
    """Each statistic over all `pairs` (or documents), with its interval. All statistics see the same resamples.

    A resample in which a statistic is NaN (one that drew no positive pair, say) does not count for its interval.
    """
    rng = np.random.default_rng(seed)
    value_RS = np.empty((resample_count(pairs), len(statistics)))
    for value_S in value_RS:
        weight_P = np.bincount(rng.integers(pairs, size=pairs), minlength=pairs).astype(float)
        value_S[:] = [statistic(weight_P) for statistic in statistics.values()]
    all_once_P = np.ones(pairs)
    return {
        name: percentile_interval(statistic(all_once_P), value_R)
        for (name, statistic), value_R in zip(statistics.items(), value_RS.T, strict=True)
    }


def resample_count(pairs: int) -> int:
    """How many resamples of `pairs` pairs are drawn."""
    return int(np.clip(MOST_DRAWS // max(pairs, 1), FEWEST_RESAMPLES, MOST_RESAMPLES))


def percentile_interval(value: float, value_R: np.ndarray) -> Interval:
    """The range that holds LEVEL of the resampled values, without those that are NaN."""
    tail = 100 * (1 - LEVEL) / 2
    defined = value_R[~np.isnan(value_R)]
    low, high = np.percentile(defined, [tail, 100 - tail]) if len(defined) else (float("nan"), float("nan"))
    return Interval(value, float(low), float(high))


def resampled_means(value_PS: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """The means (R, S) over the pairs of each resample."""
    pairs = len(value_PS)
    return np.stack([value_PS[rng.integers(pairs, size=pairs)].mean(0) for _ in range(resamples)])
