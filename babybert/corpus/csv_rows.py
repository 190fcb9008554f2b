"""Rows of CSV files with a header, as spreadsheets and other programs write them.

The delimiter is a comma, a semicolon, a tab or `|`. Unless the user names it, the header decides: it is the one with
which the header has the wanted columns.
"""

import csv
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import IO

from babybert.corpus.files import BadRows, decompressed, utf8_lines
from babybert.corpus.s3_file import SourceFile
from babybert.errors import DataError

DELIMITERS = {",": ",", ";": ";", "tab": "\t", "|": "|"}
MOST_HEADER_LINES = 100  # of a header whose quoted names have line breaks

ChooseColumns = Callable[[list[str]], list[int]]


def read_csv_rows(
    path: SourceFile, file: IO[bytes], bad_rows: BadRows, choose_columns: ChooseColumns, delimiter: str = "auto"
) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the chosen cells of each row of a CSV file with a header.

    Args:
        path: the file's name, for messages and to recognise compression.
        file: the open file.
        bad_rows: what to do with rows that are not UTF-8 or differ from the header in the number of cells.
        choose_columns: called with the header, returns the positions of the cells to yield; raises DataError if the
            header lacks a column.
        delimiter: a key of `DELIMITERS`, or `auto`.

    Rows count from 1, without the header. Raises DataError for a file that has no header or is not CSV.
    """
    csv.field_size_limit(sys.maxsize)
    decoding_errors: list[str] = []  # of the row that is being read; a quoted cell may span several lines

    def decoded_lines() -> Iterator[str]:
        for line_number, line in enumerate(utf8_lines(decompressed(path, file)), 1):
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                decoding_errors.append(f"line {line_number}, byte {error.start} of the line, is not UTF-8")
                yield line.decode("utf-8", "replace")

    lines = decoded_lines()
    header_lines = _read_header_lines(path, lines)
    candidates = list(DELIMITERS.values()) if delimiter == "auto" else [DELIMITERS[delimiter]]
    header_delimiter, chosen_columns = _choose_delimiter(path, header_lines, candidates, choose_columns)
    decoding_errors.clear()  # the columns were found; how another one is named does not matter
    rows = csv.reader(itertools.chain(header_lines, lines), delimiter=header_delimiter, strict=True)
    try:
        header = next(row for row in rows if row)
        for row_number, row in enumerate(rows, 1):
            if decoding_errors:
                bad_rows.report(f"{path}: row {row_number}: {decoding_errors[0]}")
            elif len(row) == len(header):
                yield row_number, [row[column] for column in chosen_columns]
            elif row:  # csv returns an empty list for an empty line
                bad_rows.report(f"{path}: row {row_number}: has {len(row)} cells, the header has {len(header)}")
            decoding_errors.clear()
    except csv.Error as error:
        raise DataError(f"{path}: line {rows.line_num}: {_explain(error)}") from error


def _read_header_lines(path: SourceFile, lines: Iterator[str]) -> list[str]:
    """Read the lines up to the end of the header: a quoted name may span several. Raises DataError if there is none."""
    header_lines = []
    quotes = 0
    for line in itertools.islice(lines, MOST_HEADER_LINES):
        if "\0" in line:
            raise DataError(f"{path}: has NUL characters, as UTF-16 without byte order mark; convert it to UTF-8")
        header_lines.append(line)
        quotes += line.count('"')
        if quotes % 2 == 0 and line.strip():
            break
    if not "".join(header_lines).strip():
        raise DataError(f"{path}: is empty; expected a CSV with a header")
    return header_lines


def _choose_delimiter(
    path: SourceFile, header_lines: list[str], candidates: list[str], choose_columns: ChooseColumns
) -> tuple[str, list[int]]:
    """Return the first candidate with which the header has the wanted columns, and their positions.

    If there is none, raises the DataError for the candidate that gives the most columns.
    """
    error: DataError | None = None
    most_cells = 0
    for delimiter in candidates:
        rows = csv.reader(header_lines, delimiter=delimiter, strict=True)
        try:
            header = next((row for row in rows if row), [])
        except csv.Error as csv_error:
            error = error or DataError(f"{path}: line {rows.line_num}: {_explain(csv_error)}")
            continue
        try:
            return delimiter, choose_columns(header)
        except DataError as column_error:
            if len(header) > most_cells:
                most_cells = len(header)
                error = column_error
    assert error is not None
    raise error


def _explain(error: csv.Error) -> str:
    if "new-line character" in str(error):
        return r"not CSV: has a carriage return that is not quoted; lines must end in \n or \r\n"
    return f"not CSV: {error}"
