"""The steps of a run, their pairs, and the share of the run that is done, when the batch size changes and when not."""

import itertools
from typing import NamedTuple

import pytest

from babybert.checkpoint.format import TrainState
from babybert.data.epoch_order import BatchSpan
from babybert.training.lr_schedule import learning_rate
from babybert.training.plan import TrainingPlan

PAIRS = 220


class Steps(NamedTuple):
    """What some steps of a simulated run did: pairs, and share of the run done before, one per step."""

    pairs: list[int]
    shares: list[float]


def simulate(state: TrainState, batch_size: int, epochs: int, max_steps: int | None, steps: int) -> Steps:
    """Advance `state` by at most `steps` steps, one by one, as the loop does. The batches come from a list."""
    plan = TrainingPlan(PAIRS, batch_size, epochs, max_steps, TrainState(**vars(state)))
    done = Steps([], [])
    for _ in range(min(steps, plan.total_steps - state.step)):
        assert plan.position(state.step) == (state.epoch, state.batch, state.earlier_spans)
        left = PAIRS - sum(span.pairs for span in state.earlier_spans) - state.batch * batch_size
        done.pairs.append(min(batch_size, left))
        done.shares.append(plan.share_done(state.step))
        assert plan.pairs_of(state.step) == done.pairs[-1]
        state.step += 1
        state.batch += 1
        if done.pairs[-1] == left:
            state.epoch, state.batch, state.earlier_spans = state.epoch + 1, 0, []
    return done


def change_batch_size(state: TrainState, batch_size: int) -> None:
    if state.batch:
        state.earlier_spans = [*state.earlier_spans, BatchSpan(batch_size, True, state.batch)]
        state.batch = 0


@pytest.mark.parametrize("max_steps", [None, 1, 5, 28, 30, 1000])
@pytest.mark.parametrize("batch_size", [1, 7, 8, 73, 220, 500])
def test_without_a_change_the_schedule_counts_steps(batch_size: int, max_steps: int | None) -> None:
    plan = TrainingPlan(PAIRS, batch_size, 3, max_steps, TrainState())
    per_epoch = -(-PAIRS // batch_size)
    total = min(3 * per_epoch, max_steps or 3 * per_epoch)
    assert plan.total_steps == total
    assert plan.total_pairs == sum(simulate(TrainState(), batch_size, 3, max_steps, total).pairs)
    for step in range(total + 1):
        assert plan.schedule_step(step) == (step, total)
        assert plan.share_done(step) == step / total
        assert learning_rate(*plan.schedule_step(step), 5e-3, 0.1) == learning_rate(step, total, 5e-3, 0.1)


@pytest.mark.parametrize("cuts", [(5, 3), (28, 1), (27, 0), (1, 40), (30, 30)])
@pytest.mark.parametrize("sizes", [(8, 7, 32), (32, 1, 8), (8, 220, 3), (73, 8, 73)])
def test_epochs_are_passes_and_the_schedule_goes_on(sizes: tuple[int, int, int], cuts: tuple[int, int]) -> None:
    """The pairs trained are those of four passes. The share never falls, and ends at 1."""
    state = TrainState()
    parts = []
    for batch_size, steps in zip(sizes, (*cuts, 10_000), strict=True):
        parts.append(simulate(state, batch_size, 4, None, steps))
        change_batch_size(state, batch_size)
    assert sum(sum(part.pairs) for part in parts) == 4 * PAIRS
    assert (state.epoch, state.batch) == (4, 0)
    shares = [share for part in parts for share in part.shares] + [1.0]
    assert shares == sorted(shares)
    trained = [0, *itertools.accumulate(pairs for part in parts for pairs in part.pairs)]
    largest_step = max(sizes) / (4 * PAIRS)
    for share, pairs in zip(shares, trained, strict=True):
        assert share == pytest.approx(pairs / (4 * PAIRS), abs=largest_step)


def test_after_the_epoch_of_a_change_the_schedule_is_that_of_the_new_batch_size() -> None:
    state = TrainState()
    simulate(state, 8, 4, None, 10)
    change_batch_size(state, 8)
    simulate(state, 20, 4, None, 7)  # 220 = 10 * 8 + 7 * 20
    assert (state.epoch, state.batch) == (1, 0)
    changed = simulate(state, 20, 4, None, 1000).shares
    assert changed == simulate(TrainState(), 20, 4, None, 1000).shares[11:]


def test_max_steps_counts_steps_of_any_size() -> None:
    state = TrainState()
    before = simulate(state, 8, 100, 60, 30)
    change_batch_size(state, 8)
    after = simulate(state, 32, 100, 60, 1000)
    assert state.step == 60
    assert [*before.shares, *after.shares] == [step / 60 for step in range(60)]


def test_the_schedule_goes_on_if_now_the_epochs_end_the_run_instead_of_max_steps() -> None:
    """At half of 60 steps, the batch becomes so large that the epochs end before the steps do."""
    state = TrainState()
    shares = simulate(state, 8, 4, 60, 30).shares
    change_batch_size(state, 8)
    shares += simulate(state, 100, 4, 60, 1000).shares
    assert (state.epoch, state.batch, state.step) == (4, 0, 30 + 3 + 2 * 3)
    assert shares == sorted(shares)
    assert max(later - earlier for earlier, later in itertools.pairwise([*shares, 1.0])) < 0.15


def test_the_rate_goes_on_and_does_not_exceed_the_peak() -> None:
    for cut, new_size in itertools.product(range(1, 110), (3, 7, 32, 100)):
        state = TrainState()
        simulate(state, 8, 4, None, cut)
        change_batch_size(state, 8)
        old = TrainingPlan(PAIRS, 8, 4, None, TrainState())
        new = TrainingPlan(PAIRS, new_size, 4, None, state)
        last_rate = learning_rate(*old.schedule_step(cut - 1), 1.0, 0.1)
        rates = [learning_rate(*new.schedule_step(step), 1.0, 0.1) for step in range(cut, new.total_steps)]
        assert max(rates) <= 1
        if cut < 11:  # in the warm-up
            assert rates[0] > last_rate - 0.02
        else:
            assert rates[0] == pytest.approx(last_rate, abs=0.04 + new_size / (4 * PAIRS))


def test_a_run_whose_epochs_are_done_has_no_steps_left() -> None:
    state = TrainState(step=70, epoch=2, batch=14)
    plan = TrainingPlan(PAIRS, 8, 2, None, state)
    assert plan.total_steps == 70
    assert plan.total_pairs == 2 * PAIRS + 14 * 8
