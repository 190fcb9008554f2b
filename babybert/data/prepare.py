"""`babybert prepare`: from a corpus, or from tables of masked pairs, to prepared data in a folder or in S3.

A dataset has `tokenizer.json`, the shards of the table (`train-00000.csv`, `validation-00000.csv`, ...),
`vocabulary.csv` (token counts of the training pairs, for the unigram baseline) and `dataset.json`. `dataset_output.py`
says how it appears. Files that a killed or failed command leaves are never taken for a dataset.

`prepare_corpus.py` says how documents become shards. Only what a killed command has finished is used again.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from babybert.config import PrepareConfig
from babybert.corpus.documents import open_corpus
from babybert.corpus.files import BadRows
from babybert.corpus.s3_file import SourceFile, file_size
from babybert.corpus.sources import SourceFiles, find_files
from babybert.data.dataset import SPLITS
from babybert.data.dataset_output import DatasetOutput
from babybert.data.dataset_writer import DatasetWriter
from babybert.data.engine import Engine
from babybert.data.local_engine import InProcessEngine, LocalEngine, usable_cores
from babybert.data.output_folder import OutputFolder
from babybert.data.output_prefix import OutputPrefix
from babybert.data.prepare_corpus import prepare_corpus
from babybert.data.split_statistics import SplitStatistics
from babybert.data.table import TABLE_ENDINGS, Examples, read_table
from babybert.data.tokenizer import Tokenizer
from babybert.errors import DataError, UsageError
from babybert.progress import Progress
from babybert.s3 import is_s3

SMALL_CORPUS_BYTES = 4_000_000  # about a second of work, for which starting processes is not worth it


class PreparedData(NamedTuple):
    """What was prepared.

    Attributes:
        facts: the content of `dataset.json`.
        token_counts_V: how often each token occurs in the training pairs (int64).
    """

    facts: dict[str, Any]
    token_counts_V: np.ndarray


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Prepare the data and return the content of `dataset.json`; see `prepare_data`."""
    return prepare_data(config).facts


def prepare_data(config: PrepareConfig) -> PreparedData:
    """Prepare the data that `config` describes.

    Raises DataError for a corpus that cannot be used, UsageError if there is data already or it must not be written,
    StorageError if the disk is full or fails or S3 stays away, UserError if another process writes there. In each case,
    earlier data stays as it was, unless S3 fails while it is replaced.
    """
    output = open_output(config.out)
    output.require_replaceable(config.overwrite)
    with output.open():
        output.require_replaceable(config.overwrite)  # again: another process may have been faster
        make = _import_tables if config.corpus == "table" else _prepare_corpus
        writer = make(config, output)
        output.publish(writer.facts)
    return PreparedData(writer.facts, writer.token_counts_V)


def open_output(out: Path | str) -> DatasetOutput:
    """Return where to write the dataset."""
    if is_s3(str(out)):
        return OutputPrefix(str(out))
    return OutputFolder(Path(out))


def _prepare_corpus(config: PrepareConfig, output: DatasetOutput) -> DatasetWriter:
    """Make a dataset from documents."""
    bad_rows = BadRows(config.skip_bad_rows)
    corpus = open_corpus(config, output.work, bad_rows)
    with choose_engine(config, corpus.size, output.work / "engine") as engine:
        output.check_workers(engine)
        writer = prepare_corpus(config, corpus, bad_rows, output, engine)
    writer.facts.update(_describe_files([corpus.files], bad_rows))
    writer.finish(bad_rows.count)
    return writer


def choose_engine(config: PrepareConfig, corpus_bytes: int, folder: Path) -> Engine:
    """Return an engine that has not been started.

    Args:
        config: the settings.
        corpus_bytes: about how large the corpus is.
        folder: where the engine may keep files.
    """
    workers = usable_cores() if config.workers is None else config.workers
    if config.engine == "ray":
        try:
            from babybert.data.ray_engine import RayEngine
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
            raise UsageError("--engine ray needs Ray: pip install 'babybert-pretrain[ray]'") from error
        return RayEngine(folder, config.workers if config.ray_address else workers, config.ray_address)
    if workers == 1 or corpus_bytes < SMALL_CORPUS_BYTES:
        return InProcessEngine(folder)
    return LocalEngine(folder, workers)


def _import_tables(config: PrepareConfig, output: DatasetOutput) -> DatasetWriter:
    """Make a dataset from externally prepared tables (the course's, for example), which keep their masks."""
    assert config.tokenizer is not None  # PrepareConfig requires it for --corpus table
    tokenizer = Tokenizer.load(config.tokenizer)
    bad_rows = BadRows(config.skip_bad_rows)
    output.delete_all_except(())
    writer = DatasetWriter(config, output, tokenizer)
    files = []
    for split, sources in zip(SPLITS, (config.source, config.validation_source), strict=True):
        tables = find_files(sources, TABLE_ENDINGS, output.work / split)
        tables.log()
        files.append(tables)
        with Progress(f"read {split}", sum(map(file_size, tables.paths)), "bytes") as progress:
            examples = _read_tables(tables.paths, config, tokenizer.size, bad_rows, progress)
            writer.write_split(split, examples, SplitStatistics(tokenizer.size))
    writer.facts.update(_describe_files(files, bad_rows))
    writer.finish(bad_rows.count)
    return writer


def _read_tables(
    paths: list[SourceFile], config: PrepareConfig, vocab_size: int, bad_rows: BadRows, progress: Progress
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
    return {"source_files": {"found": found, "left_out": dict(sorted(left_out.items())), "bad": sorted(bad_rows.files)}}
