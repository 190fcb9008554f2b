"""Masks have the shares of the paper, and are a function of seed, epoch, row and position alone."""

from typing import Any

import numpy as np
import pytest

from babybert.data.masking import INCREMENT, mask_tokens, random_uniform, splitmix64
from babybert.data.tokenizer import CLS, FIRST_ORDINARY, MASK, SEP, UNK

VOCABULARY = 1000
ROWS = 4000
LENGTH = 50
Rows = tuple[np.ndarray, np.ndarray]  # ids and offsets


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Rows of 50 tokens: so long that hardly any row has no token below the share."""
    ids = np.random.default_rng(0).integers(FIRST_ORDINARY, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    ids[:, 0] = CLS
    ids[:, 10] = UNK
    ids[:, 25] = SEP
    ids[:, -1] = SEP
    return ids.ravel(), np.arange(0, ROWS * LENGTH + 1, LENGTH)


def mask(
    ids: np.ndarray, offsets: np.ndarray, seed: int = 0, epoch: int = 0, first_row: int = 0, **settings: Any
) -> tuple[np.ndarray, np.ndarray]:
    rows = np.arange(first_row, first_row + len(offsets) - 1)
    return mask_tokens(ids, offsets, VOCABULARY, seed, epoch, rows, **settings)


def is_close(share: float, expected: float, count: int) -> bool:
    """Within five standard deviations of a binomial: a correct implementation fails for one seed in two million."""
    return bool(abs(share - expected) < 5 * (expected * (1 - expected) / count) ** 0.5)


@pytest.mark.parametrize(("settings", "share"), [({}, 0.15), ({"share": 0.4}, 0.4)])
def test_shares_are_those_of_the_paper_or_of_the_caller(rows: Rows, settings: dict[str, Any], share: float) -> None:
    ids, offsets = rows
    masked, labels = mask(ids, offsets, seed=0, **settings)
    ordinary = ids >= FIRST_ORDINARY
    chosen = labels > 0
    count = int(ordinary.sum())
    forced = (1 - share) ** 46 * ROWS / count  # rows without a token below the share get one
    assert abs(chosen[ordinary].mean() - share - forced) < 5 * (share * (1 - share) / count) ** 0.5
    replaced = masked[chosen]
    assert is_close((replaced == MASK).mean(), 0.8, chosen.sum())
    ordinary_tokens = VOCABULARY - FIRST_ORDINARY
    kept = (replaced == ids[chosen]).mean()
    assert is_close(kept, 0.1 + 0.1 / ordinary_tokens, chosen.sum())
    random_ids = replaced[(replaced != MASK) & (replaced != ids[chosen])]
    assert random_ids.min() >= FIRST_ORDINARY
    assert random_ids.max() < VOCABULARY
    lower_half = (VOCABULARY // 2 - FIRST_ORDINARY) / ordinary_tokens
    assert is_close((random_ids < VOCABULARY // 2).mean(), lower_half, len(random_ids))


def test_only_chosen_tokens_change_and_labels_hold_the_originals(rows: Rows) -> None:
    ids, offsets = rows
    masked, labels = mask(ids, offsets, seed=0)
    assert (masked[labels == 0] == ids[labels == 0]).all()
    assert (labels[labels > 0] == ids[labels > 0]).all()
    assert (labels[ids < FIRST_ORDINARY] == 0).all()


def test_whole_word_masking_chooses_the_pieces_of_a_word_together(rows: Rows) -> None:
    ids, offsets = rows
    continues_V = np.arange(VOCABULARY) % 3 == 0
    continues_V[:FIRST_ORDINARY] = False
    masked, labels = mask(ids, offsets, continues_V=continues_V)
    chosen = (labels > 0).reshape(ROWS, LENGTH)
    continues = continues_V[ids].reshape(ROWS, LENGTH)
    ordinary = (ids >= FIRST_ORDINARY).reshape(ROWS, LENGTH)
    inside = continues[:, 1:] & ordinary[:, :-1]  # a piece whose word starts before it, with an ordinary token
    assert (chosen[:, 1:] == chosen[:, :-1])[inside].all()
    starts = ordinary & ~continues
    others = chosen[:, 1:] != chosen[:, :-1]
    assert others[starts[:, 1:]].any()  # but words are chosen one by one
    assert is_close(chosen[starts].mean(), 0.15, int(starts.sum()))
    assert is_close((masked[labels > 0] == MASK).mean(), 0.8, int(chosen.sum()))  # drawn for each piece


def test_whole_word_masking_changes_nothing_without_pieces(rows: Rows) -> None:
    ids, offsets = rows
    assert all(map(np.array_equal, mask(ids, offsets), mask(ids, offsets, continues_V=np.zeros(VOCABULARY, bool))))


def test_every_row_has_a_target() -> None:
    ids = np.tile(np.array([CLS, 7, SEP, 8, SEP], np.int32), 500)
    _, labels = mask(ids, np.arange(0, 2501, 5), seed=0)
    assert (labels.reshape(500, 5) > 0).any(1).all()


def test_a_rows_masks_do_not_depend_on_the_other_rows(rows: Rows) -> None:
    ids, offsets = rows
    all_rows = mask(ids, offsets, seed=3, epoch=2)
    some_rows = mask(ids[100 * LENGTH : 200 * LENGTH], offsets[:101], seed=3, epoch=2, first_row=100)
    for of_all, of_some in zip(all_rows, some_rows, strict=True):
        assert (of_all[100 * LENGTH : 200 * LENGTH] == of_some).all()


def test_rows_in_any_order_get_the_same_masks(rows: Rows) -> None:
    ids, offsets = rows
    all_rows, _ = mask(ids, offsets, seed=3)
    chosen = np.array([7, 3999, 0])
    some_rows, _ = mask_tokens(ids.reshape(ROWS, LENGTH)[chosen].ravel(), offsets[:4], VOCABULARY, 3, 0, chosen)
    assert (some_rows.reshape(3, LENGTH) == all_rows.reshape(ROWS, LENGTH)[chosen]).all()


def test_seed_and_epoch_change_the_masks(rows: Rows) -> None:
    ids, offsets = rows
    first = mask(ids, offsets, seed=0, epoch=0)[1] > 0
    for seed, epoch in ((1, 0), (0, 1)):
        other = mask(ids, offsets, seed=seed, epoch=epoch)[1] > 0
        both = (first & other).mean() / first.mean()
        assert 0.13 < both < 0.17  # as if drawn anew


def test_numbers_are_uniform_and_streams_independent() -> None:
    row, position = np.repeat(np.arange(1000), 100), np.tile(np.arange(100), 1000)
    one, two = (random_uniform(0, 0, row, position, stream) for stream in (0, 1))
    assert abs(one.mean() - 0.5) < 5 * (1 / 12 / 100_000) ** 0.5
    assert np.abs(np.histogram(one, 10, (0, 1))[0] - 10_000).max() < 500
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.02
    assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 0.02


def test_the_hash_is_splitmix64() -> None:
    """The first numbers of the published generator with the seed 1234567, whose state grows by the increment."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    states = [1234567 + step * INCREMENT for step in range(3)]
    assert [splitmix64(state) % 2**64 for state in states] == expected
    hashes = splitmix64(1234567 + np.arange(3) * INCREMENT)  # wraps around
    assert [number % 2**64 for number in hashes.tolist()] == expected


def test_masks_stay_the_same() -> None:
    """Golden values: with other masks, the same seed would prepare other data and train another model."""
    ids = np.arange(FIRST_ORDINARY, FIRST_ORDINARY + 20, dtype=np.int32)
    masked, labels = mask(ids, np.array([0, 12, 20]), seed=11, epoch=3, share=0.4)
    assert masked.tolist() == [69, 6, 3, 8, 9, 3, 11, 12, 13, 14, 3, 16, 17, 18, 19, 3, 21, 22, 3, 24]
    assert labels.tolist() == [5, 0, 7, 8, 0, 10, 0, 0, 0, 0, 15, 0, 0, 0, 0, 20, 0, 0, 23, 0]
