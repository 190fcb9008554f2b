"""Where documents come from: the built-in demo, IMDB, or the user's text, CSV, JSON Lines or Parquet files.

A corpus can be read from start to end as often as needed and is never held in memory.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
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
from babybert.corpus.s3_file import SourceFile, file_size
from babybert.corpus.sources import SourceFiles, find_files
from babybert.errors import DataError
from babybert.progress import Progress

__all__ = [
    "Corpus",
    "DemoCorpus",
    "Document",
    "FileCorpus",
    "LimitedCorpus",
    "open_corpus",
    "read_file",
    "source_suffixes",
]

SUFFIXES = {
    "text": (".txt",),
    "csv": (".csv",),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
    "imdb": (".txt",),
}
BYTES_OF_A_REVIEW = 450  # generated
BYTES_OF_A_DOCUMENT = 1500  # a guess for documents of which only some are read


class Corpus(Protocol):
    """A sequence of documents that can be read again."""

    @property
    def files(self) -> SourceFiles:
        """The files that the documents are read from; none if they are generated."""

    @property
    def size(self) -> int:
        """About how many bytes are read, compressed or not."""

    def documents(self, task: str) -> Iterator[Document]:
        """Yield all documents in order, with progress shown under the name `task`.

        Raises DataError, naming file and row, for what cannot be read.
        """

    def require_documents(self, count: int) -> None:
        """Raise DataError if there are no documents because files are bad. `count` is how many were read."""


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

    @property
    def size(self) -> int:
        """The bytes of the files."""
        return sum(map(file_size, self.files.paths))

    def documents(self, task: str) -> Iterator[Document]:
        """Yield all documents; see `Corpus.documents`.

        A damaged file ends the reading; if bad files are skipped, it yields the documents before the damage. Raises
        DataError if no file gives any document, and at least one is bad.
        """
        self.bad_rows.start_again()
        count = 0
        with Progress(task, self.size, "bytes") as progress:
            for path in self.files.paths:
                for document in read_file(path, self.reader, self.bad_rows, progress.advance):
                    yield document
                    count += 1
        self.require_documents(count)

    def require_documents(self, count: int) -> None:
        """Raise DataError if the files gave no document, and at least one of them is bad."""
        if self.bad_rows.files and not count:
            raise DataError(f"{self.bad_rows.files[0]}: bad, and no other file has a document; see the messages above")


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

    @property
    def size(self) -> int:
        """About the bytes of the reviews."""
        return BYTES_OF_A_REVIEW * self.count

    def require_documents(self, count: int) -> None:
        """There are always some."""

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

    @property
    def size(self) -> int:
        """About the bytes of the chosen documents, or those of the whole corpus if it is smaller."""
        return min(self.corpus.size, BYTES_OF_A_DOCUMENT * self.limit)

    def require_documents(self, count: int) -> None:
        """See `Corpus.require_documents`."""
        self.corpus.require_documents(count)

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

    Objects in S3 are copied into `work_folder` while they are read. IMDB without a source is downloaded into
    `config.download_folder`. Raises DataError if the source has no files, StorageError if it cannot be fetched.
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


def read_file(
    path: SourceFile, reader: Reader, bad_rows: BadRows, advance: Callable[[int], None] = lambda size: None
) -> Iterator[Document]:
    """Yield the documents of one file; if bad files are skipped, those before the damage.

    Calls `advance` with the bytes that were read since the last call; in total, with the size of the file.
    """
    shown = 0
    try:
        with bad_rows.bad_file(path), file_errors(path), path.open("rb") as file:
            for document in reader(path, file, bad_rows):
                if _is_valid_unicode(document, bad_rows):
                    yield document
                position = max(file.tell(), shown)
                advance(position - shown)
                shown = position
    finally:
        advance(file_size(path) - shown)


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
