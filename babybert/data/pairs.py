"""Documents to sentence pairs for next sentence prediction (NSP), with numpy over flat arrays.

Sentences and pairs are index ranges into one array of token ids, so no Python object is made per token or sentence.

Sentences 0 and 1 of a document make one pair, 2 and 3 the next: every sentence is used once. Half of the pairs become
negatives (is_next 0): their second sentences are permuted among these pairs, each to another document. So both labels
have second sentences of the same kind, and a model must compare A with B to tell the labels apart. Devlin et al. (2019)
draw B from the whole corpus, so a B that opens a document is certainly a negative. `is_next` is 1 where B follows A;
Google's BERT uses the opposite.

Runs of sentences (`runs.py`) become pairs in the same way. The two runs of a pair fill it together, so their lengths
depend on each other. Therefore, a run is exchanged for one of the same format.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from babybert.data.sentences import Sentences, TokenizedDocuments
from babybert.data.tokenizer import CLS, SEP

SPECIALS_IN_A_PAIR = 3  # [CLS] A [SEP] B [SEP]
NEGATIVES_STREAM = 1  # keeps these random numbers apart from those that other modules draw with the same seed
MAX_PERMUTATIONS = 100

Length = TypeVar("Length", int, np.ndarray)


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs as indices into `Sentences`.

    Attributes:
        a: index of each pair's first sentence (int64).
        b: index of its second sentence (int64).
        is_next: 1 where `b` follows `a` in its document, else 0 (int8).
        without_negative: how many pairs were left out because no second sentence makes them a negative.
    """

    a: np.ndarray
    b: np.ndarray
    is_next: np.ndarray
    without_negative: int = 0

    def __len__(self) -> int:
        return len(self.a)


def make_pairs(
    documents: TokenizedDocuments,
    sentences: Sentences,
    seed: int,
    split: int,
    block: int = 0,
    formats: np.ndarray | None = None,
) -> Pairs:
    """Pair neighbouring sentences, then permute the second sentences of half the pairs across documents.

    With `formats`, of `Runs`, each place gets one of the same format, or the most similar one that there is.

    The second sentence of a negative is never from the same document or a copy of it, nor word for word the true next
    one. Pairs for which there is no such sentence (in a corpus of one document, or of equal sentences) are left out and
    counted. The result is a function of `seed`, the split's index, and the index of the block that `documents` are.
    """
    rng = np.random.default_rng((seed, NEGATIVES_STREAM, split, block))
    if len(sentences) < 2:
        empty = np.zeros(0, np.int64)
        return Pairs(empty, empty, empty.astype(np.int8))
    first_of_document = np.searchsorted(sentences.document, sentences.document, side="left")
    index_in_document = np.arange(len(sentences)) - first_of_document
    has_next = np.append(sentences.document[1:] == sentences.document[:-1], False)
    a = np.flatnonzero((index_in_document % 2 == 0) & has_next)
    b = a + 1
    is_next = np.ones(len(a), np.int8)

    negatives = np.sort(rng.permutation(len(a))[: len(a) // 2])
    contents = _content_ids(documents, sentences)
    if formats is None:
        b[negatives], is_valid = _permute_across_documents(b[negatives], sentences.text, contents, rng)
    else:
        b[negatives], is_valid = _exchange_in_formats(b[negatives], formats, sentences.text, contents, rng)
    is_next[negatives] = 0
    keep = np.ones(len(a), bool)
    keep[negatives[~is_valid]] = False
    return Pairs(a[keep], b[keep], is_next[keep], int(np.count_nonzero(~keep)))


def _permute_across_documents(
    true_next: np.ndarray, texts: np.ndarray, contents: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Permute sentences so that each place gets one of another text, and with other words, than it had.

    Invalid places are permuted again, together with as many random others, until none is left or, in a corpus that is
    too small, `MAX_PERMUTATIONS` have been tried.

    Returns:
        the permuted sentences, and for each place whether it is valid.
    """
    permuted = rng.permutation(true_next)
    for _ in range(MAX_PERMUTATIONS):
        invalid = np.flatnonzero(_is_invalid(permuted, true_next, texts, contents))
        if not len(invalid):
            break
        others = rng.choice(len(permuted), size=min(len(invalid) + 1, len(permuted)), replace=False)
        places = np.union1d(invalid, others)
        permuted[places] = rng.permutation(permuted[places])
    return permuted, ~_is_invalid(permuted, true_next, texts, contents)


def _is_invalid(sentences: np.ndarray, true_next: np.ndarray, texts: np.ndarray, contents: np.ndarray) -> np.ndarray:
    """Return which sentences are of the same text as the true next one, or have its words."""
    return np.asarray((texts[sentences] == texts[true_next]) | (contents[sentences] == contents[true_next]))


def _exchange_in_formats(
    true_next: np.ndarray, formats: np.ndarray, texts: np.ndarray, contents: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Exchange runs so that each place gets one of the same format, of another text, and with other words, than it had.

    In the order of formats, and at random among equal ones, each place gets the next run of the same length, and the
    last place the first one. Invalid places are then permuted with others nearby, at a distance that doubles each time,
    until none is left or `MAX_PERMUTATIONS` have been tried.

    Returns:
        the exchanged runs, and for each place whether it is valid.
    """
    count = len(true_next)
    order = np.lexsort((rng.random(count), formats[true_next, 1], formats[true_next, 0]))
    true_next = true_next[order]
    is_last_of_length = np.diff(formats[true_next, 0], append=-1) != 0
    source = np.arange(1, count + 1)
    source[is_last_of_length] = np.append(0, source[is_last_of_length])[:-1]
    exchanged = true_next[source]
    for attempt in range(MAX_PERMUTATIONS):
        invalid = np.flatnonzero(_is_invalid(exchanged, true_next, texts, contents))
        if not len(invalid):
            break
        distance = min(2 << attempt, count)
        others = np.clip(invalid + rng.integers(-distance, distance + 1, len(invalid)), 0, count - 1)
        places = np.union1d(invalid, others)
        nearby = np.argsort(places + rng.uniform(0, distance + 1, len(places)))
        exchanged[places] = exchanged[places[nearby]]
    in_place = np.argsort(order)
    return exchanged[in_place], ~_is_invalid(exchanged, true_next, texts, contents)[in_place]


def _content_ids(documents: TokenizedDocuments, sentences: Sentences) -> np.ndarray:
    """Return a number for each sentence; sentences of the same words have the same number."""
    ids_by_content: dict[bytes, int] = {}
    content_ids = np.empty(len(sentences), np.int64)
    for sentence, (start, end) in enumerate(zip(sentences.start, sentences.end, strict=True)):
        content = documents.tokens[start:end].tobytes()
        content_ids[sentence] = ids_by_content.setdefault(content, len(ids_by_content))
    return content_ids


def assemble(
    documents: TokenizedDocuments, sentences: Sentences, pairs: Pairs, max_positions: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay out every pair as `[CLS] A [SEP] B [SEP]`, truncated to `max_positions` tokens (longest sentence first).

    Returns:
        ids (int32) of all pairs one after the other: pair p is `ids[offsets[p]:offsets[p + 1]]`;
        segments (int8) of the same shape, 1 for `[CLS] A [SEP]` and 2 for `B [SEP]`;
        offsets (int64), one more than there are pairs.
    """
    length_a, length_b = truncate_longest_first(
        sentences.end[pairs.a] - sentences.start[pairs.a],
        sentences.end[pairs.b] - sentences.start[pairs.b],
        max_positions - SPECIALS_IN_A_PAIR,
    )
    offsets = np.concatenate([[0], np.cumsum(length_a + length_b + SPECIALS_IN_A_PAIR)])
    start = offsets[:-1]
    start_a = start + 1
    start_b = start_a + length_a + 1

    ids = np.empty(offsets[-1], np.int32)
    ids[start] = CLS
    ids[ranges(start_a, length_a)] = documents.tokens[ranges(sentences.start[pairs.a], length_a)]
    ids[start_b - 1] = SEP
    ids[ranges(start_b, length_b)] = documents.tokens[ranges(sentences.start[pairs.b], length_b)]
    ids[offsets[1:] - 1] = SEP

    segments = np.ones(offsets[-1], np.int8)
    segments[ranges(start_b, length_b + 1)] = 2
    return ids, segments, offsets


def truncate_longest_first(length_a: Length, length_b: Length, max_length: int) -> tuple[Length, Length]:
    """Return how many tokens of two sentences to keep so that both together have at most `max_length`.

    The result is that of removing tokens one by one from the longer sentence, from B if both are equally long. Lengths
    are two ints, or two arrays for many pairs at once.
    """
    if isinstance(length_a, np.ndarray):
        kept_b = np.minimum(length_b, np.maximum(max_length - length_a, max_length // 2))
        return np.minimum(length_a, max_length - kept_b), kept_b
    # The same for one pair, as in serving: numpy would take longer than the arithmetic.
    kept_b = min(length_b, max(max_length - length_a, max_length // 2))
    return min(length_a, max_length - kept_b), kept_b


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the index ranges `starts[i], ..., starts[i] + lengths[i] - 1` one after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    indices: np.ndarray = np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
    return indices
