"""Documents with one of two labels, for the probe: IMDB's (pos, neg), or a CSV file with a column of labels.

Documents are sampled by a digest of their text: the sample does not depend on the order of the files (IMDB is sorted
by label), and only the sample is held in memory.
"""

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from babybert.config import PrepareConfig
from babybert.corpus import imdb
from babybert.corpus.csv_rows import read_csv_rows
from babybert.corpus.documents import open_corpus, source_suffixes
from babybert.corpus.files import BadRows, file_errors, find_column
from babybert.corpus.s3_file import SourceFile
from babybert.corpus.sources import find_files
from babybert.errors import DataError
from babybert.folders import temporary_folder

LABELS_SHOWN = 5  # in an error message


@dataclass(frozen=True)
class Labelled:
    """A labelled document.

    Attributes:
        text: the text.
        label: its label.
        split: `train` or `test` if the source says so, else None.
    """

    text: str
    label: str
    split: str | None


def read_labelled(corpus: str, sources: tuple[str, ...], text_column: str, label_column: str) -> Iterator[Labelled]:
    """Yield the labelled documents of IMDB (`corpus="imdb"`: archive or folder) or of CSV files (`corpus="csv"`).

    Raises DataError, naming the file and the row, for a file that cannot be read, a missing column, or no label;
    UsageError if no temporary folder can be made.
    """
    with temporary_folder("probe") as work_folder:
        if corpus == "imdb":
            yield from _read_imdb(sources, work_folder)
            return
        files = find_files(sources, source_suffixes("csv"), work_folder)
        files.log()
        for path in files.paths:
            yield from _read_csv(path, text_column, label_column)


def _read_imdb(sources: tuple[str, ...], work_folder: Path) -> Iterator[Labelled]:
    reviews = open_corpus(PrepareConfig(corpus="imdb", source=sources), work_folder, BadRows())
    for document in reviews.documents("read"):
        split, label = imdb.split_and_label(document)
        yield Labelled(document.text, label, split)


def _read_csv(path: SourceFile, text_column: str, label_column: str) -> Iterator[Labelled]:
    def choose_columns(header: list[str]) -> list[int]:
        return [
            find_column(path, header, text_column, "--text-column"),
            find_column(path, header, label_column, "--label-column"),
        ]

    with file_errors(path), path.open("rb") as file:
        for row_number, (text, label) in read_csv_rows(path, file, BadRows(), choose_columns):
            if not label.strip():
                raise DataError(f"{path}: row {row_number}: '{label_column}' is empty")
            yield Labelled(text, label.strip(), None)


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
