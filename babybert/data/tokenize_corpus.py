"""The first half of `babybert prepare`: all documents are read and tokenized, and the vocabulary is made."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from babybert.config import PrepareConfig
from babybert.corpus.batches import read_batches
from babybert.corpus.documents import Corpus
from babybert.corpus.files import BadRows
from babybert.data.basic_english import BasicEnglishTokenizer
from babybert.data.block_plan import Histogram
from babybert.data.engine import Engine, Function, Result, WorkerDied, in_order
from babybert.data.fatal_documents import explain_death
from babybert.data.pieces import add_fingerprints
from babybert.data.tokenize_batch import BatchSettings, BatchSummary, count_chunks, tokenize_with, tokenize_words
from babybert.data.tokenizer import Tokenizer
from babybert.data.wordpiece_trainer import WordPieceTrainer

logger = logging.getLogger(__name__)

WORDPIECE_VOCAB_SIZE = 30_522  # BERT's
MOST_SEEN_ONCE = 0.75  # share of tokens; in text with spaces between words it is below, unless the text is very short


class TokenizedBatch(NamedTuple):
    """Handles of what a batch became.

    Attributes:
        pieces: its `Pieces`.
        word_ids: for each provisional id in them, that of the merged vocabulary; None if they are final.
    """

    pieces: Any
    word_ids: Any


@dataclass
class TokenizedCorpus:
    """All documents, tokenized. The counts are sums over the batches.

    Attributes:
        tokenizer: the tokenizer; given, or made from the documents.
        final_ids: the handle of the final id of each provisional id; None if the ids in the batches are final.
        batches: the data.
        documents: how many documents there are, by split (training, held out).
        tokens: how many tokens they have, by split.
        histogram: where the tokens are.
        fingerprint: the sum of the digests of the documents.
        long_words: how many words are too long for the vocabulary.
    """

    tokenizer: Tokenizer
    final_ids: Any = None
    batches: list[TokenizedBatch] = field(default_factory=list)
    documents: np.ndarray = field(default_factory=lambda: np.zeros(2, np.int64))
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(2, np.int64))
    histogram: Histogram = field(default_factory=Histogram)
    fingerprint: int = 0
    long_words: int = 0

    def add(self, summary: BatchSummary, batch: TokenizedBatch) -> None:
        """Count a batch."""
        self.batches.append(batch)
        self.documents += summary.documents
        self.tokens += summary.tokens
        self.histogram.add(summary.bins, summary.bin_tokens)
        self.fingerprint = add_fingerprints(self.fingerprint, summary.fingerprint)
        self.long_words += summary.long_words


class CorpusReader:
    """Gives the batches of a corpus to an engine."""

    def __init__(self, config: PrepareConfig, corpus: Corpus, bad_rows: BadRows, engine: Engine) -> None:
        self._corpus = corpus
        self._bad_rows = bad_rows
        self._engine = engine
        self._settings = BatchSettings(config.seed, config.validation_fraction, config.skip_bad_rows, config.segments)

    def map(self, task: str, function: Function, *arguments: Any, pieces: int = 0) -> Iterator[Result]:
        """Call `function` with each batch, the settings and `arguments`. Yield the results in the order of the batches.

        Raises DataError, naming file and row, for what cannot be read, and for a document that kills each process.
        """
        batches = read_batches(self._corpus, task, self._engine.workers_see_files)
        inputs = ((batch, self._settings, *arguments) for batch in batches)
        try:
            yield from in_order(self._engine.map(function, inputs, pieces))
        except WorkerDied as error:
            raise explain_death(self._engine, function, error, pieces) from error


def tokenize_corpus(config: PrepareConfig, corpus: Corpus, bad_rows: BadRows, engine: Engine) -> TokenizedCorpus:
    """Read and tokenize all documents. Bad rows and files are counted in `bad_rows`."""
    reader = CorpusReader(config, corpus, bad_rows, engine)
    if config.tokenizer is None and config.tokenizer_kind == "basic-english":
        tokenized = _tokenize_words(config, reader, bad_rows, engine)
    else:
        tokenizer = Tokenizer.load(config.tokenizer) if config.tokenizer else _train_wordpiece(config, reader, bad_rows)
        tokenized = TokenizedCorpus(tokenizer)
        tokenizer_file = engine.put([np.frombuffer(tokenizer.json, np.uint8)])
        for result in reader.map("tokenize", tokenize_with, tokenizer_file, pieces=1):
            bad_rows.add(result.summary.bad_rows)
            tokenized.add(result.summary, TokenizedBatch(result.handles[0], None))
    corpus.require_documents(int(tokenized.documents.sum()))
    return tokenized


def _tokenize_words(config: PrepareConfig, reader: CorpusReader, bad_rows: BadRows, engine: Engine) -> TokenizedCorpus:
    vocabulary = BasicEnglishTokenizer()
    tokenized = TokenizedCorpus(Tokenizer.of_words(()))
    for _, summary, (pieces,) in reader.map("tokenize", tokenize_words, pieces=1):
        bad_rows.add(summary.bad_rows)
        word_ids = vocabulary.merge(summary.words, summary.word_counts, summary.other_sentence_ends)
        tokenized.add(summary, TokenizedBatch(pieces, engine.put([word_ids])))
    _warn_of_text_without_spaces(vocabulary.share_seen_once())
    tokenized.tokenizer, final_ids = vocabulary.finish(config.min_frequency, config.vocab_size)
    tokenized.final_ids = engine.put([final_ids])
    return tokenized


def _warn_of_text_without_spaces(share_seen_once: float) -> None:
    if share_seen_once > MOST_SEEN_ONCE:
        logger.warning(
            f"{share_seen_once:.0%} of the tokens occur only once. If the text has no spaces between words, as in "
            "Chinese or Thai, each sentence is one token, and --tokenizer-kind wordpiece is needed to split it"
        )


def _train_wordpiece(config: PrepareConfig, reader: CorpusReader, bad_rows: BadRows) -> Tokenizer:
    trainer = WordPieceTrainer()
    bad_rows.quiet = True  # they are reported when the documents are tokenized
    for result in reader.map("vocabulary", count_chunks):
        trainer.merge(result.summary)
    bad_rows.quiet = False
    return trainer.finish(config.min_frequency, config.vocab_size or WORDPIECE_VOCAB_SIZE)
