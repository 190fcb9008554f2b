"""Documents are split into sentences; helpers for tests of what is made of sentences."""

import numpy as np
from conftest import tokenizer_of
from hypothesis import given
from hypothesis import strategies as st

from babybert.data.sentences import Sentences, TokenizedDocuments, split_sentences
from babybert.data.tokenizer import Tokenizer


def flat_documents(documents: list[np.ndarray], texts: list[int] | None = None) -> TokenizedDocuments:
    """Documents one after the other; each has another text unless `texts` says so."""
    lengths = [len(ids) for ids in documents]
    tokens = np.concatenate([np.zeros(0, np.int32), *documents]).astype(np.int32)
    text_numbers = np.arange(len(documents)) if texts is None else np.array(texts)
    return TokenizedDocuments(tokens, np.cumsum([0, *lengths]), text_numbers)


def corpus_of(texts: list[str]) -> tuple[TokenizedDocuments, Sentences, Tokenizer]:
    """The tokens and sentences of texts."""
    tokenizer = tokenizer_of(*texts, ". ! ?")
    corpus = flat_documents(tokenizer.encode_documents(texts))
    return corpus, split_sentences(corpus, tokenizer.sentence_end_ids()), tokenizer


def sentences_of(*texts: str) -> list[tuple[int, str]]:
    """Each sentence with its document's index."""
    corpus, sentences, tokenizer = corpus_of(list(texts))
    spans = zip(sentences.start, sentences.end, strict=True)
    tokens = [" ".join(tokenizer.tokens(corpus.tokens[start:end])) for start, end in spans]
    return list(zip(sentences.document.tolist(), tokens, strict=True))


def test_sentences_end_at_runs_of_ends_and_at_the_document() -> None:
    assert sentences_of("Good... really?! Yes it is. No end", "Next one.") == [
        (0, "good . . ."),
        (0, "really ? !"),
        (0, "yes it is ."),
        (0, "no end"),
        (1, "next one ."),
    ]


def test_empty_and_one_token_sentences_are_left_out() -> None:
    assert sentences_of("", "Wow", "...", "! Fine then.") == [(3, "fine then .")]
    assert sentences_of("", "") == []


def plain_split(ids: list[int], end_ids: set[int]) -> list[list[int]]:
    """The oracle: the same rule, token by token."""
    sentences = []
    sentence: list[int] = []
    for position, token in enumerate(ids):
        sentence.append(token)
        is_last = position + 1 == len(ids)
        if is_last or (token in end_ids and ids[position + 1] not in end_ids):
            sentences.append(sentence)
            sentence = []
    return [sentence for sentence in sentences if len(sentence) >= 2 and sentence[0] not in end_ids]


@given(st.lists(st.lists(st.integers(5, 9), max_size=12), max_size=5))
def test_splitting_equals_a_loop_over_tokens(documents: list[list[int]]) -> None:
    ends = np.array([5, 6], np.int32)
    corpus = flat_documents([np.array(ids, np.int32) for ids in documents])
    sentences = split_sentences(corpus, ends)
    tokens = [corpus.tokens[start:end].tolist() for start, end in zip(sentences.start, sentences.end, strict=True)]
    assert tokens == [sentence for ids in documents for sentence in plain_split(ids, {5, 6})]
