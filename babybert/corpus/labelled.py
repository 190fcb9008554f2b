"""Documents with labels, for the probe and for fine-tuning: IMDB's (pos, neg), or rows of CSV, JSON or Parquet files.

For the probe, documents are sampled by a digest of their text: the sample does not depend on the order of the files
(IMDB is sorted by label), and only the sample is held in memory.
"""

import hashlib
import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from babybert.config import PrepareConfig
from babybert.corpus import imdb
from babybert.corpus.csv_rows import read_csv_rows
from babybert.corpus.documents import open_corpus, source_suffixes
from babybert.corpus.files import BadRows, file_errors, find_column
from babybert.corpus.json_rows import read_json_objects, text_of_key, value_of_key
from babybert.corpus.readers import decode, read_parquet_rows
from babybert.corpus.s3_file import SourceFile
from babybert.corpus.sources import find_files
from babybert.errors import DataError, UsageError
from babybert.folders import temporary_folder

LABELS_SHOWN = 5  # in an error message


@dataclass(frozen=True)
class Labelled:
    """A labelled document.

    Attributes:
        text: the text.
        label: its label.
        split: `train` or `test` if the source says so, else None.
        pair: the second text of a pair, else None.
        name: where it comes from (a path, and a row), for error messages.
    """

    text: str
    label: str
    split: str | None
    pair: str | None = None
    name: str = field(default="", compare=False)


@dataclass(frozen=True)
class LabelledColumns:
    """The columns of a CSV or Parquet file, or the keys of JSON objects, with the texts and the labels."""

    text: str
    label: str
    pair: str | None = None
    delimiter: str = "auto"  # of CSV

    def __post_init__(self) -> None:
        if self.text == self.label:
            raise UsageError(f"'{self.text}' cannot be the texts and the labels; choose another --label-column")

    def flags(self) -> dict[str, str]:
        """Each column with the flag that names it, in the order of a row."""
        pair = {} if self.pair is None else {self.pair: "--pair-column"}
        return {self.text: "--text-column", self.label: "--label-column", **pair}


Row = tuple[str, list[str]]  # where it is, for messages; text, label and perhaps the second text
RowReader = Callable[[SourceFile, IO[bytes], BadRows, LabelledColumns], Iterator[Row]]


def read_labelled(
    corpus: str, sources: tuple[str, ...], columns: LabelledColumns, bad_rows: BadRows | None = None
) -> Iterator[Labelled]:
    """Yield the labelled documents of IMDB (`corpus="imdb"`: archive or folder), or of csv, jsonl or parquet files.

    Raises DataError, naming the file and the row, for a file that cannot be read, a missing column, or no label, unless
    `bad_rows` skips bad rows; UsageError if no temporary folder can be made.
    """
    bad_rows = bad_rows or BadRows()
    with temporary_folder("labelled") as work_folder:
        if corpus == "imdb":
            yield from _read_imdb(sources, work_folder, bad_rows)
            return
        files = find_files(sources, source_suffixes(corpus), work_folder)
        files.log()
        for path in files.paths:
            with bad_rows.bad_file(path), file_errors(path), path.open("rb") as file:
                for name, cells in ROW_READERS[corpus](path, file, bad_rows, columns):
                    document = _checked(name, cells, columns, bad_rows)
                    if document is not None:
                        yield document


def _read_imdb(sources: tuple[str, ...], work_folder: Path, bad_rows: BadRows) -> Iterator[Labelled]:
    reviews = open_corpus(PrepareConfig(corpus="imdb", source=sources), work_folder, bad_rows)
    for document in reviews.documents("read"):
        split, label = imdb.split_and_label(document)
        yield Labelled(document.text, label, split, name=document.name)


def _read_csv(path: SourceFile, file: IO[bytes], bad_rows: BadRows, columns: LabelledColumns) -> Iterator[Row]:
    def choose_columns(header: list[str]) -> list[int]:
        return [find_column(path, header, column, flag) for column, flag in columns.flags().items()]

    for row_number, cells in read_csv_rows(path, file, bad_rows, choose_columns, columns.delimiter):
        yield f"{path}: row {row_number}", cells


def _read_json(path: SourceFile, file: IO[bytes], bad_rows: BadRows, columns: LabelledColumns) -> Iterator[Row]:
    for where, pairs in read_json_objects(path, file, bad_rows):
        try:
            label = value_of_key(pairs, columns.label, "--label-column")
            cells = [text_of_key(pairs, columns.text, "--text-column"), _cell_text(label)]
            if columns.pair is not None:
                cells.append(text_of_key(pairs, columns.pair, "--pair-column"))
        except ValueError as error:
            bad_rows.report(f"{where}: {error}")
        else:
            yield where, cells


def _read_parquet(path: SourceFile, file: IO[bytes], bad_rows: BadRows, columns: LabelledColumns) -> Iterator[Row]:
    names = {column: column != columns.label for column in columns.flags()}
    for where, values in read_parquet_rows(path, file, names, columns.flags()):
        cells = [decode(where, value, bad_rows) if isinstance(value, bytes) else value for value in values]
        if not any(cell is None for cell in cells):
            yield where, [_cell_text(cell) for cell in cells]
        elif None in values:  # else a cell is not UTF-8, which is reported
            bad_rows.report(f"{where}: a cell is missing")


ROW_READERS: dict[str, RowReader] = {"csv": _read_csv, "jsonl": _read_json, "parquet": _read_parquet}


def _cell_text(cell: object) -> str:
    """A cell as text: 1 for the number 1, true and false for booleans, nothing for a missing one."""
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell)


def _checked(name: str, cells: list[str], columns: LabelledColumns, bad_rows: BadRows) -> Labelled | None:
    """The document of a row; None if it is bad and skipped."""
    text, label, *pair = cells
    if not label.strip():
        bad_rows.report(f"{name}: '{columns.label}' is empty")
        return None
    try:
        "".join(cells).encode("utf-8")
    except UnicodeEncodeError:
        bad_rows.report(f"{name}: has half of a surrogate pair, which is not text")
        return None
    return Labelled(text, label.strip(), None, pair[0] if pair else None, name)


class _SmallestDigests:
    """The `capacity` documents with the smallest digests among those added; copies of a text count once."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        # heapq has the smallest entry first. Negated digests put the largest one there, which is the next to go.
        self._heap: list[tuple[int, Labelled]] = []
        self._digests: set[int] = set()

    def add(self, digest: int, document: Labelled) -> None:
        """Keep the document, if its digest is among the smallest so far."""
        if digest in self._digests:
            return
        if len(self._heap) < self._capacity:
            heapq.heappush(self._heap, (-digest, document))
            self._digests.add(digest)
        elif digest < -self._heap[0][0]:
            removed, _ = heapq.heapreplace(self._heap, (-digest, document))
            self._digests.discard(-removed)
            self._digests.add(digest)

    def documents(self) -> list[Labelled]:
        """Return the documents in the order of their digests."""
        return [document for _, document in sorted(self._heap, key=lambda entry: -entry[0])]


def sample(documents: Iterator[Labelled], count: int, seed: int) -> tuple[list[Labelled], list[Labelled]]:
    """Draw at most `count` training documents and as many test documents; copies of a text are drawn once.

    The source's own splits are kept; documents without one are split by their digest. Raises DataError unless both
    splits have the same two labels.
    """
    samples = {"train": _SmallestDigests(count), "test": _SmallestDigests(count)}
    salt = seed.to_bytes(8, "little")
    for document in documents:
        digest = hashlib.blake2b(document.text.encode(), digest_size=8, salt=salt).digest()
        digest_number = int.from_bytes(digest, "big")
        split = document.split or ("train", "test")[digest_number % 2]
        samples[split].add(digest_number, document)
    train = samples["train"].documents()
    test = samples["test"].documents()
    train_labels = sorted({document.label for document in train})
    test_labels = sorted({document.label for document in test})
    if len(train_labels) != 2 or train_labels != test_labels:
        raise DataError(
            f"the training documents have the labels {train_labels[:LABELS_SHOWN]}, the test documents "
            f"{test_labels[:LABELS_SHOWN]}; the probe needs the same two in both"
        )
    return train, test
