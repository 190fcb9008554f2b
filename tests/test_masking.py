import numpy as np
import pytest

from babybert.data.masking import mask_tokens, random_uniform
from babybert.data.tokenizer import CLS, FIRST_ORDINARY, MASK, SEP, UNK

VOCABULARY = 1000
ROWS, LENGTH = 4000, 50


@pytest.fixture(scope="module")
def rows():
    """Rows of 50 tokens, long enough that hardly one needs its one token by force."""
    ids = np.random.default_rng(0).integers(FIRST_ORDINARY, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    ids[:, 0], ids[:, 25], ids[:, -1], ids[:, 10] = CLS, SEP, SEP, UNK
    return ids.ravel(), np.arange(0, ROWS * LENGTH + 1, LENGTH)


def mask(ids, offsets, seed=0, epoch=0, first_row=0, **given):
    return mask_tokens(
        ids, offsets, VOCABULARY, seed, epoch, np.arange(first_row, first_row + len(offsets) - 1), **given
    )


def within(share, expected, count):
    """Five standard deviations of a binomial: a right implementation fails one seed in two million."""
    return abs(share - expected) < 5 * (expected * (1 - expected) / count) ** 0.5


@pytest.mark.parametrize(("given", "share"), [({}, 0.15), ({"share": 0.4}, 0.4)])
def test_shares_are_those_of_the_paper_or_as_told(rows, given, share):
    ids, offsets = rows
    masked, labels = mask(ids, offsets, seed=0, **given)
    ordinary, chosen = ids >= FIRST_ORDINARY, labels > 0
    count = int(ordinary.sum())
    forced = (1 - share) ** 46 * ROWS / count  # rows in which none came up get one
    assert abs(chosen[ordinary].mean() - share - forced) < 5 * (share * (1 - share) / count) ** 0.5
    drawn = masked[chosen]
    assert within((drawn == MASK).mean(), 0.8, chosen.sum())
    kept = (drawn == ids[chosen]).mean()
    assert within(kept, 0.1 + 0.1 / (VOCABULARY - FIRST_ORDINARY), chosen.sum())
    replaced = drawn[(drawn != MASK) & (drawn != ids[chosen])]
    assert replaced.min() >= FIRST_ORDINARY
    assert replaced.max() < VOCABULARY
    assert within(
        (replaced < VOCABULARY // 2).mean(),
        (VOCABULARY // 2 - FIRST_ORDINARY) / (VOCABULARY - FIRST_ORDINARY),
        len(replaced),
    )


def test_only_chosen_tokens_change_and_labels_hold_the_originals(rows):
    ids, offsets = rows
    masked, labels = mask(ids, offsets, seed=0)
    assert (masked[labels == 0] == ids[labels == 0]).all()
    assert (labels[labels > 0] == ids[labels > 0]).all()
    assert (labels[ids < FIRST_ORDINARY] == 0).all()


def test_every_row_has_a_target():
    ids = np.tile(np.array([CLS, 7, SEP, 8, SEP], np.int32), 500)
    _, labels = mask(ids, np.arange(0, 2501, 5), seed=0)
    assert (labels.reshape(500, 5) > 0).any(1).all()


def test_a_rows_masks_do_not_depend_on_the_rows_beside_it(rows):
    ids, offsets = rows
    whole = mask(ids, offsets, seed=3, epoch=2)
    part = mask(ids[100 * LENGTH : 200 * LENGTH], offsets[:101], seed=3, epoch=2, first_row=100)
    for all_rows, some in zip(whole, part, strict=True):
        assert (all_rows[100 * LENGTH : 200 * LENGTH] == some).all()


def test_any_rows_in_any_order_get_their_own_masks(rows):
    ids, offsets = rows
    whole, _ = mask(ids, offsets, seed=3)
    chosen = np.array([7, 3999, 0])
    some, _ = mask_tokens(ids.reshape(ROWS, LENGTH)[chosen].ravel(), offsets[:4], VOCABULARY, 3, 0, chosen)
    assert (some.reshape(3, LENGTH) == whole.reshape(ROWS, LENGTH)[chosen]).all()


def test_seed_and_epoch_change_the_masks(rows):
    ids, offsets = rows
    first = mask(ids, offsets, seed=0, epoch=0)[1] > 0
    for seed, epoch in ((1, 0), (0, 1)):
        other = mask(ids, offsets, seed=seed, epoch=epoch)[1] > 0
        both = (first & other).mean() / first.mean()
        assert 0.13 < both < 0.17  # as if drawn anew


def test_numbers_are_uniform_and_streams_independent():
    row, position = np.repeat(np.arange(1000), 100), np.tile(np.arange(100), 1000)
    one, two = (random_uniform(0, 0, row, position, stream) for stream in (0, 1))
    assert abs(one.mean() - 0.5) < 5 * (1 / 12 / 100_000) ** 0.5
    assert np.abs(np.histogram(one, 10, (0, 1))[0] - 10_000).max() < 500
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.02
    assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 0.02
