"""Read documents from one file: plain text, CSV, JSON or Parquet. `documents.py` puts files into a corpus.

Every reader takes the file's path (for messages and to recognise compression), the open file, and what to do with bad
rows; it yields documents in the order of the file and holds only a few rows in memory.
"""

from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

import pyarrow.parquet

from babybert.corpus.csv_rows import read_csv_rows
from babybert.corpus.files import BadRows, decompressed, find_column, utf8_lines
from babybert.corpus.json_rows import read_json_texts
from babybert.corpus.parquet_cells import is_text, to_python
from babybert.corpus.s3_file import SourceFile
from babybert.errors import DataError

ROWS_PER_BATCH = 1000  # of a Parquet file


class Document(NamedTuple):
    """One text of a corpus.

    Attributes:
        name: where the text comes from (a path, and a row or line), for error messages.
        text: the text, which UTF-8 can encode.
    """

    name: str
    text: str


Reader = Callable[[SourceFile, IO[bytes], BadRows], Iterator[Document]]


def read_text(path: SourceFile, file: IO[bytes], bad_rows: BadRows) -> Iterator[Document]:
    """Read a text file as one document."""
    text = decode(str(path), b"".join(utf8_lines(decompressed(path, file))), bad_rows)
    if text is not None:
        yield Document(str(path), text)


def read_paragraphs(path: SourceFile, file: IO[bytes], bad_rows: BadRows) -> Iterator[Document]:
    """Read the documents of a text file, which are separated by lines that are blank but for white space."""
    paragraph: list[str] = []
    first_line = 0
    for line_number, line in enumerate(utf8_lines(decompressed(path, file)), 1):
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


def read_csv(
    path: SourceFile, file: IO[bytes], bad_rows: BadRows, column: str, delimiter: str = "auto"
) -> Iterator[Document]:
    """Read the texts in one column of a CSV file with a header."""

    def choose_columns(header: list[str]) -> list[int]:
        return [find_column(path, header, column, "--text-column")]

    for row_number, (text,) in read_csv_rows(path, file, bad_rows, choose_columns, delimiter):
        yield Document(f"{path}: row {row_number}", text)


def read_json(path: SourceFile, file: IO[bytes], bad_rows: BadRows, key: str) -> Iterator[Document]:
    """Read the texts under one key of the objects in a file: one object per line, or an array of objects."""
    for where, text in read_json_texts(path, file, bad_rows, key):
        yield Document(where, text)


def read_parquet(path: SourceFile, file: IO[bytes], bad_rows: BadRows, column: str) -> Iterator[Document]:
    """Read the texts in one column of a Parquet file."""
    for name, (cell,) in read_parquet_rows(path, file, {column: True}, {column: "--text-column"}):
        text = decode(name, cell, bad_rows) if isinstance(cell, bytes) else cell
        if text is not None:
            yield Document(name, text)
        elif cell is None:
            bad_rows.report(f"{name}: '{column}' is missing")


def read_parquet_rows(
    path: SourceFile, file: IO[bytes], columns: dict[str, bool], flags: dict[str, str]
) -> Iterator[tuple[str, list[Any]]]:
    """Yield where each row of a Parquet file is, for messages, and the cells of some columns.

    `columns` says of each column whether it must hold texts; `flags` has the flag that names it. A text that is not
    UTF-8 is returned as bytes. Raises DataError.
    """
    table = pyarrow.parquet.ParquetFile(file)
    schema = table.schema_arrow
    for column, is_of_texts in columns.items():
        column_type = schema.field(find_column(path, schema.names, column, flags[column])).type
        if is_of_texts and not is_text(column_type):
            raise DataError(f"{path}: column '{column}' holds {column_type}, not text")
    row_number = 0
    for batch in table.iter_batches(ROWS_PER_BATCH, columns=list(columns)):
        for cells in zip(*(to_python(batch.column(column)) for column in columns), strict=True):
            row_number += 1
            yield f"{path}: row {row_number}", list(cells)


def decode(name: str, content: bytes, bad_rows: BadRows) -> str | None:
    """Decode UTF-8, with or without a byte order mark; None for bytes that are not UTF-8 and are to be skipped."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad_rows.report(f"{name}: byte {error.start} is not UTF-8; convert or remove it, or add --skip-bad-rows")
        return None
