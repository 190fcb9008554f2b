"""`babybert prepare`: from a corpus, or from tables of masked pairs, to a folder of prepared data.

The folder has `tokenizer.json`, the shards of the table (`train-00000.csv`, `validation-00000.csv`, ...),
`vocabulary.csv` (token counts of the training pairs, for the unigram baseline) and `dataset.json`. Everything is
written to `.partial/` and moved at the end, `dataset.json` last. So files that a killed or failed command leaves are
never taken for a dataset, and the next command deletes them.

A corpus is read once: its documents are tokenized into a spool on disk, from which pairs are made block by block.
Memory holds the vocabulary, one block, and about 60 bytes per document. WordPiece reads the corpus twice, because its
vocabulary has to be trained before any text can be tokenized.
"""

import contextlib
import itertools
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from babybert.config import PrepareConfig
from babybert.corpus.documents import Corpus, open_corpus
from babybert.corpus.download import find_files
from babybert.corpus.files import BadRows
from babybert.data.basic_english import BasicEnglishTokenizer
from babybert.data.dataset import SPLITS
from babybert.data.dataset_writer import DatasetWriter, SplitStatistics
from babybert.data.masking import mask_tokens
from babybert.data.pairs import assemble, make_pairs
from babybert.data.sentences import TokenizedDocuments, split_sentences
from babybert.data.spool import Spool
from babybert.data.table import TABLE_ENDINGS, Examples, read_table
from babybert.data.tokenizer import MAX_WORD_CHARACTERS, SENTENCE_ENDS, Tokenizer
from babybert.data.wordpiece_trainer import WordPieceTrainer
from babybert.errors import UsageError, cannot_write
from babybert.progress import Progress

logger = logging.getLogger(__name__)

DOCUMENTS_PER_BATCH = 256  # tokenized in one call, which uses all cores
WORDPIECE_VOCAB_SIZE = 30_522  # BERT's


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Prepare the data that `config` describes and return the content of `dataset.json`.

    Raises DataError for a corpus that cannot be used, UsageError if the folder has data already or must not be
    written, StorageError if the disk is full or fails. In each case, earlier data in the folder stays as it was.
    """
    if (config.out / "dataset.json").exists() and not config.overwrite:
        raise UsageError(
            f"{config.out}: has prepared data already; add --overwrite to replace it, or choose another --out"
        )
    with _temporary_folders(config.out) as (partial, work):
        if config.corpus == "table":
            facts = _import_tables(config, partial, work)
        else:
            facts = _prepare_corpus(config, partial, work)
        _move_into_place(partial, config.out)
    return facts


@contextlib.contextmanager
def _temporary_folders(out: Path) -> Iterator[tuple[Path, Path]]:
    """Make an empty folder for finished files and one for everything else.

    On exit both are deleted, and so is `out` if it is new and nothing was moved into it. OSError becomes an error that
    tells the user what to do.
    """
    out_is_new = not out.exists()
    folders = (out / ".partial", out / ".work")
    try:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        yield folders
    except OSError as error:
        message = f"{out}: cannot write the data: {error.strerror}; make room or choose another --out"
        raise cannot_write(message, error) from error
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        if out_is_new and out.is_dir() and not any(out.iterdir()):
            out.rmdir()


def _move_into_place(partial: Path, out: Path) -> None:
    """Replace the data in `out`. Without `dataset.json`, deleted first and moved last, it is no dataset meanwhile."""
    (out / "dataset.json").unlink(missing_ok=True)
    for split in SPLITS:
        for old_shard in out.glob(f"{split}-*"):
            old_shard.unlink()
    shutil.rmtree(out / ".cache", ignore_errors=True)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "dataset.json"):
        path.replace(out / path.name)


def _prepare_corpus(config: PrepareConfig, partial: Path, work: Path) -> dict[str, Any]:
    """Make a dataset from documents."""
    bad_rows = BadRows(config.skip_bad_rows)
    corpus = open_corpus(config, work, bad_rows)
    with Spool(work / "tokens", config.seed, config.validation_fraction) as spool:
        tokenizer, final_ids, long_words = _tokenize(config, corpus, spool)
        writer = DatasetWriter(config, partial, tokenizer)
        documents = sum(spool.documents.values())
        writer.facts.update(documents=documents, tokens=spool.tokens)
        logger.info(f"{documents:,} documents, {spool.tokens:,} tokens, vocabulary {tokenizer.size:,}")
        for split_index, split in enumerate(SPLITS):
            held_out = split == "validation"  # the spool keeps its counts by this flag
            statistics = SplitStatistics(tokenizer.size, documents=spool.documents[held_out])
            blocks = spool.blocks(held_out, final_ids)
            with Progress(f"write {split}", spool.tokens_of[held_out], "tokens") as progress:
                writer.write_split(
                    split,
                    _make_examples(blocks, tokenizer, config, split_index, statistics, progress),
                    statistics,
                    error_if_empty=f"{writer.facts['source']}: {statistics.documents} {split} documents "
                    "give no sentence pairs; more or longer documents are needed",
                )
    if long_words:
        writer.facts["long_words"] = long_words
        logger.warning(f"words of more than {MAX_WORD_CHARACTERS} characters: {long_words:,}; each became [UNK]")
    return writer.finish(bad_rows.count)


def _import_tables(config: PrepareConfig, partial: Path, work: Path) -> dict[str, Any]:
    """Make a dataset from externally prepared tables (the course's, for example), which keep their masks."""
    assert config.tokenizer is not None  # PrepareConfig requires it for --corpus table
    tokenizer = Tokenizer.load(config.tokenizer)
    bad_rows = BadRows(config.skip_bad_rows)
    writer = DatasetWriter(config, partial, tokenizer)
    for split, sources in zip(SPLITS, (config.source, config.validation_source), strict=True):
        paths = [path for source in sources for path in find_files(source, TABLE_ENDINGS, work / split)]
        with Progress(f"read {split}", sum(path.stat().st_size for path in paths), "bytes") as progress:
            writer.write_split(
                split,
                _read_tables(paths, tokenizer.size, bad_rows, progress),
                SplitStatistics(tokenizer.size),
                error_if_empty=f"{', '.join(map(str, paths))}: every row is bad",
            )
    return writer.finish(bad_rows.count)


def _read_tables(paths: list[Path], vocab_size: int, bad_rows: BadRows, progress: Progress) -> Iterator[Examples]:
    for path in paths:
        yield from read_table(path, vocab_size, bad_rows)
        progress.advance(path.stat().st_size)


def _tokenize(config: PrepareConfig, corpus: Corpus, spool: Spool) -> tuple[Tokenizer, np.ndarray | None, int]:
    """Fill the spool with the tokens of all documents.

    Returns:
        the tokenizer; the final id of each provisional id in the spool, None if the ids in it are final; and how many
        words were too long for the vocabulary.
    """
    if config.tokenizer is None and config.tokenizer_kind == "basic-english":
        basic_english = BasicEnglishTokenizer()
        for document in corpus.documents("tokenize"):
            ids = basic_english.add(document.text)
            spool.add(document.text, ids, basic_english.provisional_ids(SENTENCE_ENDS))
        return *basic_english.finish(config.min_frequency, config.vocab_size), basic_english.long_words
    tokenizer = _load_or_train_tokenizer(config, corpus)
    end_ids = tokenizer.sentence_end_ids()
    long_words = 0
    documents = corpus.documents("tokenize")
    while batch := list(itertools.islice(documents, DOCUMENTS_PER_BATCH)):
        texts = [document.text for document in batch]
        for text, ids in zip(texts, tokenizer.encode_documents(texts), strict=True):
            spool.add(text, ids, end_ids)
        long_words += sum(map(tokenizer.count_long_words, texts))
    return tokenizer, None, long_words


def _load_or_train_tokenizer(config: PrepareConfig, corpus: Corpus) -> Tokenizer:
    if config.tokenizer is not None:
        return Tokenizer.load(config.tokenizer)
    trainer = WordPieceTrainer()
    for document in corpus.documents("vocabulary"):
        trainer.add(document.text)
    return trainer.finish(config.min_frequency, config.vocab_size or WORDPIECE_VOCAB_SIZE)


def _make_examples(
    blocks: Iterator[TokenizedDocuments],
    tokenizer: Tokenizer,
    config: PrepareConfig,
    split_index: int,
    statistics: SplitStatistics,
    progress: Progress,
) -> Iterator[Examples]:
    """Yield the masked pairs of each block. Training pairs come `config.duplicates` times, with other masks each time.

    Counts the sentences in `statistics`, and moves `progress` on by the tokens of each block.
    """
    end_ids = tokenizer.sentence_end_ids()
    is_training = split_index == 0
    first_row = 0
    for block_index, block in enumerate(blocks):
        sentences = split_sentences(block, end_ids)
        pairs = make_pairs(block, sentences, config.seed, split_index, block_index)
        ids, segments, offsets = assemble(block, sentences, pairs, config.max_positions)
        rows = np.arange(first_row, first_row + len(pairs))
        for copy in range(config.duplicates if is_training else 1):
            # Even epochs for training pairs, odd ones for held-out pairs: equal rows get different masks.
            epoch = 2 * copy + split_index
            masked_ids, labels = mask_tokens(ids, offsets, tokenizer.size, config.seed, epoch, rows)
            yield Examples(masked_ids, labels, segments, offsets, pairs.is_next)
        first_row += len(pairs)
        statistics.sentences += len(sentences)
        progress.advance(len(block.tokens))
