"""Runs of sentences as segments: whole sentences, filled pairs, and negatives of the same format."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_sentences import corpus_of, flat_documents
from test_splits import prepare_documents

from babybert.config import InfoConfig, PrepareConfig
from babybert.corpus.demo import generate_reviews
from babybert.data.pairs import Pairs, make_pairs
from babybert.data.runs import Runs, make_runs
from babybert.data.sentences import Sentences, TokenizedDocuments, split_sentences
from babybert.errors import UsageError
from babybert.info import describe

END = 5


def reviews(count: int, seed: int = 0) -> tuple[TokenizedDocuments, Sentences]:
    """Documents of 1 to 13 sentences, of 2 to 40 tokens each."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        sentences = [[*rng.integers(6, 500, rng.integers(1, 40)), END] for _ in range(rng.integers(1, 14))]
        documents.append(np.array(list(itertools.chain.from_iterable(sentences)), np.int32))
    corpus = flat_documents(documents)
    return corpus, split_sentences(corpus, np.array([END]))


def lengths_of(segments: Sentences) -> np.ndarray:
    return np.asarray(segments.end - segments.start)


def pair_up(corpus: TokenizedDocuments, runs: Runs, seed: int = 0) -> Pairs:
    return make_pairs(corpus, runs.segments, seed, 0, 0, runs.formats)


def documents_of(lengths: list[list[int]]) -> TokenizedDocuments:
    """Documents whose sentences have these lengths."""
    sentences = [[np.array([6] * (length - 1) + [END], np.int32) for length in document] for document in lengths]
    return flat_documents([np.concatenate([np.zeros(0, np.int32), *document]) for document in sentences])


@given(st.lists(st.lists(st.integers(2, 30), max_size=9), max_size=5), st.integers(5, 60), st.integers(0, 3))
def test_a_run_is_whole_sentences_and_both_together_fit(documents: list[list[int]], max_tokens: int, seed: int) -> None:
    corpus = documents_of(documents)
    sentences = split_sentences(corpus, np.array([END]))
    runs = make_runs(sentences, max_tokens, seed, 0).segments
    a, b = slice(0, None, 2), slice(1, None, 2)
    assert set(runs.start) <= set(sentences.start)
    assert set(runs.end) <= set(sentences.end)
    assert (runs.start[b] == runs.end[a]).all()
    assert (runs.document[a] == runs.document[b]).all()
    assert (runs.start[1:] >= runs.end[:-1]).all()  # every sentence is used at most once
    counts = np.searchsorted(sentences.end, runs.end) - np.searchsorted(sentences.start, runs.start) + 1
    fits = runs.end[b] - runs.start[a] <= max_tokens
    assert (fits | ((counts[a] == 1) & (counts[b] == 1))).all()
    # Each document with two sentences has a pair, and at most its last sentence is left out.
    for document, lengths in enumerate(documents):
        covered = lengths_of(runs)[runs.document == document].sum()
        assert covered in ((sum(lengths), sum(lengths[:-1])) if len(lengths) > 1 else (0,))


def test_one_in_ten_pairs_has_a_shorter_target() -> None:
    corpus = documents_of([[10] * 40] * 2000)
    runs = make_runs(split_sentences(corpus, np.array([END])), 125, 0, 0)
    of_pairs = runs.segments.end[1::2] - runs.segments.start[::2]
    is_first = np.diff(runs.segments.document[::2], prepend=-1) != 0
    assert 0.07 < (of_pairs[is_first] < 120).mean() < 0.12
    assert of_pairs.max() == 120
    assert set(runs.formats[::2, 1].tolist()) == set(range(1, 12))  # sentences of A


def test_negatives_have_the_format_of_the_pairs_that_they_were() -> None:
    corpus, sentences = reviews(3000)
    runs = make_runs(sentences, 125, 0, 0)
    pairs = pair_up(corpus, runs)
    negative = pairs.is_next == 0
    assert abs(negative.mean() - 0.5) < 0.001
    assert pairs.without_negative == 0
    assert (pairs.b[~negative] == pairs.a[~negative] + 1).all()
    assert sorted(pairs.b[negative]) == sorted(pairs.a[negative] + 1)
    assert (runs.segments.text[pairs.a] != runs.segments.text[pairs.b])[negative].all()
    given_formats, true_formats = runs.formats[pairs.b[negative]], runs.formats[pairs.a[negative] + 1]
    assert (given_formats[:, 0] == true_formats[:, 0]).mean() > 0.98  # length, and whether the document ends
    assert (np.abs(given_formats[:, 0] - true_formats[:, 0]) <= 4).mean() > 0.99
    assert (given_formats[:, 1] == true_formats[:, 1]).mean() > 0.75  # how many sentences


def test_runs_are_a_function_of_seed_split_and_block() -> None:
    _, sentences = reviews(100)
    settings = [(0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    starts = [tuple(make_runs(sentences, 60, *values).segments.start.tolist()) for values in settings]
    assert starts[0] == starts[1]
    assert len(set(starts)) == 4


def test_copies_and_small_corpora_give_no_false_negatives() -> None:
    texts = generate_reviews(4, seed=1)
    for documents in ([texts[0]], texts[:2], [texts[0]] * 50, [*texts[:1] * 50, *texts[1:]], ["", "One."]):
        corpus, sentences, _ = corpus_of(documents)
        for seed in range(5):
            runs = make_runs(sentences, 29, seed, 0)
            pairs = pair_up(corpus, runs, seed)
            negative = pairs.is_next == 0
            contents = [
                corpus.tokens[start:end].tobytes()
                for start, end in zip(runs.segments.start, runs.segments.end, strict=True)
            ]
            assert all(
                contents[b] != contents[a + 1] for a, b in zip(pairs.a[negative], pairs.b[negative], strict=True)
            )
            # Copies of a text have other numbers here; `prepare` gives them the same.
            assert (runs.segments.document[pairs.a] != runs.segments.document[pairs.b])[negative].all()
            assert len(pairs) + pairs.without_negative == len(runs.segments) // 2


def test_prepared_runs_are_recorded_and_a_long_sentence_is_cut(tmp_path: Path) -> None:
    texts = [f"{'very ' * 90}long {i}. Short {i}. The end {i}. No {i}" for i in range(40)]
    dataset = prepare_documents(tmp_path, texts, segments="runs", max_positions=64, validation_fraction=0.3)
    assert dataset.facts["segments"] == "runs"
    train = dataset.facts["train"]
    assert train["longest"] == 64
    assert train["sentences"] == 4 * train["documents"]
    assert describe(tmp_path / "data", InfoConfig())["segments"] == "runs"
    prepare_documents(tmp_path, texts, max_positions=64)
    assert describe(tmp_path / "data", InfoConfig())["segments"] == "sentences"


@pytest.mark.parametrize("kind", ["basic-english", "wordpiece"])
def test_sentences_of_runs_end_where_the_text_says(tmp_path: Path, kind: str) -> None:
    texts = [f'Mr. Hill saw {i} films (e.g. "Up!") in 3.5 days. "Good?" he asked. No idea {i}.' for i in range(40)]
    for segments, sentences in (("runs", 3), ("sentences", 9)):
        facts = prepare_documents(tmp_path, texts, tokenizer_kind=kind, segments=segments).facts
        assert facts["train"]["sentences"] == sentences * facts["train"]["documents"]


def test_copies_of_pairs_have_other_masks_only(tmp_path: Path) -> None:
    texts = generate_reviews(60, seed=1)
    once, twice = (
        prepare_documents(tmp_path, texts, segments="runs", duplicates=duplicates).examples("train")
        for duplicates in (1, 2)
    )
    assert len(twice) == 2 * len(once)
    assert np.array_equal(np.tile(once.original_ids(), 2), twice.original_ids())
    first, second = np.split(twice.labels, 2)
    assert not np.array_equal(first, second)


def test_tables_have_their_pairs() -> None:
    with pytest.raises(UsageError, match="--segments is for documents"):
        PrepareConfig(
            corpus="table",
            source=("a.csv",),
            validation_source=("b.csv",),
            tokenizer=Path("tokenizer.json"),
            segments="runs",
        )
