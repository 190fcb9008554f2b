"""The table between preparation and training: one masked pair a row, in CSV that people and pandas can read, or Parquet.

Columns (lists are JSON arrays, all of a row's lists equally long):
    bert_input     token ids after masking
    bert_label     the original id where a token was chosen for MLM, 0 elsewhere
    segment_label  1 for `[CLS] A [SEP]`, 2 for `B [SEP]`, 0 for padding
    is_next        1: B follows A; 0: B is from another document (Google's BERT has it the other way round)

The course's files are read as well: columns `BERT Input`, `BERT Label`, `Segment Label` (numbers without brackets) and
`Is Next`, others (`Original Text`) passed over, padding between A and B left where it is. Reading goes chunk by chunk
and turns rows into flat arrays, 9 bytes a token; every row is checked on the way in.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from babybert.corpus.files import BadRows, file_errors, read_csv_rows
from babybert.data.tokenizer import FIRST_ORDINARY, MASK, UNK
from babybert.errors import DataError

LIST_COLUMNS = ("bert_input", "bert_label", "segment_label")
COLUMNS = (*LIST_COLUMNS, "is_next")
IS_NEXT = {"0": 0, "1": 1, "False": 0, "True": 1}
ROWS_AT_ONCE = 10_000
TABLE_ENDINGS = (".csv", ".csv.gz", ".csv.zst", ".parquet")


@dataclass(frozen=True)
class Examples:
    """Masked pairs end to end: the ids of pair p are `ids[offsets[p]:offsets[p + 1]]`."""

    ids: np.ndarray  # int32
    labels: np.ndarray  # int32
    segments: np.ndarray  # int8
    offsets: np.ndarray  # int64, one more than there are pairs
    is_next: np.ndarray  # int8, one a pair

    def __len__(self) -> int:
        return len(self.is_next)

    def rows(self, first: int, last: int) -> "Examples":
        """Pairs `first` to `last - 1` (or to the end)."""
        offsets = self.offsets[first : last + 1]
        part = slice(offsets[0], offsets[-1])
        return Examples(
            self.ids[part], self.labels[part], self.segments[part], offsets - offsets[0], self.is_next[first:last]
        )

    def first(self, count: int | None) -> "Examples":
        """The first `count` pairs (all, if None)."""
        return self if count is None or count >= len(self) else self.rows(0, count)

    def original_ids(self) -> np.ndarray:
        """The ids before masking."""
        return np.where(self.labels > 0, self.labels, self.ids)

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """How often each token of the vocabulary stands in these pairs before masking; 0 for the special ones."""
        counts = np.bincount(self.original_ids(), minlength=vocab_size)
        counts[:FIRST_ORDINARY] = 0
        return counts


def concatenate(chunks: Iterable[Examples]) -> Examples:
    """Put examples end to end."""
    parts = list(chunks)
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    ids, labels, segments, is_next = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "labels", "segments", "is_next")
    )
    return Examples(ids, labels, segments, np.concatenate([[0], np.cumsum(lengths)]), is_next)


def read_table(path: Path, vocab_size: int, bad: BadRows) -> Iterator[Examples]:
    """Read and check one CSV or Parquet file, a chunk of rows at a time. Rows count from 1, without the header.

    Raises DataError for a missing column, a file without rows or, naming the row, unless bad rows are skipped: broken
    JSON, lists of different lengths, ids that the vocabulary lacks, labels at padding, `[CLS]` or `[SEP]`, and an
    `is_next` other than 0 and 1.
    """
    empty = True
    with path.open("rb") as file, file_errors(path):
        for numbers, cells in (
            _parquet_chunks(path, file) if path.suffix == ".parquet" else _csv_chunks(path, file, bad)
        ):
            examples = _parse_chunk(f"{path}: row", numbers, cells, vocab_size, bad)
            empty = False
            if len(examples):
                yield examples
    if empty:
        raise DataError(f"{path}: has no rows")


Chunk = tuple[list[int], Sequence[Sequence[Any]]]  # row numbers, and the cells of the four columns


def _csv_chunks(path: Path, file: IO[bytes], bad: BadRows) -> Iterator[Chunk]:
    rows = read_csv_rows(path, file, bad, lambda names: _find_columns(path, names))
    while chunk := list(itertools.islice(rows, ROWS_AT_ONCE)):
        yield [number for number, _ in chunk], list(zip(*(cells for _, cells in chunk), strict=True))


def _parquet_chunks(path: Path, file: IO[bytes]) -> Iterator[Chunk]:
    import pyarrow.parquet  # 25 MB that training on data read before has no use for

    table = pyarrow.parquet.ParquetFile(file)
    names = table.schema_arrow.names
    wanted = [names[i] for i in _find_columns(path, names)]
    for name in wanted[:-1]:
        kind = table.schema_arrow.field(name).type
        text = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
        lists = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
        if not text and not (lists and pyarrow.types.is_integer(kind.value_type)):
            raise DataError(f"{path}: column '{name}' holds {kind}; it must be lists of whole numbers")
    number = 1
    for batch in table.iter_batches(ROWS_AT_ONCE, columns=wanted):
        yield list(range(number, number + len(batch))), [batch.column(name).to_pylist() for name in wanted]
        number += len(batch)


def _find_columns(path: Path, names: list[str]) -> list[int]:
    spelled = [name.strip().lower().replace(" ", "_") for name in names]
    for column in COLUMNS:
        if column not in spelled:
            raise DataError(f"{path}: no column '{column}'; it has {', '.join(names)}")
    return [spelled.index(column) for column in COLUMNS]


def _parse_chunk(
    where: str, numbers: list[int], cells: Sequence[Sequence[Any]], vocab_size: int, bad: BadRows
) -> Examples:
    """First what is wrong with a row as a whole, then, among the rows that are left, with single numbers."""
    problems: dict[int, str] = {}
    columns = [_parse_lists(name, column, problems) for name, column in zip(LIST_COLUMNS, cells, strict=False)]
    is_next = np.array([IS_NEXT.get(str(cell).strip(), -1) for cell in cells[-1]], np.int8)
    lengths = columns[0][1]
    _mark(problems, lengths == 0, lambda i: "bert_input is empty")
    for name, (_, other) in zip(LIST_COLUMNS[1:], columns[1:], strict=True):
        _mark(
            problems,
            other != lengths,
            lambda i, name=name, other=other: f"bert_input has {lengths[i]} entries, {name} has {other[i]}",
        )
    _mark(problems, is_next < 0, lambda i: f"is_next is '{cells[-1][i]}'; it must be 0 or 1")
    keep = _report(where, numbers, problems, bad)
    kept_numbers = [number for number, kept in zip(numbers, keep, strict=True) if kept]
    flats = [flat[np.repeat(keep, own)] for flat, own in columns]
    lengths, is_next = lengths[keep], is_next[keep]

    problems = {}
    ends, (ids, labels, segments) = np.cumsum(lengths), flats
    special = (ids < FIRST_ORDINARY) & (ids != MASK) & (ids != UNK)
    for flags, message in (
        (
            (ids < 0) | (ids >= vocab_size),
            lambda i: f"bert_input has id {ids[i]}; the vocabulary has 0 to {vocab_size - 1}",
        ),
        (
            (labels < 0) | (labels >= vocab_size),
            lambda i: f"bert_label has id {labels[i]}; the vocabulary has 0 to {vocab_size - 1}",
        ),
        (
            special & (labels != 0),
            lambda i: f"bert_label is {labels[i]} at special token {ids[i]}; only words are masked",
        ),
        ((segments < 0) | (segments > 2), lambda i: f"segment_label is {segments[i]}; it must be 0, 1 or 2"),
    ):
        for i in np.flatnonzero(flags):
            problems.setdefault(int(np.searchsorted(ends, i, side="right")), message(i))
    keep = _report(where, kept_numbers, problems, bad)
    tokens = np.repeat(keep, lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths[keep])])
    return Examples(
        ids[tokens].astype(np.int32),
        labels[tokens].astype(np.int32),
        segments[tokens].astype(np.int8),
        offsets,
        is_next[keep],
    )


def _mark(problems: dict[int, str], rows: np.ndarray, message: Any) -> None:
    """Note `message(row)` for each row that `rows` flags, if nothing else is known to be wrong with it."""
    for row in np.flatnonzero(rows):
        problems.setdefault(int(row), message(row))


def _report(where: str, numbers: list[int], problems: dict[int, str], bad: BadRows) -> np.ndarray:
    """Report the problems in the order of the rows; a flag for each row that is good."""
    keep = np.ones(len(numbers), bool)
    for row in sorted(problems):
        bad.report(f"{where} {numbers[row]}: {problems[row]}")
        keep[row] = False
    return keep


def _parse_lists(column: str, cells: Sequence[Any], problems: dict[int, str]) -> tuple[np.ndarray, np.ndarray]:
    """The lists of one column as (flat int64 array, lengths): parsed in one go, then cell by cell if that fails."""
    try:
        return _flatten(column, cells)
    except (ValueError, TypeError, OverflowError):
        flats, lengths = [], np.zeros(len(cells), np.int64)
        for row, cell in enumerate(cells):
            try:
                flat, length = _flatten(column, [cell])
                flats.append(flat)
                lengths[row] = length[0]
            except (ValueError, TypeError, OverflowError):
                problems.setdefault(row, f"{column} is not a JSON list of whole numbers: {str(cell)[:40]!r}")
        return np.concatenate(flats) if flats else np.zeros(0, np.int64), lengths


def _flatten(column: str, cells: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    lists = cells
    if isinstance(cells[0], str):
        if column == "segment_label" and not cells[0].lstrip().startswith("["):  # the course's spelling
            cells = [f"[{cell}]" for cell in cells]
        text = "[" + ",".join(cells) + "]"
        if "e" in text:  # true, false, null and 1e3 have one; whole numbers do not
            raise ValueError("not whole numbers")
        lists = json.loads(text, parse_float=_no_float, parse_constant=_no_float)
    if len(lists) != len(cells) or not all(type(entries) is list for entries in lists):
        raise ValueError("not one list a cell")
    lengths = np.fromiter(map(len, lists), np.int64, len(lists))
    return np.fromiter(itertools.chain.from_iterable(lists), np.int64, int(lengths.sum())), lengths


def _no_float(text: str) -> int:
    raise ValueError(f"{text} is not a whole number")
