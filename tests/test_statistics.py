"""Scores and their bootstrap intervals against scikit-learn, theory and values by hand."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from babybert.evaluation.statistics import auc_of, bootstrap, calibration_bins, calibration_error_of, mean_of


@pytest.mark.parametrize("digits", [1, 8])
def test_auc_is_that_of_scikit_learn_with_ties_and_weights(digits: int) -> None:
    rng = np.random.default_rng(0)
    score = rng.random(200).round(digits)
    positive = (rng.random(200) < 0.3 + 0.4 * score).astype(int)
    weight = rng.integers(0, 4, 200).astype(float)
    assert auc_of(score, positive)(weight) == pytest.approx(roc_auc_score(positive, score, sample_weight=weight))


def test_auc_of_one_class_is_not_defined() -> None:
    assert np.isnan(auc_of(np.array([0.1, 0.9]), np.ones(2))(np.ones(2)))


def test_calibration_by_hand() -> None:
    probability, positive = np.array([0.05, 0.15, 0.12, 0.95, 1.0]), np.array([0, 1, 0, 1, 1])
    # Bins: one pair (0.05 against 0), two (0.135 against 0.5), two (0.975 against 1).
    expected = (0.05 + 2 * 0.365 + 2 * 0.025) / 5
    assert calibration_error_of(probability, positive)(np.ones(5)) == pytest.approx(expected)
    bins = calibration_bins(probability, positive)
    assert [part["pairs"] for part in bins] == [1, 2, 2]
    assert sum(part["pairs"] * abs(part["probability"] - part["share"]) for part in bins) / 5 == pytest.approx(expected)


def test_the_interval_of_a_mean_is_the_theoretical_one() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    intervals = bootstrap({"mean": mean_of(values), "zero": mean_of(np.zeros(400))}, 400)
    error = values.std() / 20
    assert intervals["mean"].value == pytest.approx(values.mean())
    assert intervals["mean"].low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert intervals["mean"].high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    assert (intervals["zero"].low, intervals["zero"].high) == (0, 0)
    assert bootstrap({"mean": mean_of(values)}, 400) == {"mean": intervals["mean"]}  # the seed is fixed


def test_a_ratio_is_of_sums_not_a_mean_of_ratios() -> None:
    statistic = mean_of(np.array([10.0, 1.0]), np.array([5, 1]))
    assert statistic(np.array([1.0, 1.0])) == pytest.approx(11 / 6)
    assert statistic(np.array([1.0, 3.0])) == pytest.approx(13 / 8)
    assert np.isnan(mean_of(np.zeros(2), np.zeros(2))(np.ones(2)))


def test_resamples_without_a_value_do_not_count_for_the_interval() -> None:
    auc = bootstrap({"auc": auc_of(np.array([0.1, 0.9]), np.array([0, 1]))}, 2)["auc"]
    assert (auc.value, auc.low, auc.high) == (1, 1, 1)
