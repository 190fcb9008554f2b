"""Where `prepare` writes a dataset, whether that is a folder or a prefix in S3.

Shards are kept apart until the dataset is complete, with a record each, so that the same command can go on after the
driver was killed. `publish` then replaces earlier data, and puts `dataset.json` last: without it, there is no dataset.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from babybert.data.engine import Engine
from babybert.data.shard_upload import ShardUpload, UploadedShard
from babybert.errors import UsageError

PARTIAL = ".partial"  # below it is what is finished
DESCRIPTION = "dataset.json"
RECORD_SUFFIX = ".record"


class DatasetOutput(ABC):
    """Where a dataset is written. The attributes and all methods but `require_replaceable` are for use inside `open`.

    Attributes:
        address: the folder or prefix, for messages.
        work: a folder of this machine for temporary files, empty at first.
        files: the folder of this machine in which the files of the dataset are written.
        upload: how a worker uploads the shard that it has made; None if the file in `files` is all that is needed.
    """

    address: str
    work: Path
    files: Path
    upload: ShardUpload | None = None

    @abstractmethod
    def open(self) -> AbstractContextManager[None]:
        """Keep other writers out, and delete what is temporary at the end.

        Raises UserError if another process writes there, UsageError or StorageError if it cannot be written.
        """

    def require_replaceable(self, overwrite: bool) -> None:
        """Raise UsageError if there is a dataset that must not be replaced."""
        if not overwrite and self._has_dataset():
            raise UsageError(
                f"{self.address}: has prepared data already; add --overwrite to replace it, or choose another --out"
            )

    @abstractmethod
    def _has_dataset(self) -> bool:
        """Whether there is a dataset."""

    @abstractmethod
    def check_workers(self, engine: Engine) -> None:
        """Check that the workers of an engine can write what they have to. Raises UsageError or StorageError."""

    @abstractmethod
    def keep(self, name: str, written: Path | UploadedShard) -> Any:
        """Keep a shard that was written or uploaded until `publish`. Returns where it is, for its record (JSON)."""

    @abstractmethod
    def is_kept(self, name: str, place: Any, facts: dict[str, Any]) -> bool:
        """Whether an earlier command has kept this shard, and it is intact.

        Args:
            name: the name of the shard.
            place: what `keep` returned.
            facts: what `dataset.json` records about the shard.
        """

    @abstractmethod
    def write_record(self, name: str, content: bytes) -> None:
        """Write the record of a shard."""

    @abstractmethod
    def records(self) -> Iterator[tuple[str, bytes]]:
        """Yield name and content of each record."""

    @abstractmethod
    def delete_all_except(self, names: Collection[str]) -> None:
        """Delete everything that earlier commands have kept, except these shards and their records."""

    @abstractmethod
    def publish(self, facts: dict[str, Any]) -> None:
        """Replace the earlier dataset by the one that `facts`, the content of `dataset.json`, describes."""
