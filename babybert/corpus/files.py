"""What all readers of user files share: decompression, encodings, column lookup, and errors that name file and row.

A bad row or file raises DataError or, if the user asked for it, is counted and skipped (`BadRows`).
"""

import bz2
import codecs
import contextlib
import functools
import gzip
import io
import logging
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, cast

from babybert.corpus.s3_file import SourceFile
from babybert.errors import DataError, os_reason

logger = logging.getLogger(__name__)

COMPRESSION_SUFFIXES = ("", ".gz", ".zst", ".bz2", ".xz")
# What files of other kinds start with, and no text.
OTHER_KINDS = {
    b"\x1f\x8b": "is compressed; its name must end in .gz",
    b"\x28\xb5\x2f\xfd": "is compressed; its name must end in .zst",
    b"\xfd7zXZ\x00": "is compressed; its name must end in .xz",
    b"PK\x03\x04": "is a zip archive or a spreadsheet; unpack it, or save it as CSV",
    b"PAR1\x15": "is a Parquet file; its name must end in .parquet",
}
# UTF-32 first: its mark starts with that of UTF-16.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
CHUNK_BYTES = 1 << 20
NAMES_SHOWN = 20  # columns or keys, in an error message
LONGEST_NAME_SHOWN = 60  # characters


class BadRows:
    """Policy for bad rows and files: raise DataError, or with `skip` log and count them.

    Attributes:
        skip: whether to skip bad rows and files instead of raising.
        quiet: keep the messages instead of logging them, for a process whose messages another one logs (`add`).
        count: how many rows have been skipped.
        files: the files of which a part, or everything, has been skipped.
        row_messages: what to log about the first rows, if `quiet`.
        file_messages: what to log about files, if `quiet`.
    """

    MAX_LOGGED = 10

    def __init__(self, skip: bool = False, quiet: bool = False) -> None:
        self.skip = skip
        self.quiet = quiet
        self.start_again()

    def start_again(self) -> None:
        """Forget what was counted, before the files are read once more."""
        self.count = 0
        self.files: list[str] = []
        self.row_messages: list[str] = []
        self.file_messages: list[str] = []

    def add(self, others: "BadRows") -> None:
        """Count the bad rows and files that another process has met, and log its messages."""
        for shown, message in enumerate(others.row_messages):
            self._show_row(self.count + shown + 1, message)
        self.count += others.count
        self.files += others.files
        for message in others.file_messages:
            logger.warning(message)

    def report(self, message: str) -> None:
        """Handle one bad row: raise DataError(message), or log the message and count the row."""
        error = DataError(message)
        if not self.skip:
            raise error
        self.count += 1
        self._show_row(self.count, f"skipped: {error}")

    def _show_row(self, number: int, message: str) -> None:
        """Log the message about the bad row with this number, or keep it."""
        if self.quiet:
            if number <= self.MAX_LOGGED + 1:  # one more than is shown, so that the log says that there are more
                self.row_messages.append(message)
        elif number <= self.MAX_LOGGED:
            logger.info(message)
        elif number == self.MAX_LOGGED + 1:
            logger.info("skipped: more rows; from here on they are counted but not shown")

    @contextlib.contextmanager
    def bad_file(self, path: SourceFile) -> Iterator[None]:
        """Handle a DataError about the file that is read inside: raise it, or log it and count the file.

        Rows that were yielded before are kept: reading the same file again yields the same rows.
        """
        try:
            yield
        except DataError as error:
            if not self.skip:
                raise
            self.files.append(str(path))
            message = f"skipped a file, except for rows before the damage: {error}"
            if self.quiet:
                self.file_messages.append(message)
            else:
                logger.warning(message)


def find_column(
    path: SourceFile, header: Sequence[str], column: str, flag: str = "", normalize: Callable[[str], str] = str
) -> int:
    """Return the position of `column` in `header`, whose names are compared after `normalize`.

    Raises DataError if there is no such column, or more than one; the message suggests `flag`, the option that names
    the column.
    """
    names = [normalize(name) for name in header]
    if column not in names:
        advice = f"; choose one with {flag}" if flag else ""
        raise DataError(f"{path}: no column '{column}'; it has {shown_names(header)}{advice}")
    if names.count(column) > 1:
        raise DataError(f"{path}: the header has column '{column}' {names.count(column)} times; rename all but one")
    return names.index(column)


def shown_names(names: Sequence[str]) -> str:
    """Return names from a file for an error message, not too many and none too long."""
    shown = [shown_text(name, LONGEST_NAME_SHOWN) for name in names[:NAMES_SHOWN]]
    return ", ".join([*shown, *(["..."] if len(names) > NAMES_SHOWN else [])])


def shown_text(text: str, longest: int) -> str:
    """Return the start of a text for an error message."""
    return text if len(text) <= longest else text[:longest] + "..."


def decompressed(path: SourceFile, file: IO[bytes]) -> io.BufferedIOBase:
    """Return a file that reads the content of `file`, decompressed as the ending of its name says.

    Raises DataError for a name without such an ending if the content is that of another kind of file.
    """
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(io.BufferedIOBase, gzip.open(file))
    if suffix == ".bz2":
        return bz2.open(file)
    if suffix == ".xz":
        return lzma.open(file)
    if suffix == ".zst":
        # Not zstandard's own reader: it takes a truncated file for a complete one.
        import pyarrow  # here, because it takes 25 MB, and training on cached data does not use it

        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(_BorrowedFile(file), mode="r"), "zstd")
        return cast(io.BufferedIOBase, io.BufferedReader(stream))
    content = cast(io.BufferedReader, file)
    start = content.peek(8)
    for kind, problem in OTHER_KINDS.items():
        if start.startswith(kind):
            raise DataError(f"{path}: {problem}")
    return content


class _BorrowedFile:
    """A file for pyarrow to read. It stays open: pyarrow closes its files when it is done with them."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self.read = file.read

    def close(self) -> None:
        """Do nothing."""


def encoding_of(content: io.BufferedIOBase) -> str:
    """Return the encoding that the byte order mark at the start names, or `utf-8` without one. Nothing is consumed."""
    start: bytes = cast(Any, content).peek(4)[:4]  # every file that `decompressed` returns has `peek`
    return next((encoding for mark, encoding in BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8")


def utf8_lines(content: io.BufferedIOBase) -> Iterator[bytes]:
    """Yield the lines of a text file in UTF-8 without byte order mark. UTF-16 and UTF-32 are converted.

    UTF-8 is not checked. Raises UnicodeDecodeError for damaged UTF-16 or UTF-32, which `file_errors` reports.
    """
    encoding = encoding_of(content)
    if encoding == "utf-8-sig":
        content.read(len(codecs.BOM_UTF8))
    if encoding.startswith("utf-8"):
        yield from content
        return
    rest = ""
    for chunk in decoded_chunks(content, encoding):
        *lines, rest = (rest + chunk).split("\n")
        for line in lines:
            yield f"{line}\n".encode()
    yield rest.encode()


def decoded_chunks(content: io.BufferedIOBase, encoding: str) -> Iterator[str]:
    """Yield the text of a file in chunks. Raises UnicodeDecodeError, which `file_errors` reports.

    Unlike a TextIOWrapper, this does not close the file when it is done.
    """
    chunks = iter(functools.partial(content.read, CHUNK_BYTES), b"")
    return codecs.iterdecode(chunks, encoding)


@contextlib.contextmanager
def file_errors(path: SourceFile) -> Iterator[None]:
    """Turn what the libraries raise for damaged or unreadable files into a DataError about the file."""
    try:
        yield
    except _damaged_file_errors() as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno is None:  # not from the system: a library says that the content is wrong
            raise _damaged(path, error) from error
        raise DataError(f"{path}: cannot be read: {os_reason(error)}") from error


def _damaged(path: SourceFile, error: Exception) -> DataError:
    details = shown_text(" ".join(str(error).split()), 300)
    return DataError(f"{path}: damaged, or not what its name says ({details}); get the file again")


def _damaged_file_errors() -> tuple[type[Exception], ...]:
    # Imported only when something was raised: pyarrow takes 25 MB that training on cached data does without.
    import pyarrow

    return (
        tarfile.TarError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        gzip.BadGzipFile,
        pyarrow.ArrowException,
        UnicodeDecodeError,
    )
