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
from babybert.corpus.download import download, find_files
from babybert.corpus.files import COMPRESSION_SUFFIXES, BadRows, file_errors
from babybert.corpus.readers import (
    Document,
    Reader,
    read_csv,
    read_jsonl,
    read_paragraphs,
    read_parquet,
    read_text,
)
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

    def documents(self, task: str) -> Iterator[Document]:
        """Yield all documents in order, with progress shown under the name `task`.

        Raises DataError, naming file and row, for what cannot be read.
        """


@dataclass(frozen=True)
class FileCorpus:
    """The documents of some files. Progress is measured in bytes read.

    Attributes:
        paths: the files, in the order in which they are read.
        reader: yields the documents of one file.
        bad_rows: what to do with bad rows; its count is of the latest pass over the files.
    """

    paths: list[Path]
    reader: Reader
    bad_rows: BadRows

    def documents(self, task: str) -> Iterator[Document]:
        """Yield all documents; see `Corpus.documents`."""
        self.bad_rows.count = 0
        with Progress(task, sum(path.stat().st_size for path in self.paths), "bytes") as progress:
            for path in self.paths:
                with path.open("rb") as file, file_errors(path):
                    shown = 0
                    for document in self.reader(path, file, self.bad_rows):
                        if _is_valid_unicode(document, self.bad_rows):
                            yield document
                        position = max(file.tell(), shown)
                        progress.advance(position - shown)
                        shown = position
                    progress.advance(path.stat().st_size - shown)


@dataclass(frozen=True)
class DemoCorpus:
    """Generated reviews; see `demo.py`.

    Attributes:
        count: how many reviews.
        seed: the same seed generates the same reviews.
    """

    count: int
    seed: int

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
    suffixes = source_suffixes(config.corpus)
    paths = [path for source in sources for path in find_files(source, suffixes, work_folder)]
    if config.corpus == "imdb":
        paths, reader = imdb.choose_reader(paths)
        return FileCorpus(paths, reader, bad_rows)
    readers: dict[str, Reader] = {
        "text": read_paragraphs if config.documents == "blank-lines" else read_text,
        "csv": functools.partial(read_csv, column=config.text_column),
        "jsonl": functools.partial(read_jsonl, key=config.text_column),
        "parquet": functools.partial(read_parquet, column=config.text_column),
    }
    return FileCorpus(paths, readers[config.corpus], bad_rows)


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
