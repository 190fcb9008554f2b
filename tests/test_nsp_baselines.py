"""The baselines for next sentence prediction: features by hand, and what each regression can and cannot find."""

import sys
from collections.abc import Sequence

import numpy as np
import pytest
from conftest import tokenizer_of

from babybert.data.dataset import Dataset
from babybert.data.sentence_ends import SENTENCE_ENDS
from babybert.data.table import Examples, take
from babybert.data.tokenizer import CLS, FIRST_ORDINARY, MASK, SEP, Tokenizer
from babybert.errors import DataError, UsageError
from babybert.evaluation.nsp_baselines import PUNCTUATION, lengths, marks, nsp_baselines, overlap
from babybert.evaluation.scores import unigram_log_probs

COMMA, DOT = 5, 6


def pairs_of(*pairs: tuple[Sequence[int], Sequence[int], int]) -> Examples:
    """Examples of (ids of A, ids of B, is_next)."""
    rows = [[CLS, *a, SEP, *b, SEP] for a, b, _ in pairs]
    segments = [[1] * (len(a) + 2) + [2] * (len(b) + 1) for a, b, _ in pairs]
    ids = np.concatenate(rows)
    return Examples(
        ids,
        np.zeros_like(ids),
        np.concatenate(segments),
        np.cumsum([0, *map(len, rows)]),
        np.array([label for *_, label in pairs]),
    )


def id_of(tokenizer: Tokenizer, word: str) -> int:
    token_id = tokenizer.id_of(word)
    assert token_id is not None
    return token_id


def accuracy(probability_P: np.ndarray, examples: Examples) -> float:
    return float(((probability_P > 0.5) == examples.is_next).mean())


def test_overlap_by_hand() -> None:
    counts = np.array([0, 0, 0, 0, 0, 50, 50, 8, 4, 2, 1])
    examples = pairs_of(([7, 8, 8, MASK, DOT], [8, 9, DOT], 1), ([7, DOT], [MASK, DOT], 0))
    rarity = -unigram_log_probs(counts)
    features = overlap(examples, counts, np.array([COMMA, DOT]))
    assert features[0] == pytest.approx([1, 1 / 3, rarity[8], rarity[8] / (rarity[7] + rarity[8] + rarity[9])])
    assert features[1] == pytest.approx([0, 0, 0, 0])
    assert lengths(examples) == pytest.approx(np.array([[5, 3, np.log(6), np.log(4)], [2, 2, np.log(3), np.log(3)]]))
    assert marks(examples, np.array([COMMA, DOT])).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]


def test_each_baseline_finds_what_it_is_made_for_and_nothing_else() -> None:
    tokenizer = tokenizer_of("a , b . c d e f g h i j k l")
    dot, comma = id_of(tokenizer, "."), id_of(tokenizer, ",")
    words = np.setdiff1d(np.arange(FIRST_ORDINARY, tokenizer.size), [dot, comma])
    rng = np.random.default_rng(0)

    def make(count: int, by_form: bool) -> Examples:
        """Pairs whose positives share two words or, `by_form`, have a full stop in B."""
        pairs = []
        for _ in range(count):
            a = rng.choice(words, 3, replace=False)
            b = np.setdiff1d(rng.choice(words, 3, replace=False), a).tolist()
            label = int(rng.integers(2))
            repeated = b[:1]
            if label:
                b += [dot] if by_form else a[:2].tolist()
            pairs.append((a.tolist(), b + repeated, label))
        return pairs_of(*pairs)

    counts = np.full(tokenizer.size, 9)
    for by_form, name in ((False, "overlap"), (True, "format")):
        held_out = make(200, by_form)
        probabilities = nsp_baselines(make(400, by_form), held_out, tokenizer, counts)
        assert accuracy(probabilities[name], held_out) > 0.95
        if by_form:  # the word-overlap baseline sees only the additional length
            assert accuracy(probabilities["overlap"], held_out) < 0.8


def test_style_compares_the_two_sentences_and_format_does_not() -> None:
    tokenizer = tokenizer_of("a , b . c")
    mark_ids = [id_of(tokenizer, mark) for mark in (",", ".")]
    rng = np.random.default_rng(1)

    def make(count: int) -> Examples:
        """Pairs whose positives end with the same mark in A and B, and whose negatives do not."""
        pairs = []
        for _ in range(count):
            label, mark = int(rng.integers(2)), int(rng.integers(2))
            mark_of_b = mark if label else 1 - mark
            pairs.append(([7, mark_ids[mark]], [7, mark_ids[mark_of_b]], label))
        return pairs_of(*pairs)

    held_out = make(200)
    probabilities = nsp_baselines(make(400), held_out, tokenizer, np.full(tokenizer.size, 9))
    assert accuracy(probabilities["style"], held_out) == 1
    assert accuracy(probabilities["format"], held_out) < 0.65


def test_sentence_ends_are_punctuation_not_words() -> None:
    assert set(SENTENCE_ENDS) <= set(PUNCTUATION)


def test_taken_pairs_are_complete() -> None:
    examples = pairs_of(([7], [8], 1), ([9, 9], [7], 0), ([8], [8], 1))
    taken = take(examples, np.array([2, 1]))
    assert taken.ids.tolist() == [CLS, 8, SEP, 8, SEP, CLS, 9, 9, SEP, 7, SEP]
    assert taken.offsets.tolist() == [0, 5, 11] and taken.is_next.tolist() == [1, 0]


def test_training_pairs_of_one_label_are_refused(demo: Dataset) -> None:
    train = demo.examples("train")
    positives = take(train, np.flatnonzero(train.is_next == 1))
    with pytest.raises(DataError, match="all training pairs have is_next 1"):
        nsp_baselines(positives, demo.examples("validation"), demo.tokenizer, demo.token_counts())


def test_without_scikit_learn(demo: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    train = demo.examples("train")
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(UsageError, match="scikit-learn"):
        nsp_baselines(train, train, demo.tokenizer, demo.token_counts())
