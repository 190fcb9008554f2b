"""Documents to sentence pairs for next sentence prediction (NSP), with numpy over flat arrays.

A corpus is one flat array of token ids with the document's offsets; sentences and pairs are index ranges into it, so
no Python object is made for a token or a sentence. Sentences 0 and 1 of a document make one pair, 2 and 3 the next:
every sentence is used once. In half of the pairs (is_next 0) the second sentences are then dealt again among these
pairs, each to another document. So A's and B's are the same sentences under both labels, and nothing but their
fitting together can tell the label (Devlin et al., 2019, draw B from the whole corpus: there an opening sentence as
B gives a negative away). `is_next` is 1 where B follows A; Google's BERT uses the opposite.
"""

from dataclasses import dataclass

import numpy as np

from babybert.data.sentences import Sentences, TokenizedDocuments
from babybert.data.tokenizer import CLS, SEP

SPECIALS_IN_A_PAIR = 3  # [CLS] A [SEP] B [SEP]
NEGATIVES_STREAM = 1  # names this use of a seed, so that no other use draws the same numbers


@dataclass(frozen=True)
class Pairs:
    """Pair p is sentences `a[p]` and `b[p]`; `is_next[p]` is 1 where b follows a in its document, else 0."""

    a: np.ndarray
    b: np.ndarray
    is_next: np.ndarray

    def __len__(self) -> int:
        return len(self.a)


def make_pairs(corpus: TokenizedDocuments, sentences: Sentences, seed: int, split: int, block: int = 0) -> Pairs:
    """Pair neighbouring sentences, then deal the second ones of half the pairs again to other documents.

    A dealt sentence is never from the same document or a copy of it, nor word for word the true next one. Pairs for
    which no such sentence is to be had (a corpus of one document) are left out. A function of `seed` and the numbers
    of the split and of the block of documents that `corpus` is.
    """
    rng = np.random.default_rng((seed, NEGATIVES_STREAM, split, block))
    if len(sentences) < 2:
        empty = np.zeros(0, np.int64)
        return Pairs(empty, empty, empty.astype(np.int8))
    first_of_document = np.searchsorted(sentences.document, sentences.document, side="left")
    place = np.arange(len(sentences)) - first_of_document
    has_next = np.append(sentences.document[1:] == sentences.document[:-1], False)
    a = np.flatnonzero((place % 2 == 0) & has_next)
    b = a + 1
    is_next = np.ones(len(a), np.int8)
    negative = np.sort(rng.permutation(len(a))[: len(a) // 2])
    dealt, possible = _deal(b[negative], sentences.text, _content_ids(corpus, sentences), rng)
    b[negative], is_next[negative] = dealt, 0
    keep = np.ones(len(a), bool)
    keep[negative[~possible]] = False
    return Pairs(a[keep], b[keep], is_next[keep])


def _deal(
    true_next: np.ndarray, text: np.ndarray, content: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Permute `true_next` so that each place gets another document's sentence with other words.

    Places that clash are dealt again together with as many others that do not, until none clashes or, in a corpus
    too small for it, a hundred rounds have passed. Returns the permutation and where it is possible.
    """

    def clashes(dealt: np.ndarray) -> np.ndarray:
        return (text[dealt] == text[true_next]) | (content[dealt] == content[true_next])

    dealt = rng.permutation(true_next)
    for _ in range(100):
        clash = np.flatnonzero(clashes(dealt))
        if not len(clash):
            break
        others = rng.choice(len(dealt), size=min(len(clash) + 1, len(dealt)), replace=False)
        again = np.union1d(clash, others)
        dealt[again] = rng.permutation(dealt[again])
    return dealt, ~clashes(dealt)


def _content_ids(corpus: TokenizedDocuments, sentences: Sentences) -> np.ndarray:
    """A number for each sentence, the same for the same words."""
    seen: dict[bytes, int] = {}
    bounds = zip(sentences.start, sentences.end, strict=True)
    return np.array([seen.setdefault(corpus.tokens[i:j].tobytes(), len(seen)) for i, j in bounds], np.int64)


def assemble(
    corpus: TokenizedDocuments, sentences: Sentences, pairs: Pairs, max_positions: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay out `[CLS] A [SEP] B [SEP]` for every pair, cutting the longer sentence first where it is too long.

    Returns:
        ids (int32) and segments (int8; 1 for `[CLS] A [SEP]`, 2 for `B [SEP]`) of all pairs end to end, and the
        offsets (int64): pair p is `ids[offsets[p]:offsets[p + 1]]`.
    """
    length_a, length_b = cut_lengths(
        sentences.end[pairs.a] - sentences.start[pairs.a],
        sentences.end[pairs.b] - sentences.start[pairs.b],
        max_positions - SPECIALS_IN_A_PAIR,
    )
    offsets = np.concatenate([[0], np.cumsum(length_a + length_b + SPECIALS_IN_A_PAIR)])
    start = offsets[:-1]
    ids = np.empty(offsets[-1], np.int32)
    ids[start] = CLS
    ids[start + 1 + length_a] = SEP
    ids[offsets[1:] - 1] = SEP
    ids[ranges(start + 1, length_a)] = corpus.tokens[ranges(sentences.start[pairs.a], length_a)]
    ids[ranges(start + 2 + length_a, length_b)] = corpus.tokens[ranges(sentences.start[pairs.b], length_b)]
    segments = np.ones(offsets[-1], np.int8)
    segments[ranges(start + 2 + length_a, length_b + 1)] = 2
    return ids, segments, offsets


def cut_lengths(length_a: np.ndarray, length_b: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """The lengths left when tokens are taken one by one from the longer of the two until both fit in `room`."""
    shorter = np.minimum(length_a, length_b)
    kept_a = np.where(length_a <= length_b, shorter, room - shorter)
    kept_b = np.where(length_a <= length_b, room - shorter, shorter)
    both_cut = shorter > room // 2
    kept_a, kept_b = np.where(both_cut, room - room // 2, kept_a), np.where(both_cut, room // 2, kept_b)
    fits = length_a + length_b <= room
    return np.where(fits, length_a, kept_a), np.where(fits, length_b, kept_b)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The index ranges `starts[i] ... starts[i] + lengths[i] - 1`, end to end."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
