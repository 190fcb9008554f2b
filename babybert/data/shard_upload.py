"""How a worker uploads the shard that it has made, with the S3 settings of its own environment.

The object has a name that no other upload has. So a worker that was thought to be dead cannot change a shard that is
finished. The driver gives the object its final name at the end.
"""

import socket
import tempfile
import uuid
from pathlib import Path
from typing import NamedTuple

from babybert.data.engine import Arrays
from babybert.errors import UserError
from babybert.s3_prefix import S3Prefix


class UploadedShard(NamedTuple):
    """An object that a worker has uploaded.

    Attributes:
        name: its name below the prefix.
        etag: its ETag, which another content would not have.
    """

    name: str
    etag: str


class ShardUpload(NamedTuple):
    """Where shards are uploaded to. It is sent to the workers.

    Attributes:
        address: the prefix.
        folder: what the names begin with.
        retry_seconds: how long a failed upload is tried again.
    """

    address: str
    folder: str
    retry_seconds: float

    def put(self, path: Path) -> UploadedShard:
        """Upload a file under a new name. Raises StorageError if S3 stays away, UsageError if it refuses."""
        name = f"{self.folder}{uuid.uuid4().hex}"
        try:
            status = S3Prefix(self.address, self.retry_seconds).put_file(name, path)
        except UserError as error:
            raise type(error)(f"upload from {socket.gethostname()}: {error}") from error
        return UploadedShard(name, status.etag)


def try_upload(upload: ShardUpload) -> tuple[UploadedShard, list[Arrays]]:
    """Upload a small file, to see whether this worker can. A job; see `Engine.map`."""
    with tempfile.NamedTemporaryFile(prefix="babybert-upload-") as file:
        file.write(b"probe")
        file.flush()
        return upload.put(Path(file.name)), []
