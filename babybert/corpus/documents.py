"""Where documents come from: the built-in demo, IMDB, or the user's text, CSV, JSON Lines or Parquet files.

A corpus can be read from start to end as often as needed and is never held in memory.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from babybert.config import PrepareConfig
from babybert.corpus import imdb
from babybert.corpus.demo import generate_reviews
from babybert.corpus.download import download
from babybert.corpus.files import COMPRESSION_SUFFIXES, BadRows, file_errors
from babybert.corpus.readers import (
    Document,
    Reader,
    read_csv,
    read_json,
    read_paragraphs,
    read_parquet,
    read_text,
)
from babybert.corpus.sources import SourceFiles, find_files
from babybert.errors import DataError
from babybert.progress import Progress

__all__ = ["Corpus", "DemoCorpus", "Document", "FileCorpus", "LimitedCorpus", "open_corpus", "source_suffixes"]

SUFFIXES = {
    "text": (".txt",),
    "csv": (".csv",),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
    "imdb": (".txt",),
}


class Corpus(Protocol):
    """A sequence of documents that can be read again."""

    @property
    def files(self) -> SourceFiles:
        """The files that the documents are read from; none if they are generated."""

    def documents(self, task: str) -> Iterator[Document]:
        """Yield all documents in order, with progress shown under the name `task`.

        Raises DataError, naming file and row, for what cannot be read.
        """


@dataclass(frozen=True)
class FileCorpus:
    """The documents of some files. Progress is measured in bytes read.

    Attributes:
        files: the files, in the order in which they are read.
        reader: yields the documents of one file.
        bad_rows: what to do with bad rows and files; its counts are of the latest pass over the files.
    """

    files: SourceFiles
    reader: Reader
    bad_rows: BadRows

    def documents(self, task: str) -> Iterator[Document]:
        """Yield all documents; see `Corpus.documents`.

        A damaged file ends the reading; if bad files are skipped, it yields the documents before the damage. Raises
        DataError if no file gives any document, and at least one is bad.
        """
        self.bad_rows.start_again()
        count = 0
        with Progress(task, sum(map(file_size, self.files.paths)), "bytes") as progress:
            for path in self.files.paths:
                with self.bad_rows.bad_file(path):
                    for document in self._read(path, progress):
                        yield document
                        count += 1
        if self.bad_rows.files and not count:
            raise DataError(f"{self.bad_rows.files[0]}: bad, and no other file has a document; see the messages above")

    def _read(self, path: Path, progress: Progress) -> Iterator[Document]:
        shown = 0
        try:
            with file_errors(path), path.open("rb") as file:
                for document in self.reader(path, file, self.bad_rows):
                    if _is_valid_unicode(document, self.bad_rows):
                        yield document
                    position = max(file.tell(), shown)
                    progress.advance(position - shown)
                    shown = position
        finally:
            progress.advance(file_size(path) - shown)


@dataclass(frozen=True)
class DemoCorpus:
    """Generated reviews; see `demo.py`.

    Attributes:
        count: how many reviews.
        seed: the same seed generates the same reviews.
    """

    count: int
    seed: int

    @property
    def files(self) -> SourceFiles:
        """No files."""
        return SourceFiles()

    def documents(self, task: str) -> Iterator[Document]:
        """Yield all reviews; see `Corpus.documents`."""
        with Progress(task, self.count, "reviews") as progress:
            for index, text in enumerate(generate_reviews(self.count, self.seed)):
                yield Document(f"generated review {index}", text)
                progress.advance()


@dataclass(frozen=True)
class LimitedCorpus:
    """At most `limit` documents of another corpus.

    Attributes:
        corpus: the corpus to take documents from.
        limit: how many documents to take.
        spread: take them at even distances instead of from the start; a fair sample of a corpus that is sorted.
    """

    corpus: Corpus
    limit: int
    spread: bool

    @property
    def files(self) -> SourceFiles:
        """The files of the corpus."""
        return self.corpus.files

    def documents(self, task: str) -> Iterator[Document]:
        """Yield the chosen documents; see `Corpus.documents`. With `spread` the corpus is read once more, to count."""
        total = sum(1 for _ in self.corpus.documents("count")) if self.spread else 0
        if total <= self.limit:
            yield from itertools.islice(self.corpus.documents(task), self.limit)
            return
        chosen = {index * total // self.limit for index in range(self.limit)}
        for index, document in enumerate(self.corpus.documents(task)):
            if index in chosen:
                yield document


def open_corpus(config: PrepareConfig, work_folder: Path, bad_rows: BadRows) -> Corpus:
    """Open the corpus that `config` names.

    Objects in S3 are copied into `work_folder`. IMDB without a source is downloaded into `config.download_folder`.
    Raises DataError if the source has no files, StorageError if it cannot be fetched.
    """
    corpus = _open_whole_corpus(config, work_folder, bad_rows)
    if config.limit is None:
        return corpus
    return LimitedCorpus(corpus, config.limit, spread=config.corpus == "imdb")  # IMDB's files are sorted by label


def _open_whole_corpus(config: PrepareConfig, work_folder: Path, bad_rows: BadRows) -> Corpus:
    if config.corpus == "demo":
        return DemoCorpus(config.demo_documents, config.seed)
    sources = config.source
    if not sources:  # only --corpus imdb comes without one; PrepareConfig checks that
        sources = (str(download(imdb.ARCHIVE, config.download_folder)),)
    files = find_files(sources, source_suffixes(config.corpus), work_folder)
    if config.corpus == "imdb":
        reader = imdb.choose_reader(files)
    else:
        readers: dict[str, Reader] = {
            "text": read_paragraphs if config.documents == "blank-lines" else read_text,
            "csv": functools.partial(read_csv, column=config.text_column, delimiter=config.delimiter),
            "jsonl": functools.partial(read_json, key=config.text_column),
            "parquet": functools.partial(read_parquet, column=config.text_column),
        }
        reader = readers[config.corpus]
    files.log()
    return FileCorpus(files, reader, bad_rows)


def file_size(path: Path) -> int:
    """Return the size of a file in bytes; 0 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def source_suffixes(corpus: str) -> tuple[str, ...]:
    """Return how the names of a corpus's files end when a whole folder is read, compressed files included."""
    return tuple(suffix + compression for suffix in SUFFIXES[corpus] for compression in COMPRESSION_SUFFIXES)


def _is_valid_unicode(document: Document, bad_rows: BadRows) -> bool:
    """Report half of a surrogate pair, which a JSON string can spell with `\\ud800` but UTF-8 cannot encode."""
    if document.text.isascii():
        return True
    try:
        document.text.encode("utf-8")
    except UnicodeEncodeError as error:
        bad_rows.report(f"{document.name}: character {error.start} is half of a surrogate pair, not text")
        return False
    return True
