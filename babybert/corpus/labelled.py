"""Documents with a label of two kinds: IMDB's by its folders (pos, neg), or a CSV with a column of labels.

A sample is drawn by a digest of each document's text, so that it does not depend on the order of the files (IMDB is
sorted by label), and no more is held in memory than the sample.
"""

import functools
import hashlib
import heapq
import itertools
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from babybert.config import PrepareConfig
from babybert.corpus.download import find_files
from babybert.corpus.files import COMPRESSED, BadRows, file_errors, read_csv_rows
from babybert.corpus.readers import ENDINGS, open_corpus
from babybert.errors import DataError

IMDB_LABEL = re.compile(r"(?:^|[/ ])(train|test)/(pos|neg)/[^/]+\.txt$")


@dataclass(frozen=True)
class Labelled:
    """A text, its label, and the part it is in if the source says so."""

    text: str
    label: str
    part: str | None


def read_labelled(corpus: str, source: tuple[str, ...], text_column: str, label_column: str) -> Iterator[Labelled]:
    """All labelled documents of IMDB (`imdb`: archive or folder) or of CSV files (`csv`). Raises DataError."""
    with tempfile.TemporaryDirectory() as work:
        if corpus == "imdb":
            yield from _read_imdb(source, Path(work))
            return
        endings = tuple(ending + packed for ending in ENDINGS["csv"] for packed in COMPRESSED)
        for path in itertools.chain.from_iterable(find_files(name, endings, Path(work)) for name in source):
            with path.open("rb") as file, file_errors(path):
                choose = functools.partial(_columns, path, text_column=text_column, label_column=label_column)
                for row, (text, label) in read_csv_rows(path, file, BadRows(), choose):
                    if not label.strip():
                        raise DataError(f"{path}: row {row}: '{label_column}' is empty")
                    yield Labelled(text, label.strip(), None)


def _read_imdb(source: tuple[str, ...], work: Path) -> Iterator[Labelled]:
    for document in open_corpus(PrepareConfig(corpus="imdb", source=source), work, BadRows()).documents("read"):
        match = IMDB_LABEL.search(document.name)
        if not match:
            raise DataError(
                f"{document.name}: has no label; expected files such as train/pos/0_9.txt, or --corpus csv with a --label-column"
            )
        yield Labelled(document.text, match[2], match[1])


def _columns(path: Path, names: list[str], text_column: str, label_column: str) -> list[int]:
    for column, flag in ((text_column, "--text-column"), (label_column, "--label-column")):
        if column not in names:
            raise DataError(f"{path}: no column '{column}'; it has {', '.join(names)}; choose one with {flag}")
    return [names.index(text_column), names.index(label_column)]


def sample(documents: Iterator[Labelled], count: int, seed: int) -> tuple[list[Labelled], list[Labelled]]:
    """At most `count` documents to learn from and as many to test with; copies of a text are drawn once.

    Parts that the source names `train` and `test` are kept; else the digest decides. Raises DataError unless both
    parts hold the same two labels.
    """
    heaps: dict[str, list[tuple[int, Labelled]]] = {"train": [], "test": []}
    drawn: dict[str, set[int]] = {"train": set(), "test": set()}
    for document in documents:
        digest = int.from_bytes(
            hashlib.blake2b(document.text.encode(), digest_size=8, salt=seed.to_bytes(8, "little")).digest(), "big"
        )
        part = document.part or ("train", "test")[digest % 2]
        heap, seen = heaps[part], drawn[part]
        if digest in seen or (len(heap) == count and digest >= -heap[0][0]):
            continue
        seen.add(digest)
        if len(heap) < count:
            heapq.heappush(heap, (-digest, document))
        else:
            seen.discard(-heapq.heapreplace(heap, (-digest, document))[0])
    train, test = (
        [document for _, document in sorted(heaps[part], key=lambda pair: -pair[0])] for part in ("train", "test")
    )
    labels = [sorted({document.label for document in part}) for part in (train, test)]
    if len(labels[0]) != 2 or labels[0] != labels[1]:
        raise DataError(
            f"the documents have the labels {labels[0][:5]} to learn from and {labels[1][:5]} to test with; the probe needs the same two in both"
        )
    return train, test
