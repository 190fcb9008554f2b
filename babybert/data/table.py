"""The table between preparation and training: one masked pair a row, as CSV that people and pandas can read.

Columns (lists are JSON arrays, all of a row's lists equally long):
    bert_input     token ids after masking
    bert_label     the original id where a token was chosen for MLM, 0 elsewhere
    segment_label  1 for `[CLS] A [SEP]`, 2 for `B [SEP]`, 0 for padding
    is_next        1: B follows A; 0: B is from another document (Google's BERT has it the other way round)

Reading turns the rows into flat arrays once, chunk by chunk; nothing is parsed again during training. A row costs
9 bytes a token in memory, whatever the size of the file. Every row is checked on the way in.
"""

import csv
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from babybert.data.tokenizer import FIRST_ORDINARY, MASK, UNK
from babybert.errors import DataError
from babybert.progress import Progress

LIST_COLUMNS = ("bert_input", "bert_label", "segment_label")
COLUMNS = (*LIST_COLUMNS, "is_next")
ROWS_AT_ONCE = 10_000


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

    def first(self, count: int | None) -> "Examples":
        """The first `count` pairs (all, if None)."""
        if count is None or count >= len(self):
            return self
        end = self.offsets[count]
        return Examples(self.ids[:end], self.labels[:end], self.segments[:end], self.offsets[: count + 1], self.is_next[:count])

    def original_ids(self) -> np.ndarray:
        """The ids before masking."""
        return np.where(self.labels > 0, self.labels, self.ids)

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """How often each token of the vocabulary stands in these pairs before masking; 0 for the special ones."""
        counts = np.bincount(self.original_ids(), minlength=vocab_size)
        counts[:FIRST_ORDINARY] = 0
        return counts


def write_table(path: Path, examples: Examples) -> None:
    """Write the CSV. A full disk raises OSError; whoever calls removes what is half-written."""
    with path.open("w", newline="", encoding="utf-8") as file, Progress(f"write {path.name}", len(examples), "pairs") as progress:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        arrays = (examples.ids, examples.labels, examples.segments)
        for first in range(0, len(examples), ROWS_AT_ONCE):
            last = min(first + ROWS_AT_ONCE, len(examples))
            bounds = list(itertools.pairwise(examples.offsets[first : last + 1].tolist()))
            lists = ([json.dumps(array[i:j].tolist(), separators=(",", ":")) for i, j in bounds] for array in arrays)
            writer.writerows(zip(*lists, examples.is_next[first:last].tolist(), strict=True))
            progress.advance(last - first)


def read_table(path: Path, vocab_size: int) -> Examples:
    """Read and check the CSV.

    Raises DataError, with the file's line, for a missing column, broken JSON, lists of different lengths, ids that
    the vocabulary lacks, labels at padding or `[CLS]` or `[SEP]`, and an `is_next` other than 0 and 1.
    """
    chunks = []
    line = 2  # of the file: the header is line 1
    try:
        for frame in pd.read_csv(path, dtype=str, keep_default_na=False, chunksize=ROWS_AT_ONCE):
            missing = [name for name in COLUMNS if name not in frame.columns]
            if missing:
                raise DataError(f"{path}: no column '{missing[0]}'; it has {', '.join(map(str, frame.columns))}")
            chunks.append(_read_chunk(frame.fillna(""), path, line, vocab_size))
            line += len(frame)
    except (OSError, pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as CSV ({' '.join(str(error).split())})") from error
    if line == 2:
        raise DataError(f"{path}: has no rows")
    ids, labels, segments, lengths, is_next = (np.concatenate(column) for column in zip(*chunks, strict=True))
    return Examples(ids, labels, segments, np.concatenate([[0], np.cumsum(lengths)]), is_next)


def _read_chunk(frame: pd.DataFrame, path: Path, line: int, vocab_size: int) -> tuple[np.ndarray, ...]:
    ids, labels, segments = (_parse_lists(frame[name].tolist(), f"{path}: line", line, name) for name in LIST_COLUMNS)
    lengths = ids[1]

    def check(bad: np.ndarray, message: Callable[[int], str], a_row: bool = False) -> None:
        """Refuse the first row that `bad` marks, with a flag a token (or `a_row`)."""
        if bad.any():
            first = int(np.argmax(bad))
            row = first if a_row else int(np.searchsorted(np.cumsum(lengths), first, side="right"))
            raise DataError(f"{path}: line {line + row}: {message(first)}")

    check(lengths == 0, lambda i: "bert_input is empty", a_row=True)
    for name, other in (("bert_label", labels[1]), ("segment_label", segments[1])):
        check(other != lengths, lambda i, name=name, other=other: f"bert_input has {lengths[i]} entries, {name} has {other[i]}", a_row=True)  # type: ignore[misc]
    for name, flat in (("bert_input", ids[0]), ("bert_label", labels[0])):
        check((flat < 0) | (flat >= vocab_size), lambda i, name=name, flat=flat: f"{name} has id {flat[i]}; the vocabulary has 0 to {vocab_size - 1}")  # type: ignore[misc]
    special = (ids[0] < FIRST_ORDINARY) & (ids[0] != MASK) & (ids[0] != UNK)
    check(special & (labels[0] != 0), lambda i: f"bert_label is {labels[0][i]} at special token {ids[0][i]}; only words are masked")
    check((segments[0] < 0) | (segments[0] > 2), lambda i: f"segment_label is {segments[0][i]}; it must be 0, 1 or 2")
    flags = frame["is_next"].str.strip()
    check(~flags.isin(["0", "1"]).to_numpy(), lambda i: f"is_next is '{flags.iloc[i]}'; it must be 0 or 1", a_row=True)
    return ids[0].astype(np.int32), labels[0].astype(np.int32), segments[0].astype(np.int8), lengths, flags.to_numpy(np.int8)


def _parse_lists(cells: list[str], where: str, line: int, column: str) -> tuple[np.ndarray, np.ndarray]:
    """The JSON lists of one column as (flat int64 array, lengths): parsed in one go, then cell by cell if that fails."""
    try:
        return _flatten(json.loads("[" + ",".join(cells) + "]", parse_float=_no_float, parse_constant=_no_float), len(cells))
    except (ValueError, TypeError, OverflowError):
        for row, cell in enumerate(cells):
            try:
                _flatten([json.loads(cell, parse_float=_no_float, parse_constant=_no_float)], 1)
            except (ValueError, TypeError, OverflowError):
                raise DataError(f"{where} {line + row}: {column} is not a JSON list of whole numbers: {cell[:40]!r}") from None
        raise AssertionError("cells that parse one by one parse together") from None


def _flatten(lists: list[list[int]], count: int) -> tuple[np.ndarray, np.ndarray]:
    if len(lists) != count or not all(type(entries) is list for entries in lists):
        raise ValueError("not one list a cell")
    lengths = np.fromiter(map(len, lists), np.int64, count)
    return np.fromiter(itertools.chain.from_iterable(lists), np.int64, int(lengths.sum())), lengths


def _no_float(text: str) -> int:
    raise ValueError(f"{text} is not a whole number")
