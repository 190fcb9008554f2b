"""Sentence pairs: labels, negatives, truncation and layout."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sentences import corpus_of, flat_documents

from babybert.corpus.demo import generate_reviews
from babybert.data.pairs import assemble, make_pairs, truncate_longest_first
from babybert.data.sentences import split_sentences
from babybert.data.tokenizer import CLS, SEP


def test_half_the_pairs_are_neighbours_and_half_are_of_two_documents() -> None:
    corpus, sentences, _ = corpus_of(generate_reviews(300, seed=1))
    pairs = make_pairs(corpus, sentences, seed=0, split=0)
    positive = pairs.is_next == 1
    assert abs(positive.mean() - 0.5) < 0.001
    assert (pairs.b[positive] == pairs.a[positive] + 1).all()
    assert (sentences.document[pairs.a] == sentences.document[pairs.b])[positive].all()
    assert (sentences.document[pairs.a] != sentences.document[pairs.b])[~positive].all()
    for a, b in zip(pairs.a[~positive], pairs.b[~positive], strict=True):
        true_next = corpus.tokens[sentences.start[a + 1] : sentences.end[a + 1]]
        assert corpus.tokens[sentences.start[b] : sentences.end[b]].tolist() != true_next.tolist()


def test_b_sentences_are_the_same_set_under_both_labels() -> None:
    corpus, sentences, _ = corpus_of(generate_reviews(300, seed=1))
    pairs = make_pairs(corpus, sentences, seed=0, split=0)
    negative = pairs.is_next == 0
    assert sorted(pairs.b[negative]) == sorted(pairs.a[negative] + 1)
    assert len(set(pairs.a) | set(pairs.b)) == 2 * len(pairs)  # every sentence is used once


def test_pairs_are_a_function_of_the_seed() -> None:
    corpus, sentences, _ = corpus_of(generate_reviews(50, seed=1))
    first, again, other = (make_pairs(corpus, sentences, seed, 0) for seed in (0, 0, 1))
    assert (first.b == again.b).all()
    assert (first.b != other.b).any()


def test_a_corpus_without_other_documents_gives_no_false_negatives() -> None:
    corpus, sentences, _ = corpus_of(["One two. Three four. Five six. Seven eight."])
    assert make_pairs(corpus, sentences, 0, 0).is_next.tolist() == [1]
    corpus, sentences, _ = corpus_of(["Same one. Same two."] * 4)
    pairs = make_pairs(corpus, sentences, 0, 0)
    assert pairs.is_next.tolist() == [1, 1]
    assert pairs.without_negative == 2


def test_a_copy_of_the_document_gives_no_second_sentence() -> None:
    documents = [np.array([10 + d, 11, 5, 20 + d, 21, 5], np.int32) for d in range(3)]
    corpus = flat_documents([*documents, *documents], texts=[0, 1, 2, 0, 1, 2])
    sentences = split_sentences(corpus, np.array([5]))
    for seed in range(20):
        pairs = make_pairs(corpus, sentences, seed, 0)
        negative = pairs.is_next == 0
        assert (sentences.text[pairs.a] != sentences.text[pairs.b])[negative].all()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 50))
def test_truncation_equals_removing_one_by_one_from_the_longer(length_a: int, length_b: int, max_length: int) -> None:
    kept_a = length_a
    kept_b = length_b
    while kept_a + kept_b > max_length:
        if kept_b >= kept_a:
            kept_b -= 1
        else:
            kept_a -= 1
    assert truncate_longest_first(length_a, length_b, max_length) == (kept_a, kept_b)
    arrays = truncate_longest_first(np.array([length_a]), np.array([length_b]), max_length)
    assert [array.tolist() for array in arrays] == [[kept_a], [kept_b]]


@settings(max_examples=30)
@given(st.integers(8, 40))
def test_layout_equals_a_loop_over_pairs(max_positions: int) -> None:
    corpus, sentences, _ = corpus_of(generate_reviews(6, seed=2))
    pairs = make_pairs(corpus, sentences, 0, 0)
    ids, segments, offsets = assemble(corpus, sentences, pairs, max_positions)
    for p in range(len(pairs)):
        a, b = (corpus.tokens[sentences.start[s] : sentences.end[s]].tolist() for s in (pairs.a[p], pairs.b[p]))
        while len(a) + len(b) > max_positions - 3:
            (b if len(b) >= len(a) else a).pop()
        assert ids[offsets[p] : offsets[p + 1]].tolist() == [CLS, *a, SEP, *b, SEP]
        assert segments[offsets[p] : offsets[p + 1]].tolist() == [1] * (len(a) + 2) + [2] * (len(b) + 1)
