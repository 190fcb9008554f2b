"""The interpolated bigram beside counting in dictionaries and going through the whole vocabulary."""

import itertools
from collections import Counter

import numpy as np
import pytest

from babybert.data.masking import mask_tokens
from babybert.data.table import Examples, concatenate
from babybert.data.tokenizer import CLS, FIRST_ORDINARY, MASK, PAD, SEP
from babybert.evaluation import bigram_baseline as bigram_module
from babybert.evaluation.bigram_baseline import BigramBaseline, NeighborCounts, Targets, _same_words_as_last, targets_of

VOCAB = 12


def make_examples(pairs, seed):
    """Random pairs in which each word likes the next number to follow."""
    rng = np.random.default_rng(seed)
    rows, segments = [], []
    for _ in range(pairs):
        words = [int(rng.integers(FIRST_ORDINARY, VOCAB - 1))]  # the last word is never seen
        for _ in range(int(rng.integers(3, 9))):
            follows = FIRST_ORDINARY + (words[-1] - FIRST_ORDINARY + 1) % (VOCAB - 1 - FIRST_ORDINARY)
            words.append(follows if rng.random() < 0.7 else int(rng.integers(FIRST_ORDINARY, VOCAB - 1)))
        half = len(words) // 2
        rows.append([CLS, *words[:half], SEP, *words[half:], SEP])
        segments += [1] * (half + 2) + [2] * (len(words) - half + 1)
    ids, offsets = np.concatenate(rows).astype(np.int32), np.cumsum([0, *map(len, rows)])
    masked, labels = mask_tokens(ids, offsets, VOCAB, seed, 0, np.arange(pairs))
    return Examples(masked, labels, np.array(segments, np.int8), offsets, np.ones(pairs, np.int8))


@pytest.fixture(scope="module")
def train():
    return make_examples(200, 0)


@pytest.fixture(scope="module")
def fitted(train):
    return BigramBaseline(train, train.token_counts(VOCAB))


def everything(fitted, targets, n):
    """Probabilities of all words in the place of target n (V)."""
    return fitted.probabilities(
        Targets(
            *(np.full(VOCAB, getattr(targets, name)[n]) for name in ("pair_N", "position_N")),
            np.arange(VOCAB),
            *(np.full(VOCAB, getattr(targets, name)[n]) for name in ("shown_N", "left_N", "right_N")),
        )
    )


def test_targets_are_the_chosen_tokens_with_what_is_shown_beside_them():
    examples = Examples(
        np.array([CLS, 7, MASK, SEP, 6, SEP, MASK, 9]),
        np.array([0, 0, 8, 0, 6, 0, 5, 0]),
        np.ones(8),
        np.array([0, 6, 8]),
        np.array([1, 0]),
    )
    found = targets_of(examples)
    assert found.pair_N.tolist() == [0, 0, 1]
    assert found.position_N.tolist() == [2, 4, 0]
    assert found.word_N.tolist() == [8, 6, 5]
    assert found.shown_N.tolist() == [MASK, 6, MASK]
    assert found.left_N.tolist() == [7, SEP, PAD]  # nothing from the pair before
    assert found.right_N.tolist() == [SEP, SEP, 9]


def test_probabilities_are_the_mixture_of_plain_counts(train, fitted):
    after, before, left_total, right_total = Counter(), Counter(), Counter(), Counter()
    original = train.original_ids().tolist()
    for p in range(len(train)):
        row = original[train.offsets[p] : train.offsets[p + 1]]
        for left, right in itertools.pairwise(row):
            if right >= FIRST_ORDINARY:
                after[left, right] += 1
                left_total[left] += 1
            if left >= FIRST_ORDINARY:
                before[right, left] += 1
                right_total[right] += 1

    def bucket(total):
        return min(len(str(total)), bigram_module.BUCKETS - 1) if total else 0

    counts = train.token_counts(VOCAB)
    held_out = targets_of(make_examples(40, 1))
    found = fitted.probabilities(held_out)
    for n in range(len(held_out)):
        word, left, right = (int(values[n]) for values in (held_out.word_N, held_out.left_N, held_out.right_N))
        shares = [(counts[word] + 1) / (counts.sum() + VOCAB)]
        for table, totals, neighbour in ((after, left_total, left), (before, right_total, right)):
            total = 0 if neighbour == MASK else totals[neighbour]
            shares.append(table[neighbour, word] / total if total else 0)
        left_seen, right_seen = (
            0 if neighbour == MASK else totals[neighbour]
            for neighbour, totals in ((left, left_total), (right, right_total))
        )
        assert found[n] == pytest.approx(np.dot(fitted.weights[bucket(left_seen), bucket(right_seen)], shares))


def test_probabilities_sum_to_one_and_ranks_are_those_of_going_through_all_words(fitted):
    held_out = targets_of(make_examples(60, 2))
    assert (held_out.left_N == MASK).any() and (held_out.right_N == SEP).any() and (held_out.left_N == CLS).any()
    ranks = fitted.ranks(held_out)
    for n in range(len(held_out)):
        probability = everything(fitted, held_out, n)
        assert probability.sum() == pytest.approx(1)
        assert ranks[n] == (probability > probability[held_out.word_N[n]] * (1 + 1e-12)).sum()
    assert ranks.max() > 3 and ranks.min() == 0


def test_ranks_where_frequent_words_beat_a_rare_one_without_its_neighbours():
    rng = np.random.default_rng(0)
    share = 0.5 ** np.arange(VOCAB - FIRST_ORDINARY)
    words = rng.choice(np.arange(FIRST_ORDINARY, VOCAB), (100, 6), p=share / share.sum())
    ids = np.concatenate([[CLS, *row, SEP] for row in words]).astype(np.int32)
    offsets = np.arange(0, 801, 8)
    masked, labels = mask_tokens(ids, offsets, VOCAB, 0, 0, np.arange(100))
    examples = Examples(masked, labels, np.ones(800, np.int8), offsets, np.ones(100, np.int8))
    skewed, targets = BigramBaseline(examples, examples.token_counts(VOCAB)), targets_of(examples)
    ranks = skewed.ranks(targets)
    for n in range(len(targets)):
        probability = everything(skewed, targets, n)
        assert ranks[n] == (probability > probability[targets.word_N[n]] * (1 + 1e-12)).sum()


def test_masks_and_padding_are_no_neighbours_and_special_tokens_no_words():
    found = NeighborCounts(VOCAB)
    found.add(np.array([MASK, PAD, CLS, 6, 6, 6]), np.array([7, 7, 7, SEP, 8, 8]))
    assert found.code.tolist() == [CLS * VOCAB + 7, 6 * VOCAB + 8] and found.count.tolist() == [1, 2]
    assert found.totals()[[MASK, PAD, CLS, 6]].tolist() == [0, 0, 1, 2]


def test_unseen_words_and_neighbours_are_possible(fitted):
    unseen = VOCAB - 1
    nothing = Targets(*(np.array([value]) for value in (0, 1, unseen, MASK, unseen, MASK)))
    assert (
        0 < fitted.probabilities(nothing)[0] == pytest.approx(fitted.unigram_V[unseen])
    )  # neither neighbour says anything
    assert everything(fitted, nothing, 0).sum() == pytest.approx(1)


def test_weights_lean_on_the_neighbours_where_they_tell(train, fitted):
    held_out = targets_of(make_examples(300, 3))
    assert -np.log(fitted.probabilities(held_out)).mean() < -np.log(fitted.unigram_V[held_out.word_N]).mean() - 0.4
    assert np.allclose(fitted.weights.sum(-1), 1)
    assert (fitted.weights[0, :, 1] == 0).all() and (fitted.weights[:, 0, 2] == 0).all()


def test_counting_in_chunks_changes_nothing(train, fitted, monkeypatch):
    monkeypatch.setattr(bigram_module, "CHUNK", 50)
    again = BigramBaseline(train, train.token_counts(VOCAB))
    assert (again.after.code == fitted.after.code).all() and (again.before.count == fitted.before.count).all()
    assert (again.weights == fitted.weights).all()


def test_weights_are_not_fitted_on_copies_of_counted_pairs(train):
    ids, labels = mask_tokens(train.original_ids(), train.offsets, VOCAB, 9, 0, np.arange(len(train)))
    twice = concatenate([train, Examples(ids, labels, train.segments, train.offsets, train.is_next)])
    apart = _same_words_as_last(twice, 10)
    assert apart[-10:].all() and apart[190:200].all() and apart.sum() < 30
    # Of one pair alone, nothing is left to count meanwhile; the unigram has all weight.
    alone = BigramBaseline(train.rows(0, 1), train.token_counts(VOCAB))
    assert np.isfinite(alone.probabilities(targets_of(train))).all()
