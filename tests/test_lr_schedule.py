"""The learning rate of each step."""

import pytest

from babybert.training.lr_schedule import learning_rate


def test_the_rate_rises_to_the_peak_and_falls_to_zero() -> None:
    rates = [learning_rate(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 0.03
    assert learning_rate(100, 100, 2.0, 0.1) == 0


@pytest.mark.parametrize("warmup", [0.0, 1.0, 0.001])
@pytest.mark.parametrize("total", [1, 2, 7])
def test_short_runs_have_positive_rates(warmup: float, total: int) -> None:
    assert all(0 < learning_rate(step, total, 1.0, warmup) <= 1 for step in range(total))


def test_the_rate_between_two_steps_is_not_above_the_peak() -> None:
    assert learning_rate(9.5, 100, 2.0, 0.1) == 2.0


def test_cosine_and_constant_schedules() -> None:
    cosine = [learning_rate(step, 100, 2.0, 0.1, "cosine") for step in range(101)]
    assert cosine[10] == 2.0
    assert cosine[55] == pytest.approx(1.0)
    assert cosine[100] == 0
    assert cosine[10:] == sorted(cosine[10:], reverse=True)
    assert {learning_rate(step, 100, 2.0, 0.1, "constant") for step in range(10, 100)} == {2.0}
