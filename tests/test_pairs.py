import numpy as np
from conftest import tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st

from babybert.corpus.demo import generate_reviews
from babybert.data.pairs import assemble, cut_lengths, make_pairs
from babybert.data.sentences import TokenizedDocuments, split_sentences
from babybert.data.tokenizer import CLS, SEP


def end_to_end(documents, texts=None):
    lengths = [len(ids) for ids in documents]
    tokens = np.concatenate([np.zeros(0, np.int32), *documents]).astype(np.int32)
    return TokenizedDocuments(
        tokens, np.cumsum([0, *lengths]), np.arange(len(documents)) if texts is None else np.array(texts)
    )


def corpus_of(texts):
    tokenizer = tokenizer_of(*texts, ". ! ?")
    corpus = end_to_end(tokenizer.encode_documents(texts))
    return corpus, split_sentences(corpus, tokenizer.sentence_end_ids()), tokenizer


def sentences_of(*texts):
    corpus, sentences, tokenizer = corpus_of(list(texts))
    words = [
        " ".join(tokenizer.tokens(corpus.tokens[i:j])) for i, j in zip(sentences.start, sentences.end, strict=True)
    ]
    return list(zip(sentences.document.tolist(), words, strict=True))


def test_sentences_end_at_runs_of_ends_and_at_the_document():
    assert sentences_of("Good... really?! Yes it is. No end", "Next one.") == [
        (0, "good . . ."),
        (0, "really ? !"),
        (0, "yes it is ."),
        (0, "no end"),
        (1, "next one ."),
    ]


def test_no_empty_and_no_one_token_sentences():
    assert sentences_of("", "Wow", "...", "! Fine then.") == [(3, "fine then .")]
    assert sentences_of("", "") == []


def plain_split(ids, ends):
    """The same rule, token by token."""
    sentences, current = [], []
    for position, token in enumerate(ids):
        current.append(token)
        last = position + 1 == len(ids)
        if last or (token in ends and ids[position + 1] not in ends):
            sentences.append(current)
            current = []
    return [s for s in sentences if len(s) >= 2 and s[0] not in ends]


@given(st.lists(st.lists(st.integers(5, 9), max_size=12), max_size=5))
def test_splitting_equals_the_plain_loop(documents):
    ends = np.array([5, 6], np.int32)
    corpus = end_to_end([np.array(ids, np.int32) for ids in documents])
    found = split_sentences(corpus, ends)
    tokens = [corpus.tokens[i:j].tolist() for i, j in zip(found.start, found.end, strict=True)]
    assert tokens == [s for ids in documents for s in plain_split(ids, {5, 6})]


def test_half_the_pairs_are_neighbours_and_half_are_of_two_documents():
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


def test_b_sentences_are_the_same_set_under_both_labels():
    corpus, sentences, _ = corpus_of(generate_reviews(300, seed=1))
    pairs = make_pairs(corpus, sentences, seed=0, split=0)
    negative = pairs.is_next == 0
    assert sorted(pairs.b[negative]) == sorted(pairs.a[negative] + 1)
    assert len(set(pairs.a) | set(pairs.b)) == 2 * len(pairs)  # every sentence is used once


def test_pairs_are_a_function_of_the_seed():
    corpus, sentences, _ = corpus_of(generate_reviews(50, seed=1))
    first, again, other = (make_pairs(corpus, sentences, seed, 0) for seed in (0, 0, 1))
    assert (first.b == again.b).all()
    assert (first.b != other.b).any()


def test_a_corpus_without_other_documents_gives_no_false_negatives():
    corpus, sentences, _ = corpus_of(["One two. Three four. Five six. Seven eight."])
    assert make_pairs(corpus, sentences, 0, 0).is_next.tolist() == [1]
    corpus, sentences, _ = corpus_of(["Same one. Same two."] * 4)
    assert make_pairs(corpus, sentences, 0, 0).is_next.tolist() == [1, 1]


def test_a_copy_of_the_document_gives_no_second_sentence():
    documents = [np.array([10 + d, 11, 5, 20 + d, 21, 5], np.int32) for d in range(3)]
    corpus = end_to_end([*documents, *documents], texts=[0, 1, 2, 0, 1, 2])
    sentences = split_sentences(corpus, np.array([5]))
    for seed in range(20):
        pairs = make_pairs(corpus, sentences, seed, 0)
        negative = pairs.is_next == 0
        assert (sentences.text[pairs.a] != sentences.text[pairs.b])[negative].all()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 50))
def test_cutting_equals_taking_one_by_one_from_the_longer(length_a, length_b, room):
    a, b = length_a, length_b
    while a + b > room:
        if b >= a:
            b -= 1
        else:
            a -= 1
    kept_a, kept_b = cut_lengths(np.array([length_a]), np.array([length_b]), room)
    assert (kept_a[0], kept_b[0]) == (a, b)


@settings(max_examples=30)
@given(st.integers(8, 40))
def test_layout_equals_the_plain_loop(max_positions):
    corpus, sentences, _ = corpus_of(generate_reviews(6, seed=2))
    pairs = make_pairs(corpus, sentences, 0, 0)
    ids, segments, offsets = assemble(corpus, sentences, pairs, max_positions)
    for p in range(len(pairs)):
        a, b = (corpus.tokens[sentences.start[s] : sentences.end[s]].tolist() for s in (pairs.a[p], pairs.b[p]))
        while len(a) + len(b) > max_positions - 3:
            (b if len(b) >= len(a) else a).pop()
        assert ids[offsets[p] : offsets[p + 1]].tolist() == [CLS, *a, SEP, *b, SEP]
        assert segments[offsets[p] : offsets[p + 1]].tolist() == [1] * (len(a) + 2) + [2] * (len(b) + 1)
