"""Tokenized documents as flat arrays, and the sentences in them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenizedDocuments:
    """Token ids of documents end to end: number d is `tokens[offsets[d]:offsets[d + 1]]`."""

    tokens: np.ndarray  # int32
    offsets: np.ndarray  # int64, one more than there are documents
    texts: np.ndarray  # a number for each document's text: copies, and the pieces of a long one, share theirs


@dataclass(frozen=True)
class Sentences:
    """Sentence s is `tokens[start[s]:end[s]]`, in document `document[s]` of the text `text[s]`; in their order."""

    start: np.ndarray
    end: np.ndarray
    document: np.ndarray
    text: np.ndarray

    def __len__(self) -> int:
        return len(self.start)


def split_sentences(corpus: TokenizedDocuments, end_ids: np.ndarray) -> Sentences:
    """Cut documents after each run of sentence ends (`. ! ?`, so that `...` and `?!` end one sentence).

    A sentence of one token, or of nothing but ends, is left out.
    """
    if not len(corpus.tokens):
        empty = np.zeros(0, np.int64)
        return Sentences(empty, empty, empty, empty)
    is_end = np.isin(corpus.tokens, end_ids)
    document_end = np.zeros(len(corpus.tokens), bool)
    filled = corpus.offsets[1:][np.diff(corpus.offsets) > 0]
    document_end[filled - 1] = True
    next_is_end = np.append(is_end[1:], False)
    end = np.flatnonzero(document_end | (is_end & ~next_is_end)) + 1
    start = np.concatenate([[0], end[:-1]])
    document = np.searchsorted(corpus.offsets, start, side="right") - 1
    keep = (end - start >= 2) & ~is_end[start]
    return Sentences(start[keep], end[keep], document[keep], corpus.texts[document[keep]])
