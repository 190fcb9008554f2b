"""The order of an epoch: each pair once, however often the batch size changes within the epoch."""

import itertools

import numpy as np
import pytest

from babybert.data.epoch_order import BatchSpan, batches_of, epoch_order, pairs_in_spans

PAIRS = 43
LENGTHS = np.random.default_rng(1).integers(5, 60, PAIRS)
SIZES = (1, 3, 8, 20, PAIRS, 100)


def taken(batch_size: int, bucketing: bool, batches: int, spans: list[BatchSpan]) -> list[int]:
    """The pairs of the next `batches` batches after `spans`."""
    order = epoch_order(LENGTHS, 7, 2, batch_size, bucketing, spans)
    return [int(row) for row in order[: batches * batch_size]]


def positions(pairs: int, batch_size: int) -> range:
    """How many batches an epoch can have had before a change: at least one, and some pairs are left."""
    return range(1, batches_of(pairs, batch_size))


@pytest.mark.parametrize("bucketing", [(True, True, True), (False, False, False), (True, False, True)])
def test_after_two_changes_at_any_position_each_pair_comes_once(bucketing: tuple[bool, bool, bool]) -> None:
    every_pair = list(range(PAIRS))
    for sizes in itertools.permutations(SIZES, 3):
        for first_batches in positions(PAIRS, sizes[0]):
            first = BatchSpan(sizes[0], bucketing[0], first_batches)
            seen = taken(sizes[0], bucketing[0], first_batches, [])
            assert sorted(seen + taken(sizes[1], bucketing[1], PAIRS, [first])) == every_pair
            for second_batches in list(positions(PAIRS - first.pairs, sizes[1]))[::5]:
                second = BatchSpan(sizes[1], bucketing[1], second_batches)
                seen_twice = seen + taken(sizes[1], bucketing[1], second_batches, [first])
                assert len(seen_twice) == pairs_in_spans([first, second])
                rest = taken(sizes[2], bucketing[2], PAIRS, [first, second])
                assert sorted(seen_twice + rest) == every_pair


def test_without_bucketing_the_next_pairs_do_not_depend_on_the_batch_size() -> None:
    order = epoch_order(LENGTHS, 7, 2, 8, False)
    spans = [BatchSpan(8, False, 2), BatchSpan(5, False, 3)]
    assert epoch_order(LENGTHS, 7, 2, 20, False, spans).tolist() == order[31:].tolist()


def test_the_pairs_that_are_left_are_bucketed_again() -> None:
    order = epoch_order(LENGTHS, 7, 2, 4, True, [BatchSpan(8, True, 1)])
    full_batches = LENGTHS[order[:32]].reshape(-1, 4)
    assert len(order) == 35
    ranges = np.sort(np.stack([full_batches.min(1), full_batches.max(1)], axis=1), axis=0)
    assert (ranges[1:, 0] >= ranges[:-1, 1]).all()  # the batches of one pool do not overlap
    starts = full_batches.min(1).tolist()
    assert starts != sorted(starts)
