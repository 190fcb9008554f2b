"""Tokenized documents as flat arrays, and the sentences in them.

With `--segments sentences`, sentences end at certain tokens, as in the reference. With `--segments runs`, they end
where `sentence_splitter.py` finds an end in the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class TokenizedText(NamedTuple):
    """The tokens of a text.

    Attributes:
        ids: their ids (int32).
        is_end: after which of them a sentence ends (bool); of several in a row, only the last one ends it.
    """

    ids: np.ndarray
    is_end: np.ndarray


def ends_after(parts: Sequence[Sequence[object]]) -> np.ndarray:
    """Return `TokenizedText.is_end` of a text that was cut after each sentence end and tokenized part by part."""
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    is_end = np.zeros(ends[-1], bool)
    last_tokens = ends[:-1] - 1  # what comes after the last sentence end has none
    is_end[last_tokens[last_tokens >= 0]] = True
    return is_end


@dataclass(frozen=True)
class TokenizedDocuments:
    """The token ids of documents, one after the other.

    Attributes:
        tokens: ids (int32) of all documents; document d is `tokens[offsets[d]:offsets[d + 1]]`.
        offsets: where each document starts (int64), and the end of the last one.
        texts: a number for each document's text; copies of a text, and the pieces of a long one, have the same.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    texts: np.ndarray


@dataclass(frozen=True)
class Sentences:
    """Sentences as index ranges into the tokens of `TokenizedDocuments`, in their order.

    Attributes:
        start: index of each sentence's first token (int64).
        end: index after its last token (int64).
        document: index of the document it is in (int64).
        text: number of that document's text (see `TokenizedDocuments.texts`).
    """

    start: np.ndarray
    end: np.ndarray
    document: np.ndarray
    text: np.ndarray

    def __len__(self) -> int:
        return len(self.start)


def split_sentences(documents: TokenizedDocuments, end_ids: np.ndarray) -> Sentences:
    """Split documents after each run of sentence ends (ids in `end_ids`) and at the end of each document.

    A run such as `...` or `?!` ends one sentence. Sentences of a single token, or of nothing but ends, are left out.
    """
    return split_after(documents, np.isin(documents.tokens, end_ids))


def split_after(documents: TokenizedDocuments, is_end: np.ndarray) -> Sentences:
    """Split documents as `split_sentences` does. `is_end` says which tokens are sentence ends; see `TokenizedText`."""
    if not len(documents.tokens):
        empty = np.zeros(0, np.int64)
        return Sentences(empty, empty, empty, empty)
    next_is_end = np.append(is_end[1:], False)
    is_last_of_document = np.zeros(len(documents.tokens), bool)
    document_ends = documents.offsets[1:][np.diff(documents.offsets) > 0]  # an empty document has no last token
    is_last_of_document[document_ends - 1] = True

    end = np.flatnonzero(is_last_of_document | (is_end & ~next_is_end)) + 1
    start = np.concatenate([[0], end[:-1]])
    document = np.searchsorted(documents.offsets, start, side="right") - 1
    keep = (end - start >= 2) & ~is_end[start]
    return Sentences(start[keep], end[keep], document[keep], documents.texts[document[keep]])
