"""The objects below a prefix in S3, for work that takes hours: requests are tried again while S3 is away.

Each change asks `guard` first, which is usually that of a lease. The guard costs one small request.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from babybert.errors import UserError
from babybert.s3 import (
    copy_object,
    download_file,
    get_if_exists,
    list_objects,
    list_uploads,
    object_status,
    put_if,
    shared_client,
    split_address,
    upload_file,
)
from babybert.s3_access import is_probe
from babybert.s3_errors import s3_errors
from babybert.s3_retry import retry

T = TypeVar("T")
Item = TypeVar("Item")
THREADS = 8  # that send requests at a time; boto3 keeps ten connections open


class S3Status(NamedTuple):
    """What tells whether an object is the expected one.

    Attributes:
        size: in bytes.
        etag: its ETag, which another content would not have.
    """

    size: int
    etag: str


class S3Prefix:
    """The objects below a prefix. Names are what follows the prefix in their keys. Threads may share it.

    Args:
        address: the prefix. Raises UsageError if it is not `s3://bucket/...`.
        retry_seconds: how long a request is tried again while S3 is away.

    Every method raises DataError, UsageError or StorageError for errors of S3 (see `s3_errors.py`).
    """

    def __init__(self, address: str, retry_seconds: float) -> None:
        self.address = address.rstrip("/")
        self.bucket, prefix = split_address(address)
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._retry_seconds = retry_seconds
        self.guard: Callable[[], None] = lambda: None  # raises if this process may no longer write

    @cached_property
    def client(self) -> Any:
        """A boto3 client."""
        return shared_client()

    def key(self, name: str) -> str:
        """The key of an object."""
        return self._prefix + name

    def list(self, start: str = "") -> dict[str, S3Status]:
        """The objects whose names begin with `start`, by name."""

        def send() -> dict[str, S3Status]:
            objects = list_objects(self.client, self.bucket, self.key(start))
            return {key.removeprefix(self._prefix): S3Status(size, etag) for key, size, etag in objects}

        return self._send(start, send)

    def status(self, name: str) -> S3Status:
        """Size and ETag of an object. Raises DataError if there is none."""
        return self._send(name, lambda: S3Status(*object_status(self.client, self.bucket, self.key(name))))

    def get(self, name: str) -> bytes | None:
        """The content of an object; None if there is none."""
        found = self._send(name, lambda: get_if_exists(self.client, self.bucket, self.key(name)))
        return found and found[1]

    def get_file(self, name: str, file: IO[bytes]) -> None:
        """Download an object into an open file. Raises DataError if there is none, OSError if it cannot be written."""

        def send() -> None:
            file.seek(0)
            file.truncate()
            download_file(self.client, self.bucket, self.key(name), file)

        self._send(name, send)

    def put(self, name: str, content: bytes) -> None:
        """Write an object."""
        self._change(name, lambda: self.client.put_object(Bucket=self.bucket, Key=self.key(name), Body=content))

    def put_new(self, name: str, content: bytes) -> None:
        """Write an object that does not exist. Raises UserError if another process has written it meanwhile."""
        etag = self._change(name, lambda: put_if(self.client, self.bucket, self.key(name), content, IfNoneMatch="*"))
        if etag is None and self.get(name) != content:  # else the answer to an earlier attempt was lost
            raise UserError(f"{self.address}/{name}: another process has written it; stop one of the two")

    def put_file(self, name: str, path: Path) -> S3Status:
        """Upload a file. Raises OSError if it cannot be read."""

        def send() -> S3Status:
            upload_file(self.client, path, self.bucket, self.key(name))
            return S3Status(*object_status(self.client, self.bucket, self.key(name)))

        return self._change(name, send)

    def copy(self, source: str, target: str, etag: str) -> None:
        """Let the server copy an object, if it has this ETag."""
        self._change(target, lambda: copy_object(self.client, self.bucket, self.key(source), self.key(target), etag))

    def delete(self, name: str) -> None:
        """Delete an object, if it exists."""
        self._change(name, lambda: self.client.delete_object(Bucket=self.bucket, Key=self.key(name)))

    def abort_uploads(self, starts: tuple[str, ...]) -> None:
        """Abort uploads that were killed: their parts are invisible, and S3 charges for them until they are aborted.

        Only names that begin with one of `starts` are meant, and not the probes of a job that checks its access.
        """

        def send() -> None:
            for key, upload in list_uploads(self.client, self.bucket, self.key("")):
                name = key.removeprefix(self._prefix)
                if name.startswith(starts) and not is_probe(name):
                    self.client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload)

        self._change("", send)

    def _send(self, name: str, request: Callable[[], T]) -> T:
        def send() -> T:
            with s3_errors(f"{self.address}/{name}"):
                return request()

        return retry(send, self._retry_seconds)

    def _change(self, name: str, request: Callable[[], T]) -> T:
        def send() -> T:
            self.guard()
            with s3_errors(f"{self.address}/{name}"):
                return request()

        return retry(send, self._retry_seconds)


def in_threads(function: Callable[[Item], T], items: Iterable[Item]) -> Iterator[T]:
    """Call a function that sends requests for each item. Yields the results in order; the first error is raised."""
    iterator = iter(items)
    with ThreadPoolExecutor(THREADS) as pool:
        while chunk := list(itertools.islice(iterator, 8 * THREADS)):  # so that few results wait in memory
            yield from pool.map(function, chunk)
