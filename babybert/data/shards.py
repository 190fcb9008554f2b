"""Write the table in shards: CSV (plain, `.gz`, `.zst`) or Parquet, with sizes and digests computed on the way."""

import functools
import gzip
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import zstandard

from babybert.data.pairs import ranges
from babybert.data.table import COLUMNS, Examples

ROWS_PER_CHUNK = 10_000
FORMATS = ("csv", "csv.gz", "csv.zst", "parquet")
MOST_TOKENS = 10**7  # a larger vocabulary has ids that, with a comma, do not fit in a fragment of 8 bytes
GZIP_LEVEL = 6
ZSTANDARD_LEVEL = 3

PARQUET_SCHEMA = pa.schema(
    [
        pa.field("bert_input", pa.list_(pa.int32())),
        pa.field("bert_label", pa.list_(pa.int32())),
        pa.field("segment_label", pa.list_(pa.int8())),
        pa.field("is_next", pa.int8()),
    ]
)


class ShardWriter:
    """Append examples to shards; a new one is begun when the current one has reached `shard_bytes`. A context manager.

    Errors of the disk are raised as OSError. The caller deletes files that are incomplete then. `keep` is called with
    the file of each finished shard.

    Attributes:
        shards: what `dataset.json` records about each finished shard; complete after exit.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        file_format: str,
        shard_bytes: int,
        vocab_size: int,
        keep: Callable[[Path], None],
    ) -> None:
        self._folder = folder
        self._name = name
        self._format = file_format
        self._shard_bytes = shard_bytes
        self._vocab_size = vocab_size
        self._keep = keep
        self._shard: Shard | None = None
        self.shards: list[dict[str, Any]] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shard and error is None:
            self._finish(self._shard)

    def add(self, examples: Examples) -> None:
        """Append all rows."""
        for chunk in chunks_of(examples):
            if self._shard is None:
                path = self._folder / shard_name(self._name, len(self.shards), self._format)
                self._shard = Shard(path, self._format, self._vocab_size)
            self._shard.write_chunk(chunk)
            if self._shard.size >= self._shard_bytes:
                self._finish(self._shard)
                self._shard = None

    def _finish(self, shard: "Shard") -> None:
        self.shards.append(shard.close())
        self._keep(self._folder / self.shards[-1]["file"])


def shard_name(split: str, number: int, file_format: str) -> str:
    """Return the name of a shard's file."""
    return f"{split}-{number:05d}.{file_format}"


def chunks_of(examples: Examples) -> Iterator[Examples]:
    """Yield all rows, `ROWS_PER_CHUNK` at a time."""
    for first in range(0, len(examples), ROWS_PER_CHUNK):
        yield examples.rows(first, first + ROWS_PER_CHUNK)


class HashingFile:
    """A binary file to write to that computes the digest and the size of what it is given.

    Attributes:
        size: bytes written so far.
        closed: always False, as pyarrow asks for it; whoever opened the underlying file closes it.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0
        self.closed = False

    def write(self, content: Any) -> int:
        """Write all of `content`, any buffer of bytes."""
        self._hash.update(content)
        self._file.write(content)
        size = memoryview(content).nbytes
        self.size += size
        return size

    def flush(self) -> None:
        """Do nothing; compressors call it, and the underlying file is buffered."""

    def tell(self) -> int:
        """Return the position, which is the number of bytes written."""
        return self.size

    @property
    def sha256(self) -> str:
        """Hex digest of what has been written."""
        return self._hash.hexdigest()


class Shard:
    """One file of the table that is being written."""

    def __init__(self, path: Path, file_format: str, vocab_size: int) -> None:
        assert file_format in FORMATS, file_format
        self._csv = csv_formatter(vocab_size) if file_format != "parquet" else None
        self._path = path
        self._rows = 0
        self._file = path.open("wb")
        self._hashing_file = HashingFile(self._file)
        self._out: Any = self._hashing_file
        if file_format == "csv.gz":
            # Without name and time in the header, so that the same data gives the same bytes.
            self._out = gzip.GzipFile("", "wb", compresslevel=GZIP_LEVEL, fileobj=self._hashing_file, mtime=0)
        elif file_format == "csv.zst":
            compressor = zstandard.ZstdCompressor(level=ZSTANDARD_LEVEL)
            self._out = compressor.stream_writer(self._hashing_file, closefd=False)  # type: ignore[arg-type]
        elif file_format == "parquet":
            self._out = pyarrow.parquet.ParquetWriter(self._hashing_file, PARQUET_SCHEMA, compression="zstd")
        if file_format != "parquet":
            self._out.write((",".join(COLUMNS) + "\n").encode())

    @property
    def size(self) -> int:
        """Bytes that have been written to the file, after compression."""
        return self._hashing_file.size

    def add(self, examples: Examples) -> None:
        """Append all rows."""
        for chunk in chunks_of(examples):
            self.write_chunk(chunk)

    def write_chunk(self, examples: Examples) -> None:
        """Append rows, few enough to format them at once."""
        if self._csv:
            self.write_csv(self._csv.format(examples), len(examples))
        else:
            self.write_parquet(examples)

    def write_csv(self, text: np.ndarray, rows: int) -> None:
        """Append CSV text (uint8) of this many rows."""
        self._out.write(text.data)
        self._out.flush()  # what the compressor holds back would be missing in `size`
        self._rows += rows

    def write_parquet(self, examples: Examples) -> None:
        """Append rows, with their lists as Parquet lists."""
        offsets = pa.array((examples.offsets - examples.offsets[0]).astype(np.int32))
        lists = [
            pa.ListArray.from_arrays(offsets, pa.array(values))
            for values in (examples.ids, examples.labels, examples.segments)
        ]
        self._out.write_table(pa.table([*lists, pa.array(examples.is_next)], schema=PARQUET_SCHEMA))
        self._rows += len(examples)

    def close(self) -> dict[str, Any]:
        """Finish the file and return what `dataset.json` records about it."""
        if self._out is not self._hashing_file:
            self._out.close()
        self._file.close()
        return {
            "file": self._path.name,
            "rows": self._rows,
            "bytes": self._hashing_file.size,
            "sha256": self._hashing_file.sha256,
        }


class CsvFormatter:
    """Formats rows as CSV text with a few numpy calls, without a Python object per number.

    The text of a row is a sequence of *fragments*, which are looked up in a table:

        "[   7   ,3   ]","[   0   ,8   ]","[   1   ,2   ]",0\\n

    Every number below `vocab_size` is in the table twice: with a comma, and without one for the start of a list. All
    fragments have 8 bytes, the short ones padded with NUL: one indexing operation makes the text of all rows, another
    removes the NULs. The table takes 16 bytes per token of the vocabulary.
    """

    def __init__(self, vocab_size: int) -> None:
        assert 3 <= vocab_size < MOST_TOKENS  # 3: the segments 0, 1 and 2 are looked up as well
        numbers = [str(number) for number in range(vocab_size)]
        numbers_with_comma = ["," + number for number in numbers]
        punctuation = ['"[', ']","[', ']",0\n', ']",1\n']
        fragments = [fragment.encode() for fragment in (*numbers_with_comma, *numbers, *punctuation)]
        self._fragments = np.array(fragments, "S8").view(np.uint64)
        # Where the fragments are in the table. A number with a comma is at the number itself.
        self._without_comma = vocab_size
        self._row_start = 2 * vocab_size
        self._between_lists = self._row_start + 1
        self._row_end = self._row_start + 2  # for is_next 0; the next one is for is_next 1

    def format(self, examples: Examples) -> np.ndarray:
        """Return the CSV text (uint8) of these rows."""
        rows = len(examples)
        lengths = np.diff(examples.offsets)
        # A row of L tokens has three lists of L numbers, and a fragment before, between and after them.
        first_token = examples.offsets[:-1] - examples.offsets[0]
        row_start = 3 * first_token + 4 * np.arange(rows)
        fragments = np.empty(3 * len(examples.ids) + 4 * rows, np.int32)

        fragments[row_start] = self._row_start
        list_start = row_start + 1
        for values in (examples.ids, examples.labels, examples.segments):
            fragments[ranges(list_start, lengths)] = values
            fragments[list_start] += self._without_comma
            list_end = list_start + lengths
            fragments[list_end] = self._between_lists
            list_start = list_end + 1
        row_end = list_start - 1  # what follows the last list is not a separator
        fragments[row_end] = self._row_end + examples.is_next.astype(np.int32)

        padded_text = self._fragments[fragments].view(np.uint8)
        text: np.ndarray = padded_text[padded_text != 0]
        return text


@functools.lru_cache(maxsize=1)
def csv_formatter(vocab_size: int) -> CsvFormatter:
    """Return a formatter; a process makes its table once for all shards."""
    return CsvFormatter(vocab_size)
