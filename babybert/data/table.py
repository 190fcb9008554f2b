"""The table between preparation and training: one masked pair per row, as CSV or Parquet.

Columns (the lists are JSON arrays; those of a row have the same length):
    bert_input     token ids after masking
    bert_label     the original id where a token was chosen for MLM, 0 elsewhere
    segment_label  1 for `[CLS] A [SEP]`, 2 for `B [SEP]`, 0 for padding
    is_next        1: B follows A; 0: B is from another document (Google's BERT uses the opposite)

The course's files are accepted too: columns `BERT Input`, `BERT Label`, `Segment Label` (numbers without brackets) and
`Is Next`; other columns (`Original Text`) are ignored, and padding between A and B stays where it is.

A table is read in chunks of rows, which become flat arrays of 9 bytes per token. Every row is checked.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, NamedTuple, NoReturn

import numpy as np

from babybert.corpus.csv_rows import read_csv_rows
from babybert.corpus.files import COMPRESSION_SUFFIXES, BadRows, file_errors, find_column, shown_text
from babybert.corpus.s3_file import SourceFile
from babybert.data.pairs import ranges
from babybert.data.tokenizer import FIRST_ORDINARY, MASK, UNK
from babybert.errors import DataError

COLUMNS = ("bert_input", "bert_label", "segment_label", "is_next")
IS_NEXT_VALUES = {"0": 0, "1": 1, "False": 0, "True": 1}
ROWS_PER_CHUNK = 10_000
TABLE_ENDINGS = (*(".csv" + compression for compression in COMPRESSION_SUFFIXES), ".parquet")
CELL_CHARACTERS_SHOWN = 40  # in an error message
BAD_CELL = (ValueError, TypeError, OverflowError, RecursionError)  # what `_flatten` raises


@dataclass(frozen=True)
class Examples:
    """Masked pairs in flat arrays; the ids of pair p are `ids[offsets[p]:offsets[p + 1]]`.

    Attributes:
        ids: token ids after masking (int32).
        labels: the original id where a token was chosen for MLM, 0 elsewhere (int32).
        segments: 1 for `[CLS] A [SEP]`, 2 for `B [SEP]`, 0 for padding (int8).
        offsets: where each pair starts, and the end of the last one (int64).
        is_next: 1 where B follows A, else 0; one per pair (int8).
    """

    ids: np.ndarray
    labels: np.ndarray
    segments: np.ndarray
    offsets: np.ndarray
    is_next: np.ndarray

    def __len__(self) -> int:
        return len(self.is_next)

    def rows(self, first: int, last: int) -> "Examples":
        """Return pairs `first` to `last - 1`, or to the end if there are fewer."""
        offsets = self.offsets[first : last + 1]
        tokens = slice(offsets[0], offsets[-1])
        return Examples(
            self.ids[tokens], self.labels[tokens], self.segments[tokens], offsets - offsets[0], self.is_next[first:last]
        )

    def first(self, count: int | None) -> "Examples":
        """Return the first `count` pairs; None returns all."""
        return self if count is None or count >= len(self) else self.rows(0, count)

    @property
    def only_label(self) -> int | None:
        """The `is_next` that all pairs have; None if both labels occur. There must be at least one pair."""
        first = int(self.is_next[0])
        return first if (self.is_next == first).all() else None

    def original_ids(self) -> np.ndarray:
        """Return the ids before masking."""
        return np.where(self.labels > 0, self.labels, self.ids)

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """Count each token of the vocabulary in these pairs, before masking; special tokens count 0."""
        counts = np.bincount(self.original_ids(), minlength=vocab_size)
        counts[:FIRST_ORDINARY] = 0
        return counts


def concatenate(chunks: Iterable[Examples]) -> Examples:
    """Put the pairs of all chunks one after the other."""
    all_chunks = list(chunks)
    return Examples(
        ids=np.concatenate([chunk.ids for chunk in all_chunks]),
        labels=np.concatenate([chunk.labels for chunk in all_chunks]),
        segments=np.concatenate([chunk.segments for chunk in all_chunks]),
        offsets=_offsets(np.concatenate([np.diff(chunk.offsets) for chunk in all_chunks])),
        is_next=np.concatenate([chunk.is_next for chunk in all_chunks]),
    )


def take(examples: Examples, rows: np.ndarray) -> Examples:
    """Return the pairs with these indices, in this order."""
    lengths = np.diff(examples.offsets)[rows]
    flat = ranges(examples.offsets[rows], lengths)
    columns = (examples.ids[flat], examples.labels[flat], examples.segments[flat])
    return Examples(*columns, _offsets(lengths), examples.is_next[rows])


class RawChunk(NamedTuple):
    """Some rows of a table as they are in the file.

    Attributes:
        row_numbers: for messages; the first row after the header is 1.
        cells: one sequence of cells per column of `COLUMNS`: strings, or lists of numbers from Parquet.
    """

    row_numbers: list[int]
    cells: Sequence[Sequence[Any]]


class ListColumn(NamedTuple):
    """The lists of one column.

    Attributes:
        values: the numbers of all lists, one list after the other (int64).
        lengths: how many numbers each row has (int64).
    """

    values: np.ndarray
    lengths: np.ndarray


def read_table(path: SourceFile, vocab_size: int, bad_rows: BadRows, delimiter: str = "auto") -> Iterator[Examples]:
    """Read and check one CSV or Parquet file, a chunk of rows at a time.

    Raises DataError for a missing column, for a file without rows and for a damaged file, after the rows before the
    damage. Reports to `bad_rows`, with the row's number: broken JSON, lists of different lengths, ids outside the
    vocabulary, labels at padding, `[CLS]` or `[SEP]`, and an `is_next` other than 0 and 1.
    """
    is_empty = True
    with file_errors(path), path.open("rb") as file:
        is_parquet = path.suffix.lower() == ".parquet"
        chunks = _parquet_chunks(path, file) if is_parquet else _csv_chunks(path, file, bad_rows, delimiter)
        for chunk in chunks:
            is_empty = False
            examples = _parse_chunk(path, chunk, vocab_size, bad_rows)
            if len(examples):
                yield examples
    if is_empty:
        raise DataError(f"{path}: has no rows")


def _csv_chunks(path: SourceFile, file: IO[bytes], bad_rows: BadRows, delimiter: str) -> Iterator[RawChunk]:
    rows = read_csv_rows(path, file, bad_rows, lambda header: _find_columns(path, header), delimiter)
    damage: Exception | None = None
    while damage is None:
        chunk: list[tuple[int, list[str]]] = []
        try:
            for row in itertools.islice(rows, ROWS_PER_CHUNK):
                chunk.append(row)
        except Exception as error:  # raised again below, after the rows before it
            damage = error
        if chunk:
            row_numbers = [row_number for row_number, _ in chunk]
            yield RawChunk(row_numbers, list(zip(*(cells for _, cells in chunk), strict=True)))
        elif damage is None:
            return
    raise damage


def _parquet_chunks(path: SourceFile, file: IO[bytes]) -> Iterator[RawChunk]:
    # Imported here, because pyarrow takes 25 MB, and training on cached data does not use it.
    import pyarrow.parquet
    import pyarrow.types

    from babybert.corpus.parquet_cells import is_list_of_integers, is_text, to_python

    table = pyarrow.parquet.ParquetFile(file)
    schema = table.schema_arrow
    columns = [schema.names[index] for index in _find_columns(path, schema.names)]
    *list_columns, is_next = columns
    for column in list_columns:
        column_type = schema.field(column).type
        if not is_text(column_type) and not is_list_of_integers(column_type):
            raise DataError(f"{path}: column '{column}' holds {column_type}; it must hold lists of integers")
    is_next_type = schema.field(is_next).type
    if not (pyarrow.types.is_boolean(is_next_type) or pyarrow.types.is_integer(is_next_type) or is_text(is_next_type)):
        raise DataError(f"{path}: column '{is_next}' holds {is_next_type}; it must hold 0 and 1")
    first_row = 1
    for batch in table.iter_batches(ROWS_PER_CHUNK, columns=columns):
        row_numbers = list(range(first_row, first_row + len(batch)))
        yield RawChunk(row_numbers, [to_python(batch.column(column)) for column in columns])
        first_row += len(batch)


def _find_columns(path: SourceFile, header: list[str]) -> list[int]:
    """Return the positions of `COLUMNS`, in our spelling or in the course's (`BERT Input`)."""

    def normalize(name: str) -> str:
        return name.strip().lower().replace(" ", "_")

    return [find_column(path, header, column, normalize=normalize) for column in COLUMNS]


def _parse_chunk(path: SourceFile, chunk: RawChunk, vocab_size: int, bad_rows: BadRows) -> Examples:
    """Turn the cells of a chunk into arrays without its bad rows, which are reported.

    Rows are checked first (lists of integers, of one length), then the numbers in the rows that are left.
    """
    examples, row_numbers = _parse_rows(path, chunk, bad_rows)
    problems = _find_bad_numbers(examples, vocab_size)
    is_good = _report(path, row_numbers, problems, bad_rows)
    lengths = np.diff(examples.offsets)
    in_good_row = np.repeat(is_good, lengths)
    return Examples(
        examples.ids[in_good_row].astype(np.int32),
        examples.labels[in_good_row].astype(np.int32),
        examples.segments[in_good_row].astype(np.int8),
        _offsets(lengths[is_good]),
        examples.is_next[is_good],
    )


def _parse_rows(path: SourceFile, chunk: RawChunk, bad_rows: BadRows) -> tuple[Examples, list[int]]:
    """Parse the rows of a chunk.

    Returns:
        the good rows, whose numbers are still int64 and unchecked, and their row numbers.
    """
    problems: dict[int, str] = {}  # the first problem of each row, by its index in the chunk
    input_cells, label_cells, segment_cells, is_next_cells = chunk.cells
    inputs = _parse_lists("bert_input", input_cells, problems)
    labels = _parse_lists("bert_label", label_cells, problems)
    segments = _parse_lists("segment_label", segment_cells, problems)
    is_next = np.array([IS_NEXT_VALUES.get(str(cell).strip(), -1) for cell in is_next_cells], np.int8)

    for row in np.flatnonzero(inputs.lengths == 0).tolist():
        problems.setdefault(row, "bert_input is empty")
    for name, column in (("bert_label", labels), ("segment_label", segments)):
        for row in np.flatnonzero(column.lengths != inputs.lengths).tolist():
            problems.setdefault(row, f"bert_input has {inputs.lengths[row]} entries, {name} has {column.lengths[row]}")
    for row in np.flatnonzero(is_next < 0).tolist():
        shown = shown_text(str(is_next_cells[row]), CELL_CHARACTERS_SHOWN)
        problems.setdefault(row, f"is_next is '{shown}'; it must be 0 or 1")

    is_good = _report(path, chunk.row_numbers, problems, bad_rows)
    examples = Examples(
        ids=inputs.values[np.repeat(is_good, inputs.lengths)],
        labels=labels.values[np.repeat(is_good, labels.lengths)],
        segments=segments.values[np.repeat(is_good, segments.lengths)],
        offsets=_offsets(inputs.lengths[is_good]),
        is_next=is_next[is_good],
    )
    return examples, list(itertools.compress(chunk.row_numbers, is_good))


def _find_bad_numbers(examples: Examples, vocab_size: int) -> dict[int, str]:
    """Check every number of some rows; return the first problem of each bad row, by the row's index."""
    ids = examples.ids
    labels = examples.labels
    segments = examples.segments
    is_never_masked = (ids < FIRST_ORDINARY) & (ids != MASK) & (ids != UNK)
    problems: dict[int, str] = {}

    def note(token: int, message: str) -> None:
        row = int(np.searchsorted(examples.offsets, token, side="right")) - 1
        problems.setdefault(row, message)

    for token in np.flatnonzero((ids < 0) | (ids >= vocab_size)).tolist():
        note(token, f"bert_input has id {ids[token]}; the vocabulary has 0 to {vocab_size - 1}")
    for token in np.flatnonzero((labels < 0) | (labels >= vocab_size)).tolist():
        note(token, f"bert_label has id {labels[token]}; the vocabulary has 0 to {vocab_size - 1}")
    for token in np.flatnonzero(is_never_masked & (labels != 0)).tolist():
        note(token, f"bert_label is {labels[token]} at special token {ids[token]}; only words are masked")
    for token in np.flatnonzero((segments < 0) | (segments > 2)).tolist():
        note(token, f"segment_label is {segments[token]}; it must be 0, 1 or 2")
    return problems


def _report(path: SourceFile, row_numbers: list[int], problems: dict[int, str], bad_rows: BadRows) -> np.ndarray:
    """Report the problems in the order of the rows; return for each row whether it is good."""
    is_good = np.ones(len(row_numbers), bool)
    for row in sorted(problems):
        bad_rows.report(f"{path}: row {row_numbers[row]}: {problems[row]}")
        is_good[row] = False
    return is_good


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """Return where rows of these lengths start, and the end of the last one."""
    return np.concatenate([[0], np.cumsum(lengths)])


def _parse_lists(column: str, cells: Sequence[Any], problems: dict[int, str]) -> ListColumn:
    """Parse the lists of one column. A cell that is not a list of integers gets length 0 and an entry in `problems`."""
    try:
        return _flatten(column, cells)  # all cells in one call to the JSON parser, for speed
    except BAD_CELL:
        pass  # some cell is bad; parse one by one to find out which
    values = [np.zeros(0, np.int64)]
    lengths = np.zeros(len(cells), np.int64)
    for row, cell in enumerate(cells):
        try:
            row_values, row_lengths = _flatten(column, [cell])
        except BAD_CELL:
            start_of_cell = str(cell)[:CELL_CHARACTERS_SHOWN]
            problems.setdefault(row, f"{column} is not a JSON list of integers: {start_of_cell!r}")
        else:
            values.append(row_values)
            lengths[row] = row_lengths[0]
    return ListColumn(np.concatenate(values), lengths)


def _flatten(column: str, cells: Sequence[Any]) -> ListColumn:
    """Parse cells that are JSON text, or lists already. Raises one of `BAD_CELL` for a bad one."""
    lists = cells
    if isinstance(cells[0], str):
        if column == "segment_label" and not cells[0].lstrip().startswith("["):  # the course has no brackets there
            cells = [f"[{cell}]" for cell in cells]
        text = "[" + ",".join(cells) + "]"
        if "e" in text:  # as in true, false and 1e3, which Python would convert to integers; integers have no "e"
            raise ValueError("not integers")
        lists = json.loads(text, parse_float=_refuse_float, parse_constant=_refuse_float)
    # The number of lists differs where a cell holds a part of a list, such as "[1],[2]".
    if len(lists) != len(cells) or not all(type(numbers) is list for numbers in lists):
        raise ValueError("not one list per cell")
    lengths = np.fromiter(map(len, lists), np.int64, len(lists))
    values = np.fromiter(itertools.chain.from_iterable(lists), np.int64, int(lengths.sum()))
    return ListColumn(values, lengths)


def _refuse_float(text: str) -> NoReturn:
    raise ValueError(f"{text} is not an integer")
