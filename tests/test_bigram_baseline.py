"""The bigram baseline against counts in dictionaries, and its ranks against a search of the whole vocabulary."""

import itertools
from collections import Counter

import numpy as np
import pytest

from babybert.data.masking import mask_tokens
from babybert.data.table import Examples, concatenate
from babybert.data.tokenizer import CLS, FIRST_ORDINARY, MASK, PAD, SEP
from babybert.evaluation import bigram_baseline
from babybert.evaluation.bigram_baseline import (
    BigramBaseline,
    NeighbourCounts,
    Targets,
    _same_words_as_last,
    count_at,
    targets_of,
    unigram_words_above,
)

VOCAB = 12


def make_examples(pairs: int, seed: int) -> Examples:
    """Random pairs in which each word is often followed by the word with the next id."""
    rng = np.random.default_rng(seed)
    rows, segments = [], []
    for _ in range(pairs):
        words = [int(rng.integers(FIRST_ORDINARY, VOCAB - 1))]  # the vocabulary's last word never occurs
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
def train() -> Examples:
    return make_examples(200, 0)


@pytest.fixture(scope="module")
def fitted(train: Examples) -> BigramBaseline:
    return BigramBaseline(train, train.token_counts(VOCAB))


def probabilities_of_all_words(baseline: BigramBaseline, targets: Targets, n: int) -> np.ndarray:
    """p(word | left, right) of each word (V) in the place of target n."""
    return baseline.probabilities(
        Targets(
            pair_N=np.full(VOCAB, targets.pair_N[n]),
            position_N=np.full(VOCAB, targets.position_N[n]),
            word_N=np.arange(VOCAB),
            shown_N=np.full(VOCAB, targets.shown_N[n]),
            left_N=np.full(VOCAB, targets.left_N[n]),
            right_N=np.full(VOCAB, targets.right_N[n]),
        )
    )


def ranks_by_search(baseline: BigramBaseline, targets: Targets) -> list[int]:
    """The ranks, by comparing each target with all words of the vocabulary."""
    ranks = []
    for n, word in enumerate(targets.word_N):
        probability_V = probabilities_of_all_words(baseline, targets, n)
        # Two sums of the same terms in another order differ by rounding: equal probabilities must not count as higher.
        ranks.append(int((probability_V > probability_V[word] * (1 + 1e-12)).sum()))
    return ranks


def test_targets_are_the_masked_tokens_with_what_is_shown_next_to_them() -> None:
    examples = Examples(
        np.array([CLS, 7, MASK, SEP, 6, SEP, MASK, 9]),
        np.array([0, 0, 8, 0, 6, 0, 5, 0]),
        np.ones(8),
        np.array([0, 6, 8]),
        np.array([1, 0]),
    )
    targets = targets_of(examples)
    assert targets.pair_N.tolist() == [0, 0, 1]
    assert targets.position_N.tolist() == [2, 4, 0]
    assert targets.word_N.tolist() == [8, 6, 5]
    assert targets.shown_N.tolist() == [MASK, 6, MASK]
    assert targets.left_N.tolist() == [7, SEP, PAD]  # nothing from the pair before
    assert targets.right_N.tolist() == [SEP, SEP, 9]


def test_probabilities_are_the_mixture_of_plain_counts(train: Examples, fitted: BigramBaseline) -> None:
    after: Counter[tuple[int, int]] = Counter()  # (left, word)
    before: Counter[tuple[int, int]] = Counter()  # (right, word)
    left_total: Counter[int] = Counter()
    right_total: Counter[int] = Counter()
    original = train.original_ids().tolist()
    for pair in range(len(train)):
        row = original[train.offsets[pair] : train.offsets[pair + 1]]
        for left, right in itertools.pairwise(row):
            if right >= FIRST_ORDINARY:
                after[left, right] += 1
                left_total[left] += 1
            if left >= FIRST_ORDINARY:
                before[right, left] += 1
                right_total[right] += 1

    def bucket(total: int) -> int:
        return min(len(str(total)), bigram_baseline.BUCKETS - 1) if total else 0

    counts = train.token_counts(VOCAB)
    held_out = targets_of(make_examples(40, 1))
    probabilities = fitted.probabilities(held_out)
    for n in range(len(held_out)):
        word, left, right = (int(values[n]) for values in (held_out.word_N, held_out.left_N, held_out.right_N))
        left_seen = 0 if left == MASK else left_total[left]
        right_seen = 0 if right == MASK else right_total[right]
        experts = [
            (counts[word] + 1) / (counts.sum() + VOCAB),
            after[left, word] / left_seen if left_seen else 0,
            before[right, word] / right_seen if right_seen else 0,
        ]
        weights = fitted.weights[bucket(left_seen), bucket(right_seen)]
        assert probabilities[n] == pytest.approx(np.dot(weights, experts))


def test_ranks_are_those_of_a_search_of_the_vocabulary(fitted: BigramBaseline) -> None:
    held_out = targets_of(make_examples(60, 2))
    assert (held_out.left_N == MASK).any() and (held_out.right_N == SEP).any() and (held_out.left_N == CLS).any()
    ranks = fitted.ranks(held_out)
    assert ranks.tolist() == ranks_by_search(fitted, held_out)
    assert ranks.max() > 3 and ranks.min() == 0
    for n in range(len(held_out)):
        assert probabilities_of_all_words(fitted, held_out, n).sum() == pytest.approx(1)


def test_ranks_where_frequent_words_are_above_a_rare_one_by_the_unigram_alone() -> None:
    rng = np.random.default_rng(0)
    share = 0.5 ** np.arange(VOCAB - FIRST_ORDINARY)
    words = rng.choice(np.arange(FIRST_ORDINARY, VOCAB), (100, 6), p=share / share.sum())
    ids = np.concatenate([[CLS, *row, SEP] for row in words]).astype(np.int32)
    offsets = np.arange(0, 801, 8)
    masked, labels = mask_tokens(ids, offsets, VOCAB, 0, 0, np.arange(100))
    examples = Examples(masked, labels, np.ones(800, np.int8), offsets, np.ones(100, np.int8))
    skewed = BigramBaseline(examples, examples.token_counts(VOCAB))
    targets = targets_of(examples)
    assert skewed.ranks(targets).tolist() == ranks_by_search(skewed, targets)


def test_the_count_of_a_word_in_a_slice() -> None:
    words, counts = np.array([3, 5, 9, 3, 4], np.int32), np.array([1, 2, 3, 4, 5])
    assert [count_at(words, counts, 0, 3, word) for word in (2, 3, 5, 7, 9, 10)] == [0, 1, 2, 0, 3, 0]
    assert [count_at(words, counts, 3, 5, word) for word in (3, 4, 5)] == [4, 5, 0]
    assert count_at(words, counts, 2, 2, 9) == 0  # an empty slice


def test_the_number_of_words_above_by_the_unigram_alone() -> None:
    sorted_unigram_V = np.array([0.1, 0.2, 0.2, 0.5])
    above = [unigram_words_above(sorted_unigram_V, 0.5, probability) for probability in (0.0, 0.05, 0.1, 0.2, 0.3)]
    assert above == [4, 3, 1, 1, 0]
    assert unigram_words_above(sorted_unigram_V, 0.0, 0.0) == 0


def test_masks_and_padding_are_not_neighbours_and_special_tokens_not_words() -> None:
    counts = NeighbourCounts(VOCAB)
    counts.add(np.array([MASK, PAD, CLS, 6, 6, 6]), np.array([7, 7, 7, SEP, 8, 8]))
    assert counts.code.tolist() == [CLS * VOCAB + 7, 6 * VOCAB + 8] and counts.count.tolist() == [1, 2]
    assert counts.totals()[[MASK, PAD, CLS, 6]].tolist() == [0, 0, 1, 2]


def test_unseen_words_and_neighbours_are_possible(fitted: BigramBaseline) -> None:
    unseen = VOCAB - 1
    target = Targets(*(np.array([value]) for value in (0, 1, unseen, MASK, unseen, MASK)))
    # Neither neighbour was seen, so the unigram has all the weight.
    assert 0 < fitted.probabilities(target)[0] == pytest.approx(fitted.unigram_V[unseen])
    assert probabilities_of_all_words(fitted, target, 0).sum() == pytest.approx(1)


def test_weights_favour_the_neighbours_where_they_are_informative(fitted: BigramBaseline) -> None:
    held_out = targets_of(make_examples(300, 3))
    bigram_loss = -np.log(fitted.probabilities(held_out)).mean()
    unigram_loss = -np.log(fitted.unigram_V[held_out.word_N]).mean()
    assert bigram_loss < unigram_loss - 0.4
    assert np.allclose(fitted.weights.sum(-1), 1)
    assert (fitted.weights[0, :, 1] == 0).all() and (fitted.weights[:, 0, 2] == 0).all()


def test_counting_in_chunks_changes_nothing(
    train: Examples, fitted: BigramBaseline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bigram_baseline, "CHUNK", 50)
    in_chunks = BigramBaseline(train, train.token_counts(VOCAB))
    assert (in_chunks.after.code == fitted.after.code).all() and (in_chunks.before.count == fitted.before.count).all()
    assert (in_chunks.weights == fitted.weights).all()


def test_weights_are_not_fitted_on_copies_of_counted_pairs(train: Examples) -> None:
    ids, labels = mask_tokens(train.original_ids(), train.offsets, VOCAB, 9, 0, np.arange(len(train)))
    twice = concatenate([train, Examples(ids, labels, train.segments, train.offsets, train.is_next)])
    left_out = _same_words_as_last(twice, 10)
    assert left_out[-10:].all() and left_out[190:200].all() and left_out.sum() < 30
    # Of a single pair nothing is left to count while the weights are fitted, so the unigram has all the weight.
    of_one_pair = BigramBaseline(train.rows(0, 1), train.token_counts(VOCAB))
    assert np.isfinite(of_one_pair.probabilities(targets_of(train))).all()
