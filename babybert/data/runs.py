"""Segments as BERT has them: runs of consecutive sentences that together fill a pair, with numpy over flat arrays.

Each document is cut into chunks of whole sentences, as many as fit into a target length. The target is the longest pair
that is allowed, and in one of ten cases a shorter length drawn at random, so that a model sees short input, too
(Devlin et al., 2019; `create_pretraining_data.py`). Each chunk is cut between two of its sentences, drawn at random:
segment A is what comes before, segment B the rest.

BERT fills the B of a negative from a random place in another document up to the target, also where the true B ends
before it because its document does. Then lengths tell the labels apart. Here the true Bs are exchanged for others of
the same format, by `make_pairs`.
"""

from dataclasses import dataclass

import numpy as np

from babybert.data.sentences import Sentences

RUNS_STREAM = 3  # keeps these random numbers apart from those that other modules draw with the same seed
SHORTER_SHARE = 0.1  # of the targets, as in BERT
SHORTEST_TARGET = 2  # tokens, as in BERT


@dataclass(frozen=True)
class Runs:
    """Runs of sentences: segment A of a pair, then its segment B, then those of the next pair.

    Attributes:
        segments: each run from its first token to its last, like one long sentence.
        formats: what each looks like apart from its words (runs, 2; int64): twice its length, up to that of a pair, and
            1 more if it ends its document; how many sentences it has.
    """

    segments: Sentences
    formats: np.ndarray


def make_runs(sentences: Sentences, max_tokens: int, seed: int, split: int, block: int = 0) -> Runs:
    """Cut documents into pairs of runs.

    A chunk has at least two sentences, even if they are longer than its target; what does not fit into a pair,
    `assemble` removes. A single sentence that is left at the end of a document is in no run. The result is a function
    of the sentences, `seed`, the split's index, and the index of the block that they are in.

    Args:
        sentences: of whole documents.
        max_tokens: the most tokens of both segments together.
        seed: see `PrepareConfig`.
        split: the split's index.
        block: the block's index.
    """
    rng = np.random.default_rng((seed, RUNS_STREAM, split, block))
    first, stop, document_stop = _cut_into_chunks(sentences, max_tokens, rng)
    middle = rng.integers(first + 1, stop)
    starts = np.column_stack([first, middle]).reshape(-1)
    stops = np.column_stack([middle, stop]).reshape(-1)
    start, end = sentences.start[starts], sentences.end[stops - 1]
    lengths = np.minimum(end - start, max_tokens)
    is_last = stops == np.repeat(document_stop, 2)
    segments = Sentences(start, end, sentences.document[starts], sentences.text[starts])
    return Runs(segments, np.column_stack([2 * lengths + is_last, stops - starts]))


def _cut_into_chunks(
    sentences: Sentences, max_tokens: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the first sentence of each chunk, the one after its last, and the one after its document (int64).

    They are in the order of the documents.
    """
    is_first = np.diff(sentences.document, prepend=-1) != 0
    first = np.flatnonzero(is_first)
    document_stop = np.append(first[1:], len(sentences))
    chunks = [np.zeros((0, 3), np.int64)]
    while len(first := first[has_pair := first + 1 < document_stop]):
        # All documents at once: the first chunk of each, then the second of those that go on, and so on.
        document_stop = document_stop[has_pair]
        target = np.full(len(first), max_tokens)
        is_shorter = rng.random(len(first)) < SHORTER_SHARE
        target[is_shorter] = rng.integers(SHORTEST_TARGET, max_tokens + 1, np.count_nonzero(is_shorter))
        fitting = np.searchsorted(sentences.end, sentences.start[first] + target, side="right")
        stop = np.maximum(np.minimum(fitting, document_stop), first + 2)
        chunks.append(np.column_stack([first, stop, document_stop]))
        first = stop
    in_rounds = np.concatenate(chunks)
    first, stop, document_stop = in_rounds[np.argsort(in_rounds[:, 0])].T
    return first, stop, document_stop
