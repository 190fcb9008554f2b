"""Where documents come from: the built-in demo, IMDB, or the user's own text, CSV, JSON Lines or Parquet files.

A document is a plain string with a name (a path and a row) that is only for messages. A corpus is read from start to
end, as often as asked, and never held in memory; `.gz` and `.zst` files are decompressed on the way.
"""

import gzip
import itertools
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow
import pyarrow.parquet

from babybert.config import PrepareConfig
from babybert.corpus.demo import generate_reviews
from babybert.corpus.download import IMDB, download, find_files
from babybert.corpus.files import COMPRESSED, BadRows, decompressed, file_errors, read_csv_rows
from babybert.errors import DataError
from babybert.progress import Progress

# The archive also has train/unsup (50,000 unlabelled reviews): not part of the reference's corpus.
REVIEW_PATH = re.compile(r"(?:^|/)((?:train|test)/(?:pos|neg)/[^/]+\.txt)$")
ENDINGS = {
    "text": (".txt",),
    "csv": (".csv",),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
    "imdb": (".txt",),
}
ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Document:
    """One text, and where it came from."""

    name: str
    text: str


Reader = Callable[[Path, IO[bytes], BadRows], Iterator[Document]]


@dataclass(frozen=True)
class Files:
    """A corpus of files: `read` turns each into documents. Iterating shows progress by the bytes read."""

    paths: list[Path]
    read: Reader
    bad: BadRows

    def documents(self, task: str) -> Iterator[Document]:
        """All documents in order. Raises DataError, naming file and row, for what cannot be read."""
        self.bad.count = 0
        with Progress(task, sum(path.stat().st_size for path in self.paths), "bytes") as progress:
            for path in self.paths:
                shown = 0
                with path.open("rb") as file, file_errors(path):
                    for document in self.read(path, file, self.bad):
                        if _is_text(document, self.bad):
                            yield document
                        position = file.tell()
                        progress.advance(max(position - shown, 0))
                        shown = max(position, shown)
                    progress.advance(path.stat().st_size - shown)


@dataclass(frozen=True)
class Demo:
    """`count` generated reviews (not written by people); see `demo.py`."""

    count: int
    seed: int

    def documents(self, task: str) -> Iterator[Document]:
        """All of them, the same for the same seed."""
        with Progress(task, self.count, "reviews") as progress:
            for i, text in enumerate(generate_reviews(self.count, self.seed)):
                yield Document(f"generated review {i}", text)
                progress.advance()


@dataclass(frozen=True)
class Limited:
    """The first `limit` documents of a corpus, or as many at even distances (`spread`: a sample of a sorted corpus)."""

    corpus: "Corpus"
    limit: int
    spread: bool

    def documents(self, task: str) -> Iterator[Document]:
        """The chosen documents; to spread them, the corpus is read once before, to count."""
        documents = self.corpus.documents
        total = sum(1 for _ in documents("count")) if self.spread else 0
        if total <= self.limit:
            yield from itertools.islice(documents(task), self.limit)
            return
        wanted = {i * total // self.limit for i in range(self.limit)}
        yield from (document for i, document in enumerate(documents(task)) if i in wanted)


Corpus = Files | Demo | Limited


def open_corpus(config: PrepareConfig, work: Path, bad: BadRows) -> Corpus:
    """The corpus that `config` names; what must be fetched first goes into `work` or the download folder.

    Raises DataError when there is nothing where `source` says, StorageError when it cannot be fetched.
    """
    if config.corpus == "demo":
        whole: Corpus = Demo(config.demo_documents, config.seed)
    else:
        sources = config.source or (str(download(IMDB, config.download_folder)),)
        endings = tuple(ending + packed for ending in ENDINGS[config.corpus] for packed in COMPRESSED)
        paths = [path for source in sources for path in find_files(source, endings, work)]
        whole = _open_imdb(paths, bad) if config.corpus == "imdb" else Files(paths, _reader(config), bad)
    return Limited(whole, config.limit, spread=config.corpus == "imdb") if config.limit else whole


def _reader(config: PrepareConfig) -> Reader:
    def read_text(path: Path, file: IO[bytes], bad: BadRows) -> Iterator[Document]:
        return read_paragraphs(path, file, bad) if config.documents == "blank-lines" else read_whole(path, file, bad)

    readers: dict[str, Reader] = {
        "text": read_text,
        "csv": lambda path, file, bad: read_csv(path, file, bad, config.text_column),
        "jsonl": lambda path, file, bad: read_jsonl(path, file, bad, config.text_column),
        "parquet": lambda path, file, bad: read_parquet(path, file, bad, config.text_column),
    }
    return readers[config.corpus]


def _open_imdb(paths: list[Path], bad: BadRows) -> Corpus:
    """The labelled reviews (Maas et al., 2011): the archive, its folder, or the CSV with a `review` column."""
    if len(paths) == 1 and ".csv" in paths[0].suffixes:
        return Files(paths, lambda path, file, bad: read_csv(path, file, bad, "review"), bad)
    if len(paths) == 1 and paths[0].suffix != ".txt":
        return Files(paths, read_imdb_archive, bad)
    reviews = [path for path in paths if REVIEW_PATH.search(path.as_posix())]
    if not reviews:
        raise DataError(f"{paths[0]}: not IMDB's reviews; expected files such as train/pos/0_9.txt")
    return Files(reviews, read_whole, bad)


def read_whole(path: Path, file: IO[bytes], bad: BadRows) -> Iterator[Document]:
    """The whole file as one document."""
    text = _decode(str(path), decompressed(path, file).read(), bad)
    if text is not None:
        yield Document(str(path), text)


def read_paragraphs(path: Path, file: IO[bytes], bad: BadRows) -> Iterator[Document]:
    """A document for each run of lines without a blank one."""
    lines = (
        (number, _decode(f"{path}: line {number}", line, bad))
        for number, line in enumerate(decompressed(path, file), 1)
    )
    for blank, group in itertools.groupby(
        ((number, line) for number, line in lines if line is not None), key=lambda pair: not pair[1].strip()
    ):
        if not blank:
            paragraph = list(group)
            yield Document(f"{path}: line {paragraph[0][0]}", "".join(line for _, line in paragraph))


def read_csv(path: Path, file: IO[bytes], bad: BadRows, column: str) -> Iterator[Document]:
    """One column of a CSV with a header."""
    for row, cells in read_csv_rows(path, file, bad, lambda names: _find_column(path, names, column)):
        yield Document(f"{path}: row {row}", cells[0])


def read_jsonl(path: Path, file: IO[bytes], bad: BadRows, column: str) -> Iterator[Document]:
    """One key of the JSON object in each line; empty lines are passed over."""
    for number, line in enumerate(decompressed(path, file), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except UnicodeDecodeError as error:
            bad.report(f"{where}: byte {error.start} of the line is not UTF-8")
        except (ValueError, RecursionError) as error:
            bad.report(f"{where}: not JSON: {error}")
        else:
            if not isinstance(row, dict):
                bad.report(f"{where}: not a JSON object")
            elif column not in row:
                bad.report(f"{where}: no key '{column}'; it has {', '.join(row)}; choose one with --text-column")
            elif not isinstance(row[column], str):
                bad.report(f"{where}: '{column}' is not a text")
            else:
                yield Document(where, row[column])


def read_parquet(path: Path, file: IO[bytes], bad: BadRows, column: str) -> Iterator[Document]:
    """One column of strings of a Parquet file."""
    table = pyarrow.parquet.ParquetFile(file)
    kind = table.schema_arrow.field(_find_column(path, table.schema_arrow.names, column)[0]).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise DataError(f"{path}: column '{column}' holds {kind}, not text")
    number = 0
    for batch in table.iter_batches(ROWS_AT_ONCE, columns=[column]):
        for text in batch.column(0).to_pylist():
            number += 1
            if text is None:
                bad.report(f"{path}: row {number}: '{column}' is missing")
            else:
                yield Document(f"{path}: row {number}", text)


def read_imdb_archive(path: Path, file: IO[bytes], bad: BadRows) -> Iterator[Document]:
    """The reviews in the `.tar.gz`, streamed: nothing is extracted to disk, so no path in it can do harm."""
    found = False
    with gzip.open(file) as content, tarfile.open(fileobj=content, mode="r|") as tar:
        for member in tar:
            match = REVIEW_PATH.search(member.name)
            review = tar.extractfile(member) if match and member.isfile() else None
            if match and review:
                found = True
                name = f"{path}: {match[1]}"
                text = _decode(name, review.read(), bad)
                if text is not None:
                    yield Document(name, text)
            tar.members.clear()  # type: ignore[attr-defined]  # or it keeps a record of every file that it has passed
        while content.read(1 << 20):  # to the checksum at the very end, which tarfile does not read
            continue
    if not found:
        raise DataError(f"{path}: no reviews found; expected files such as train/pos/0_9.txt")


def _find_column(path: Path, names: Iterable[str], column: str) -> list[int]:
    names = list(names)
    if column not in names:
        raise DataError(f"{path}: no column '{column}'; it has {', '.join(names)}; choose one with --text-column")
    return [names.index(column)]


def _decode(name: str, content: bytes, bad: BadRows) -> str | None:
    try:
        return content.decode("utf-8-sig")  # Windows likes to put a byte order mark first
    except UnicodeDecodeError as error:
        bad.report(f"{name}: byte {error.start} is not UTF-8; convert the file or remove it, or add --skip-bad-rows")
        return None


def _is_text(document: Document, bad: BadRows) -> bool:
    """Half of a surrogate pair, which JSON can spell and UTF-8 cannot, is no text."""
    if document.text.isascii():
        return True
    try:
        document.text.encode("utf-8")
    except UnicodeEncodeError as error:
        bad.report(f"{document.name}: character {error.start} is half of a surrogate pair, not text")
        return False
    return True
