"""Write the table in shards: CSV (plain, `.gz`, `.zst`) or Parquet, hashed while it is written.

CSV text is made without a Python object a number: every number that can occur is spelled once, in 8 bytes padded with
NUL, and a chunk of rows is these spellings looked up side by side with the NULs taken out.
"""

import gzip
import hashlib
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import zstandard

from babybert.data.table import COLUMNS, Examples

ROWS_AT_ONCE = 10_000
FORMATS = ("csv", "csv.gz", "csv.zst", "parquet")
MOST_TOKENS = 10**7  # a comma and seven digits are 8 bytes


class ShardWriter:
    """Append examples; a shard that has grown to `shard_bytes` is closed and the next begun. A context manager.

    Errors of the disk are raised as OSError; whoever calls removes what is half-written.
    """

    def __init__(self, folder: Path, name: str, kind: str, shard_bytes: int, vocab_size: int) -> None:
        assert kind in FORMATS, kind
        self._folder, self._name, self._kind, self._shard_bytes = folder, name, kind, shard_bytes
        self._spell = CsvSpelling(vocab_size) if kind != "parquet" else None
        self._shard: Shard | None = None
        self.shards: list[dict[str, Any]] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shard and error is None:
            self.shards.append(self._shard.close())

    def add(self, examples: Examples) -> None:
        """Append all rows."""
        for first in range(0, len(examples), ROWS_AT_ONCE):
            chunk = examples.rows(first, first + ROWS_AT_ONCE)
            if self._shard is None:
                self._shard = Shard(self._folder / f"{self._name}-{len(self.shards):05d}.{self._kind}", self._kind)
            if self._spell:
                self._shard.write_csv(self._spell.rows(chunk), len(chunk))
            else:
                self._shard.write_parquet(chunk)
            if self._shard.size >= self._shard_bytes:
                self.shards.append(self._shard.close())
                self._shard = None


class Hashed:
    """A binary file that hashes and counts what passes through it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self.size, self.closed = file, hashlib.sha256(), 0, False

    def write(self, content: Any) -> int:
        """Write all of `content`, any buffer of bytes."""
        self._hash.update(content)
        self._file.write(content)
        size = memoryview(content).nbytes
        self.size += size
        return size

    def flush(self) -> None:
        """Nothing: the file below keeps its own buffer."""

    def tell(self) -> int:
        """Bytes so far."""
        return self.size

    @property
    def sha256(self) -> str:
        """Hex digest of what has been written."""
        return self._hash.hexdigest()


class Shard:
    """One file of the table, being written."""

    def __init__(self, path: Path, kind: str) -> None:
        self._path, self._rows = path, 0
        self._file = path.open("wb")
        self._hashed = Hashed(self._file)
        self._out: Any = self._hashed
        if kind == "csv.gz":  # without the time, so that the same data is the same file
            self._out = gzip.GzipFile("", "wb", compresslevel=6, fileobj=self._hashed, mtime=0)
        elif kind == "csv.zst":
            self._out = zstandard.ZstdCompressor(level=3).stream_writer(self._hashed, closefd=False)  # type: ignore[arg-type]
        elif kind == "parquet":
            self._out = pyarrow.parquet.ParquetWriter(self._hashed, PARQUET_SCHEMA, compression="zstd")
        if kind != "parquet":
            self._out.write((",".join(COLUMNS) + "\n").encode())

    @property
    def size(self) -> int:
        """Bytes that have reached the file."""
        return self._hashed.size

    def write_csv(self, text: np.ndarray, rows: int) -> None:
        """Append the text of this many rows."""
        self._out.write(text.data)
        self._out.flush()  # of the compressor, so that `size` is up to date
        self._rows += rows

    def write_parquet(self, examples: Examples) -> None:
        """Append rows as lists of numbers."""
        offsets = pa.array((examples.offsets - examples.offsets[0]).astype(np.int32))
        lists = [
            pa.ListArray.from_arrays(offsets, pa.array(array))
            for array in (examples.ids, examples.labels, examples.segments)
        ]
        self._out.write_table(pa.table([*lists, pa.array(examples.is_next)], schema=PARQUET_SCHEMA))
        self._rows += len(examples)

    def close(self) -> dict[str, Any]:
        """Finish the file; what `dataset.json` records of it."""
        if self._out is not self._hashed:
            self._out.close()
        self._file.close()
        return {"file": self._path.name, "rows": self._rows, "bytes": self._hashed.size, "sha256": self._hashed.sha256}


PARQUET_SCHEMA = pa.schema(
    [pa.field(name, pa.list_(kind)) for name, kind in zip(COLUMNS, (pa.int32(), pa.int32(), pa.int8()), strict=False)]
    + [pa.field(COLUMNS[-1], pa.int8())]
)


class CsvSpelling:
    """Rows of numbers to CSV text, with the spellings of all numbers below `vocab_size` at hand (16 bytes each)."""

    def __init__(self, vocab_size: int) -> None:
        assert 3 <= vocab_size < MOST_TOKENS
        numbers = [str(i).encode() for i in range(vocab_size)]
        pieces = [*(b"," + number for number in numbers), *numbers, b'"[', b']","[', b']",0\n', b']",1\n']
        self._pieces = np.array(pieces, "S8").view(np.uint64)
        self._lone = vocab_size  # the spelling without a comma, of a list's first number, is so much further on
        self._open, self._between, self._close = 2 * vocab_size, 2 * vocab_size + 1, 2 * vocab_size + 2

    def rows(self, examples: Examples) -> np.ndarray:
        """The CSV text (uint8) of these rows: three lists and `is_next` each."""
        lengths = np.diff(examples.offsets)
        starts = examples.offsets[:-1] - examples.offsets[0]
        row_start = 3 * starts + 4 * np.arange(len(lengths))
        spelled = np.empty(3 * len(examples.ids) + 4 * len(lengths), np.int32)
        spelled[row_start] = self._open
        spelled[row_start + lengths + 1] = spelled[row_start + 2 * lengths + 2] = self._between
        spelled[row_start + 3 * lengths + 3] = self._close + examples.is_next.astype(np.int32)
        place = np.arange(len(examples.ids)) + np.repeat(row_start + 1 - starts, lengths)
        step = np.repeat(lengths + 1, lengths)
        for number, array in enumerate((examples.ids, examples.labels, examples.segments)):
            spelled[place + number * step] = array
            spelled[row_start + 1 + number * (lengths + 1)] += self._lone
        text = self._pieces[spelled].view(np.uint8)
        return text[text != 0]
