"""What all readers of user files share: decompression, CSV rows, column lookup, and errors that name file and row.

A bad row raises DataError or, if the user asked for it, is counted and skipped (`BadRows`). A problem of a whole file
(damaged compression, no valid CSV, a missing column) always raises DataError.
"""

import contextlib
import csv
import gzip
import io
import logging
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, cast

import zstandard

from babybert.errors import DataError, os_reason

logger = logging.getLogger(__name__)

COMPRESSION_SUFFIXES = ("", ".gz", ".zst")
BYTE_ORDER_MARK_CODEC = "utf-8-sig"  # UTF-8 with the byte order mark that Windows programs put first


class BadRows:
    """Policy for bad rows: raise DataError, or with `skip` log and count them.

    Attributes:
        skip: whether to skip bad rows instead of raising.
        count: how many rows have been skipped.
    """

    MAX_LOGGED = 10

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip
        self.count = 0

    def report(self, message: str) -> None:
        """Handle one bad row: raise DataError(message), or log the message and count the row."""
        if not self.skip:
            raise DataError(message)
        self.count += 1
        if self.count <= self.MAX_LOGGED:
            logger.info(f"skipped: {message}")
        elif self.count == self.MAX_LOGGED + 1:
            logger.info("skipped: more rows; from here on they are counted but not shown")


def find_column(
    path: Path, header: Sequence[str], column: str, flag: str = "", normalize: Callable[[str], str] = str
) -> int:
    """Return the position of `column` in `header`, whose names are compared after `normalize`.

    Raises DataError if there is no such column; the message suggests `flag`, the option that names the column.
    """
    names = [normalize(name) for name in header]
    if column not in names:
        advice = f"; choose one with {flag}" if flag else ""
        raise DataError(f"{path}: no column '{column}'; it has {', '.join(header)}{advice}")
    return names.index(column)


def read_csv_rows(
    path: Path, file: IO[bytes], bad_rows: BadRows, choose_columns: Callable[[list[str]], list[int]]
) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the chosen cells of each row of a CSV file with a header.

    Args:
        path: the file's name, for messages and to recognise compression.
        file: the open file.
        bad_rows: what to do with rows that are not UTF-8 or differ from the header in the number of cells.
        choose_columns: called with the header, returns the positions of the cells to yield.

    Rows count from 1, without the header. Raises DataError for a file that has no header or is not CSV.
    """
    csv.field_size_limit(sys.maxsize)
    decoding_errors: list[str] = []  # of the row that is being read; a quoted cell may span several lines

    def decoded_lines() -> Iterator[str]:
        for line_number, line in enumerate(decompressed(path, file), 1):
            try:
                yield line.decode(BYTE_ORDER_MARK_CODEC if line_number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                decoding_errors.append(f"line {line_number}, byte {error.start} of the line, is not UTF-8")
                yield line.decode("utf-8", "replace")

    rows = csv.reader(decoded_lines(), strict=True)
    try:
        header = next(rows, None)
        if header is None:
            raise DataError(f"{path}: is empty; expected a CSV with a header")
        chosen_columns = choose_columns(header)
        for row_number, row in enumerate(rows, 1):
            if decoding_errors:
                bad_rows.report(f"{path}: row {row_number}: {decoding_errors[0]}")
            elif len(row) == len(header):
                yield row_number, [row[column] for column in chosen_columns]
            elif row:  # csv returns an empty list for an empty line
                bad_rows.report(f"{path}: row {row_number}: has {len(row)} cells, the header has {len(header)}")
            decoding_errors.clear()
    except csv.Error as error:
        raise DataError(f"{path}: line {rows.line_num}: not CSV: {error}") from error


def decompressed(path: Path, file: IO[bytes]) -> IO[bytes]:
    """Return a file that reads the content of `file`, decompressed if the name ends in `.gz` or `.zst`."""
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(file))
    if path.suffix == ".zst":
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
    return file


@contextlib.contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turn what the libraries raise for damaged or unreadable files into a DataError about the file."""
    try:
        yield
    except _damaged_file_errors() as error:
        details = " ".join(str(error).split())
        raise DataError(f"{path}: damaged, or not what its name says ({details}); get the file again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {os_reason(error)}") from error


def _damaged_file_errors() -> tuple[type[Exception], ...]:
    # Imported only when something was raised: pyarrow takes 25 MB that training on cached data does without.
    import pyarrow

    return tarfile.TarError, EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile, pyarrow.ArrowException
