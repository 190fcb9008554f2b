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
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from babybert.config import PrepareConfig
from babybert.corpus.documents import Corpus, file_size, open_corpus
from babybert.corpus.files import BadRows
from babybert.corpus.sources import SourceFiles, find_files
from babybert.data.basic_english import BasicEnglishTokenizer
from babybert.data.dataset import SPLITS
from babybert.data.dataset_writer import DatasetWriter, SplitStatistics
from babybert.data.masking import mask_tokens
from babybert.data.pairs import assemble, make_pairs
from babybert.data.sentences import TokenizedDocuments, split_sentences
from babybert.data.splits import ensure_pairs_in_both_splits
from babybert.data.spool import Spool
from babybert.data.table import TABLE_ENDINGS, Examples, read_table
from babybert.data.tokenizer import MAX_WORD_CHARACTERS, Tokenizer
from babybert.data.wordpiece_trainer import WordPieceTrainer
from babybert.errors import DataError, UsageError, cannot_write, os_reason
from babybert.folders import lock_folder
from babybert.progress import Progress

logger = logging.getLogger(__name__)

DOCUMENTS_PER_BATCH = 256  # tokenized in one call, which uses all cores
WORDPIECE_VOCAB_SIZE = 30_522  # BERT's
MOST_SEEN_ONCE = 0.75  # share of tokens; in text with spaces between words it is below, unless the text is very short


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Prepare the data that `config` describes and return the content of `dataset.json`.

    Raises DataError for a corpus that cannot be used, UsageError if the folder has data already or must not be
    written, StorageError if the disk is full or fails, UserError if another process writes into the folder. In each
    case, earlier data in the folder stays as it was.
    """
    _require_replaceable(config)
    with lock_folder(config.out, "--out"), _temporary_folders(config.out) as (partial, work):
        _require_replaceable(config)  # again: another process may have prepared data before this one had the lock
        if config.corpus == "table":
            facts = _import_tables(config, partial, work)
        else:
            facts = _prepare_corpus(config, partial, work)
        _move_into_place(partial, config.out)
    return facts


@contextlib.contextmanager
def _temporary_folders(out: Path) -> Iterator[tuple[Path, Path]]:
    """Make an empty folder for finished files and one for everything else, and delete both on exit.

    OSError becomes an error that tells the user what to do.
    """
    folders = (out / ".partial", out / ".work")
    try:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        yield folders
    except OSError as error:
        message = f"{out}: cannot write the data: {os_reason(error)}; make room or choose another --out"
        raise cannot_write(message, error) from error
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _require_replaceable(config: PrepareConfig) -> None:
    """Raise UsageError if the folder has prepared data that must not be replaced."""
    if (config.out / "dataset.json").exists() and not config.overwrite:
        raise UsageError(
            f"{config.out}: has prepared data already; add --overwrite to replace it, or choose another --out"
        )


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
        ensure_pairs_in_both_splits(spool, tokenizer, final_ids, writer.facts["source"])
        for split_index, split in enumerate(SPLITS):
            held_out = split == "validation"  # the spool keeps its counts by this flag
            statistics = SplitStatistics(tokenizer.size, documents=spool.documents[held_out])
            blocks = spool.blocks(held_out, final_ids)
            with Progress(f"write {split}", spool.tokens_of[held_out], "tokens") as progress:
                examples = _make_examples(blocks, tokenizer, config, split_index, statistics, progress)
                writer.write_split(split, examples, statistics)
    if long_words:
        writer.facts["long_words"] = long_words
        logger.warning(f"words of more than {MAX_WORD_CHARACTERS} characters: {long_words:,}; each became [UNK]")
    writer.facts.update(_describe_files([corpus.files], bad_rows))
    return writer.finish(bad_rows.count)


def _import_tables(config: PrepareConfig, partial: Path, work: Path) -> dict[str, Any]:
    """Make a dataset from externally prepared tables (the course's, for example), which keep their masks."""
    assert config.tokenizer is not None  # PrepareConfig requires it for --corpus table
    tokenizer = Tokenizer.load(config.tokenizer)
    bad_rows = BadRows(config.skip_bad_rows)
    writer = DatasetWriter(config, partial, tokenizer)
    files = []
    for split, sources in zip(SPLITS, (config.source, config.validation_source), strict=True):
        tables = find_files(sources, TABLE_ENDINGS, work / split)
        tables.log()
        files.append(tables)
        with Progress(f"read {split}", sum(map(file_size, tables.paths)), "bytes") as progress:
            examples = _read_tables(tables.paths, config, tokenizer.size, bad_rows, progress)
            writer.write_split(split, examples, SplitStatistics(tokenizer.size))
    writer.facts.update(_describe_files(files, bad_rows))
    return writer.finish(bad_rows.count)


def _read_tables(
    paths: list[Path], config: PrepareConfig, vocab_size: int, bad_rows: BadRows, progress: Progress
) -> Iterator[Examples]:
    """Yield the pairs of all tables. Raises DataError if there is none."""
    is_empty = True
    for path in paths:
        with bad_rows.bad_file(path):
            for examples in read_table(path, vocab_size, bad_rows, config.delimiter):
                is_empty = False
                yield examples
        progress.advance(file_size(path))
    if is_empty:
        raise DataError(f"{', '.join(map(str, paths))}: every row or file is bad")


def _describe_files(files: list[SourceFiles], bad_rows: BadRows) -> dict[str, Any]:
    """Return what `dataset.json` records about the files that were found; nothing about one file that was read."""
    found = sum(len(source_files.paths) for source_files in files)
    left_out = sum((source_files.left_out for source_files in files), Counter[str]())
    if found <= len(files) and not left_out and not bad_rows.files:
        return {}
    return {"source_files": {"found": found, "left_out": dict(sorted(left_out.items())), "bad": bad_rows.files}}


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
            spool.add(document.text, ids, basic_english.sentence_end_ids())
        _warn_of_text_without_spaces(basic_english.share_seen_once())
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


def _warn_of_text_without_spaces(share_seen_once: float) -> None:
    if share_seen_once > MOST_SEEN_ONCE:
        logger.warning(
            f"{share_seen_once:.0%} of the tokens occur only once. If the text has no spaces between words, as in "
            "Chinese or Thai, each sentence is one token, and --tokenizer-kind wordpiece is needed to split it"
        )


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

    Counts sentences and pairs without a negative in `statistics`, and moves `progress` on by the tokens of each block.
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
        statistics.without_negative += pairs.without_negative
        progress.advance(len(block.tokens))
