"""A source file in S3, which is fetched each time it is opened: a corpus needs no disk for all its objects at once."""

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from babybert.errors import StorageError, os_reason
from babybert.s3 import download_file, shared_client
from babybert.s3_errors import s3_errors
from babybert.s3_retry import retry


@dataclass(frozen=True)
class S3File:
    """An object in S3. It has what readers use of a `Path`; as text it is its address.

    Attributes:
        bucket: the bucket.
        key: the key.
        size: its size in bytes.
        folder: where the temporary copy is made.
    """

    bucket: str
    key: str
    size: int
    folder: Path

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    @property
    def name(self) -> str:
        """What follows the last slash."""
        return PurePosixPath(self.key).name

    @property
    def suffix(self) -> str:
        """The ending of the name, such as `.gz`."""
        return PurePosixPath(self.key).suffix

    @contextlib.contextmanager
    def open(self, mode: str = "rb") -> Iterator[IO[bytes]]:
        """Fetch the object and open the copy, which has no name: it is gone when it is closed, even by a kill.

        Raises DataError if there is no such object, UsageError or StorageError if it cannot be fetched.
        """
        assert mode == "rb"
        with contextlib.ExitStack() as stack:
            try:
                # On another machine than that of the command, there is no such folder.
                file = stack.enter_context(tempfile.TemporaryFile(dir=self.folder if self.folder.exists() else None))
                retry(functools.partial(self._fetch, file))
            except OSError as error:
                problem = f"{self}: cannot be copied to {self.folder}: {os_reason(error)}"
                raise StorageError(f"{problem}; make room there") from error
            yield file

    def _fetch(self, file: IO[bytes]) -> None:
        file.seek(0)
        file.truncate()
        with s3_errors(str(self)):
            download_file(shared_client(), self.bucket, self.key, file)
        file.seek(0)


SourceFile = Path | S3File


def file_size(path: SourceFile) -> int:
    """Return the size of a file in bytes; 0 if there is none."""
    if isinstance(path, S3File):
        return path.size
    try:
        return path.stat().st_size
    except OSError:
        return 0
