"""Jobs that read a batch of documents: count its words, or tokenize it.

With `basic-english`, a batch is tokenized before the vocabulary is known. Its tokens have the provisional ids of the
batch, and its summary has the words that they stand for, with their counts.
"""

import functools
import itertools
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from babybert.corpus.batches import DocumentBatch
from babybert.corpus.files import BadRows
from babybert.data.basic_english import BasicEnglishTokenizer
from babybert.data.block_plan import count_bins
from babybert.data.engine import Arrays
from babybert.data.pieces import Pieces, PiecesBuilder, digest_of
from babybert.data.tokenizer import Tokenizer
from babybert.data.wordpiece_trainer import ChunkCounts, level_of

DOCUMENTS_PER_CALL = 256  # of `tokenizers`, which uses all cores unless TOKENIZERS_PARALLELISM is false


class BatchSettings(NamedTuple):
    """The settings that reading a batch depends on; see `PrepareConfig`."""

    seed: int
    validation_fraction: float
    skip_bad_rows: bool
    segments: str


@dataclass
class BatchSummary:
    """What the driver is told about a batch that was tokenized.

    Attributes:
        documents: how many there are, by split (training, held out).
        tokens: how many tokens they have, by split.
        bins: where in the histogram they are; see `count_bins`.
        bin_tokens: how many tokens are there.
        fingerprint: the sum of the digests of the documents.
        bad_rows: the rows and files that were skipped.
        long_words: how many words are too long for the vocabulary.
        words: the word of each provisional id; none if the ids are final.
        word_counts: how often each of them occurs.
        other_sentence_ends: the sentence ends outside ASCII among them.
    """

    documents: np.ndarray
    tokens: np.ndarray
    bins: np.ndarray
    bin_tokens: np.ndarray
    fingerprint: int
    bad_rows: BadRows
    long_words: int
    words: list[bytes] = field(default_factory=list)
    word_counts: np.ndarray | None = None
    other_sentence_ends: list[bytes] = field(default_factory=list)


def count_chunks(batch: DocumentBatch, settings: BatchSettings) -> tuple[ChunkCounts, list[Arrays]]:
    """Count the chunks of text from which a WordPiece vocabulary is trained."""
    bad_rows = BadRows(settings.skip_bad_rows, quiet=True)
    counts = ChunkCounts()
    for document in batch.read(bad_rows):
        counts.add(document.text, level_of(digest_of(document.text, settings.seed).text))
    return counts, []


def tokenize_words(batch: DocumentBatch, settings: BatchSettings) -> tuple[BatchSummary, list[Arrays]]:
    """Tokenize with the rules of `basic-english`. The data is the batch's `Pieces`, with provisional ids."""
    bad_rows = BadRows(settings.skip_bad_rows, quiet=True)
    tokenizer = BasicEnglishTokenizer()
    end_ids = None if settings.segments == "runs" else tokenizer.sentence_end_ids
    builder = PiecesBuilder(settings.seed, settings.validation_fraction, end_ids)
    for document in batch.read(bad_rows):
        if settings.segments == "runs":
            builder.add(document.text, *tokenizer.add_sentences(document.text))
        else:
            builder.add(document.text, tokenizer.add(document.text))
    pieces = builder.finish()
    summary = _summarize(pieces, builder.fingerprint, bad_rows, tokenizer.long_words)
    summary.words = tokenizer.words
    summary.word_counts = tokenizer.counts
    summary.other_sentence_ends = tokenizer.other_sentence_ends
    return summary, [pieces]


def tokenize_with(
    batch: DocumentBatch, settings: BatchSettings, tokenizer_file: Arrays
) -> tuple[BatchSummary, list[Arrays]]:
    """Tokenize with a tokenizer that is complete. The data is the batch's `Pieces`, with final ids.

    `tokenizer_file` is the content of `tokenizer.json` as one array (uint8).
    """
    bad_rows = BadRows(settings.skip_bad_rows, quiet=True)
    tokenizer = load_tokenizer(tokenizer_file[0].tobytes())
    end_ids = None if settings.segments == "runs" else tokenizer.sentence_end_ids
    builder = PiecesBuilder(settings.seed, settings.validation_fraction, end_ids)
    long_words = 0
    documents = batch.read(bad_rows)
    while some_documents := list(itertools.islice(documents, DOCUMENTS_PER_CALL)):
        texts = [document.text for document in some_documents]
        if settings.segments == "runs":
            for text, tokens in zip(texts, tokenizer.encode_sentences(texts), strict=True):
                builder.add(text, *tokens)
        else:
            for text, ids in zip(texts, tokenizer.encode_documents(texts), strict=True):
                builder.add(text, ids)
        long_words += sum(map(tokenizer.count_long_words, texts))
    pieces = builder.finish()
    return _summarize(pieces, builder.fingerprint, bad_rows, long_words), [pieces]


@functools.lru_cache(maxsize=1)
def load_tokenizer(content: bytes) -> Tokenizer:
    """Make a tokenizer of the content of its file. A process does so once for all its batches."""
    return Tokenizer.of_json(content)


def _summarize(pieces: Pieces, fingerprint: int, bad_rows: BadRows, long_words: int) -> BatchSummary:
    documents, tokens = count_documents(pieces)
    return BatchSummary(documents, tokens, *count_bins(pieces), fingerprint, bad_rows, long_words)


def count_documents(pieces: Pieces) -> tuple[np.ndarray, np.ndarray]:
    """Return how many documents there are by split, and how many tokens they have (int64)."""
    documents = np.bincount(pieces.held_out[pieces.is_first].astype(np.int64), minlength=2)
    tokens = np.bincount(pieces.held_out.astype(np.int64), pieces.lengths, 2)
    return documents, tokens.astype(np.int64)
