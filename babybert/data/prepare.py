"""`babybert prepare`: from a corpus, or from tables of masked pairs, to a folder of prepared data.

The folder has `tokenizer.json`, the shards of the table (`train-00000.csv`, `validation-00000.csv`, ...),
`vocabulary.csv` (token counts of the training pairs, for the unigram baseline) and `dataset.json`. Everything is
written to `.partial/` and moved at the end, `dataset.json` last. So files that a killed or failed command leaves are
never taken for a dataset, and the next command deletes them.

`prepare_corpus.py` says how documents become shards. Only what a killed command has finished is used again.
"""

import contextlib
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from babybert.config import PrepareConfig
from babybert.corpus.documents import file_size, open_corpus
from babybert.corpus.files import BadRows
from babybert.corpus.sources import SourceFiles, find_files
from babybert.data.dataset import SPLITS
from babybert.data.dataset_writer import DatasetWriter
from babybert.data.engines import choose_engine
from babybert.data.prepare_corpus import prepare_corpus
from babybert.data.split_statistics import SplitStatistics
from babybert.data.table import TABLE_ENDINGS, Examples, read_table
from babybert.data.tokenizer import Tokenizer
from babybert.errors import DataError, UsageError, cannot_write, os_reason
from babybert.folders import lock_folder
from babybert.progress import Progress


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
            _empty(partial)
            facts = _import_tables(config, partial, work)
        else:
            facts = _prepare_corpus(config, partial, work)
        _move_into_place(facts, partial, config.out)
    return facts


@contextlib.contextmanager
def _temporary_folders(out: Path) -> Iterator[tuple[Path, Path]]:
    """Make a folder for finished files and an empty one for everything else, and delete both on exit.

    The first one may have files of a command that was killed. OSError becomes an error that tells the user what to do.
    """
    partial, work = folders = (out / ".partial", out / ".work")
    try:
        partial.mkdir(exist_ok=True)
        _empty(work)
        yield folders
    except OSError as error:
        message = f"{out}: cannot write the data: {os_reason(error)}; make room or choose another --out"
        raise cannot_write(message, error) from error
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _empty(folder: Path) -> None:
    """Make a new folder; an earlier one is deleted."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _require_replaceable(config: PrepareConfig) -> None:
    """Raise UsageError if the folder has prepared data that must not be replaced."""
    if (config.out / "dataset.json").exists() and not config.overwrite:
        raise UsageError(
            f"{config.out}: has prepared data already; add --overwrite to replace it, or choose another --out"
        )


def _move_into_place(facts: dict[str, Any], partial: Path, out: Path) -> None:
    """Replace the data in `out`. Without `dataset.json`, deleted first and moved last, it is no dataset meanwhile."""
    (out / "dataset.json").unlink(missing_ok=True)
    for split in SPLITS:
        for old_shard in out.glob(f"{split}-*"):
            old_shard.unlink()
    shutil.rmtree(out / ".cache", ignore_errors=True)
    shards = [shard["file"] for split in SPLITS for shard in facts["shards"][split]]
    for name in (*shards, *facts["files"], "dataset.json"):
        (partial / name).replace(out / name)


def _prepare_corpus(config: PrepareConfig, partial: Path, work: Path) -> dict[str, Any]:
    """Make a dataset from documents."""
    bad_rows = BadRows(config.skip_bad_rows)
    corpus = open_corpus(config, work, bad_rows)
    with choose_engine(config, corpus.size, work / "engine") as engine:
        writer = prepare_corpus(config, corpus, bad_rows, partial, engine)
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
    return {"source_files": {"found": found, "left_out": dict(sorted(left_out.items())), "bad": sorted(bad_rows.files)}}
