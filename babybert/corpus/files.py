"""Reading files that people bring: decompressed on the way, row by row, with every error naming file and row.

A bad row is refused, or, where the user asked for it, counted and passed over (`BadRows`). What is wrong with a whole
file (broken compression, not CSV at all, a missing column) is always refused.
"""

import contextlib
import csv
import gzip
import io
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, cast

import zstandard

from babybert.errors import DataError
from babybert.progress import say

COMPRESSED = ("", ".gz", ".zst")


class BadRows:
    """What to do about a bad row: refuse it, or (`skip`) count it, say so and go on."""

    SHOWN = 10

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip
        self.count = 0

    def report(self, message: str) -> None:
        """Raise DataError(message), or count the row that it is about."""
        if not self.skip:
            raise DataError(message)
        self.count += 1
        if self.count <= self.SHOWN:
            say(f"skipped: {message}")
        elif self.count == self.SHOWN + 1:
            say("skipped: more rows, which are only counted from here on")


def read_csv_rows(
    path: Path, file: IO[bytes], bad: BadRows, choose: Callable[[list[str]], list[int]]
) -> Iterator[tuple[int, list[str]]]:
    """Row number (the first after the header is 1) and the cells of the columns that `choose` picks from the header.

    Raises DataError for a file without a header or, unless bad rows are skipped, rows of another number of cells.
    """
    csv.field_size_limit(sys.maxsize)
    undecodable: list[str] = []

    def lines() -> Iterator[str]:
        for number, line in enumerate(decompressed(path, file), 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                undecodable.append(f"line {number}, byte {error.start} of the line, is not UTF-8")
                yield line.decode("utf-8", "replace")

    rows = csv.reader(lines(), strict=True)
    try:
        header = next(rows, None)
        if header is None:
            raise DataError(f"{path}: is empty; expected a CSV with a header")
        chosen = choose(header)
        for number, row in enumerate(rows, 1):
            if undecodable:
                bad.report(f"{path}: row {number}: {undecodable[0]}")
            elif len(row) == len(header):
                yield number, [row[i] for i in chosen]
            elif row:  # csv gives an empty list for an empty line
                bad.report(f"{path}: row {number}: has {len(row)} cells, the header has {len(header)}")
            undecodable.clear()
    except csv.Error as error:
        raise DataError(f"{path}: line {rows.line_num}: not CSV: {error}") from error


def decompressed(path: Path, file: IO[bytes]) -> IO[bytes]:
    """What an open file holds, decompressed if its name ends in `.gz` or `.zst`."""
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(file))
    if path.suffix == ".zst":
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
    return file


def _damaged() -> tuple[type[Exception], ...]:
    """What those libraries raise for a file that is not whole."""
    import pyarrow  # 25 MB that training on data read before has no use for

    return tarfile.TarError, EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile, pyarrow.ArrowException


@contextlib.contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Errors of the libraries that read and decompress, as one line about the file."""
    try:
        yield
    except _damaged() as error:
        raise DataError(
            f"{path}: not whole, or not what its name says ({' '.join(str(error).split())}); get the file again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
