"""Read documents from one file: plain text, CSV, JSON Lines or Parquet. `documents.py` puts files into a corpus.

Every reader takes the file's path (for messages and to recognise `.gz` and `.zst`), the open file, and what to do with
bad rows; it yields documents in the order of the file and holds only a few rows in memory.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow
import pyarrow.parquet

from babybert.corpus.files import BYTE_ORDER_MARK_CODEC, BadRows, decompressed, find_column, read_csv_rows
from babybert.errors import DataError

ROWS_PER_BATCH = 1000  # of a Parquet file


@dataclass(frozen=True)
class Document:
    """One text of a corpus.

    Attributes:
        name: where the text comes from (a path, and a row or line), for error messages.
        text: the text, which UTF-8 can encode.
    """

    name: str
    text: str


Reader = Callable[[Path, IO[bytes], BadRows], Iterator[Document]]


def read_text(path: Path, file: IO[bytes], bad_rows: BadRows) -> Iterator[Document]:
    """Read a text file as one document."""
    text = decode(str(path), decompressed(path, file).read(), bad_rows)
    if text is not None:
        yield Document(str(path), text)


def read_paragraphs(path: Path, file: IO[bytes], bad_rows: BadRows) -> Iterator[Document]:
    """Read the documents of a text file, which are separated by lines that are blank but for white space."""
    paragraph: list[str] = []
    first_line = 0
    for line_number, line in enumerate(decompressed(path, file), 1):
        text = decode(f"{path}: line {line_number}", line, bad_rows)
        if text is None:
            continue
        if text.strip():
            first_line = first_line if paragraph else line_number
            paragraph.append(text)
        elif paragraph:
            yield Document(f"{path}: line {first_line}", "".join(paragraph))
            paragraph = []
    if paragraph:
        yield Document(f"{path}: line {first_line}", "".join(paragraph))


def read_csv(path: Path, file: IO[bytes], bad_rows: BadRows, column: str) -> Iterator[Document]:
    """Read the texts in one column of a CSV file with a header."""

    def choose_columns(header: list[str]) -> list[int]:
        return [find_column(path, header, column, "--text-column")]

    for row_number, (text,) in read_csv_rows(path, file, bad_rows, choose_columns):
        yield Document(f"{path}: row {row_number}", text)


def read_jsonl(path: Path, file: IO[bytes], bad_rows: BadRows, key: str) -> Iterator[Document]:
    """Read the texts under one key of the JSON object on each line; blank lines are skipped."""
    for line_number, line in enumerate(decompressed(path, file), 1):
        if not line.strip():
            continue
        where = f"{path}: line {line_number}"
        try:
            row = json.loads(line)
        except UnicodeDecodeError as error:
            bad_rows.report(f"{where}: byte {error.start} of the line is not UTF-8")
            continue
        except (ValueError, RecursionError) as error:
            bad_rows.report(f"{where}: not JSON: {error}")
            continue
        if not isinstance(row, dict):
            bad_rows.report(f"{where}: not a JSON object")
        elif key not in row:
            bad_rows.report(f"{where}: no key '{key}'; it has {', '.join(row)}; choose one with --text-column")
        elif not isinstance(row[key], str):
            bad_rows.report(f"{where}: '{key}' is not a string")
        else:
            yield Document(where, row[key])


def read_parquet(path: Path, file: IO[bytes], bad_rows: BadRows, column: str) -> Iterator[Document]:
    """Read the texts in one column of strings of a Parquet file."""
    table = pyarrow.parquet.ParquetFile(file)
    schema = table.schema_arrow
    column_type = schema.field(find_column(path, schema.names, column, "--text-column")).type
    if not (pyarrow.types.is_string(column_type) or pyarrow.types.is_large_string(column_type)):
        raise DataError(f"{path}: column '{column}' holds {column_type}, not text")
    row_number = 0
    for batch in table.iter_batches(ROWS_PER_BATCH, columns=[column]):
        for text in batch.column(0).to_pylist():
            row_number += 1
            if text is None:
                bad_rows.report(f"{path}: row {row_number}: '{column}' is missing")
            else:
                yield Document(f"{path}: row {row_number}", text)


def decode(name: str, content: bytes, bad_rows: BadRows) -> str | None:
    """Decode UTF-8, with or without a byte order mark; None for bytes that are not UTF-8 and are to be skipped."""
    try:
        return content.decode(BYTE_ORDER_MARK_CODEC)
    except UnicodeDecodeError as error:
        bad_rows.report(f"{name}: byte {error.start} is not UTF-8; convert or remove the file, or add --skip-bad-rows")
        return None
