import numpy as np
import pytest
from conftest import tokenizer_of

from babybert.data.table import Examples
from babybert.data.tokenizer import CLS, FIRST_ORDINARY, MASK, SEP
from babybert.errors import UsageError
from babybert.evaluation.nsp_baselines import lengths, marks, nsp_baselines, overlap, take
from babybert.evaluation.scores import unigram_log_probs

COMMA, DOT = 5, 6


def pairs_of(*pairs):
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


def test_overlap_by_hand():
    counts = np.array([0, 0, 0, 0, 0, 50, 50, 8, 4, 2, 1])
    examples = pairs_of(([7, 8, 8, MASK, DOT], [8, 9, DOT], 1), ([7, DOT], [MASK, DOT], 0))
    rarity = -unigram_log_probs(counts)
    found = overlap(examples, counts, np.array([COMMA, DOT]))
    assert found[0] == pytest.approx([1, 1 / 3, rarity[8], rarity[8] / (rarity[7] + rarity[8] + rarity[9])])
    assert found[1] == pytest.approx([0, 0, 0, 0])
    assert lengths(examples) == pytest.approx(np.array([[5, 3, np.log(6), np.log(4)], [2, 2, np.log(3), np.log(3)]]))
    assert marks(examples, np.array([COMMA, DOT])).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]


def test_each_finds_what_it_is_made_for_and_nothing_else():
    tokenizer = tokenizer_of("a , b . c d e f g h i j k l")
    words, dot = np.arange(FIRST_ORDINARY, tokenizer.size), tokenizer.id_of(".")
    words = words[(words != dot) & (words != tokenizer.id_of(","))]
    rng = np.random.default_rng(0)

    def make(count, by_form):
        pairs = []
        for _ in range(count):
            a, b, label = rng.choice(words, 3, replace=False), rng.choice(words, 3, replace=False), int(rng.integers(2))
            b = np.setdiff1d(b, a)
            b = np.concatenate(
                [
                    b,
                    [a[0], a[1]] if label and not by_form else [],
                    [dot] if label and by_form else [],
                    [b[0]] if len(b) else [],
                ]
            )
            pairs.append((a, b.astype(int), label))
        return pairs_of(*pairs)

    counts = np.full(tokenizer.size, 9)
    for by_form, name in ((False, "overlap"), (True, "format")):
        held_out = make(200, by_form)
        found = nsp_baselines(make(400, by_form), held_out, tokenizer, counts)
        assert ((found[name] > 0.5) == held_out.is_next).mean() > 0.95
    assert (
        (found["overlap"] > 0.5) == held_out.is_next
    ).mean() < 0.8  # punctuation is not its business, only the length


def test_style_compares_the_two_sentences_and_format_does_not():
    tokenizer = tokenizer_of("a , b . c")
    rng = np.random.default_rng(1)

    def make(count):
        pairs = []
        for _ in range(count):
            label, commas = int(rng.integers(2)), int(rng.integers(2))
            marks = tokenizer.id_of(","), tokenizer.id_of(".")
            pairs.append(([7, marks[commas]], [7, marks[commas if label else 1 - commas]], label))
        return pairs_of(*pairs)

    held_out = make(200)
    found = nsp_baselines(make(400), held_out, tokenizer, np.full(tokenizer.size, 9))
    assert ((found["style"] > 0.5) == held_out.is_next).mean() == 1
    assert ((found["format"] > 0.5) == held_out.is_next).mean() < 0.65


def test_taken_pairs_are_whole():
    examples = pairs_of(([7], [8], 1), ([9, 9], [7], 0), ([8], [8], 1))
    found = take(examples, np.array([2, 1]))
    assert found.ids.tolist() == [CLS, 8, SEP, 8, SEP, CLS, 9, 9, SEP, 7, SEP]
    assert found.offsets.tolist() == [0, 5, 11] and found.is_next.tolist() == [1, 0]


def test_one_class_alone_and_no_scikit_learn(demo, monkeypatch):
    train = demo.examples("train")
    alike = take(train, np.flatnonzero(train.is_next == 1))
    assert (nsp_baselines(alike, demo.examples("validation"), demo.tokenizer, demo.token_counts())["format"] == 1).all()
    monkeypatch.setitem(__import__("sys").modules, "sklearn.linear_model", None)
    with pytest.raises(UsageError, match="scikit-learn"):
        nsp_baselines(train, train, demo.tokenizer, demo.token_counts())
