"""A dataset below a prefix in S3.

    .partial/<random>                  a shard that a worker has uploaded
    .partial/train-00000.csv.record    its record, which the driver puts when the upload has succeeded
    .lock                              the lease that keeps other writers out; see `s3_lease.py`
    train-00000.csv, ...               the dataset; the server copies the shards to their place at the end
    dataset.json                       deleted before the first copy, and put last

Without a record, an object in `.partial/` means nothing. What is finished stays there if the command fails or is
killed, so that the same command goes on. The next dataset that is complete deletes it.

The driver asks the lease before every change. Workers cannot, so what they upload has random names.
"""

import contextlib
import logging
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from babybert.data.dataset import SPLITS
from babybert.data.dataset_output import DESCRIPTION, PARTIAL, RECORD_SUFFIX, DatasetOutput
from babybert.data.engine import Engine
from babybert.data.shard_upload import ShardUpload, UploadedShard, try_upload
from babybert.errors import DataError, UsageError, UserError, cannot_write, os_reason
from babybert.folders import work_folder
from babybert.progress import Progress
from babybert.s3 import list_keys
from babybert.s3_access import check_access, is_probe
from babybert.s3_errors import s3_errors
from babybert.s3_lease import Lease
from babybert.s3_prefix import S3Prefix, S3Status, in_threads
from babybert.s3_retry import RETRY_SECONDS

logger = logging.getLogger(__name__)

LOCK = ".lock"
# What the names of the objects begin with that are uploaded or copied.
WRITTEN = (f"{PARTIAL}/", *(f"{split}-" for split in SPLITS), "tokenizer.json", "vocabulary.csv")


class OutputPrefix(DatasetOutput):
    """A prefix. If a command fails before the dataset is complete, earlier data stays as it was.

    Raises UsageError for an address that is not `s3://bucket/...`.
    """

    def __init__(self, address: str) -> None:
        self._prefix = S3Prefix(address, RETRY_SECONDS)
        self.address = self._prefix.address
        self.upload: ShardUpload = ShardUpload(self.address, f"{PARTIAL}/", RETRY_SECONDS)
        self._kept: dict[str, UploadedShard] = {}
        self._has_records = False

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Check the access, take the lease, and make a temporary folder; see `DatasetOutput.open`."""
        client, bucket, key = self._prefix.client, self._prefix.bucket, self._prefix.key
        check_access(client, bucket, key(f"{PARTIAL}/"), self.address, copy_to=key(""))
        lease = Lease(client, bucket, key(LOCK), self.address, "--out")
        with lease, work_folder("prepare", self.address) as self.work:
            self._prefix.guard = lease.require_held
            self.files = self.work / "dataset"
            try:
                self.files.mkdir()
                yield
            except OSError as error:
                message = f"{self.work}: cannot write temporary files: {os_reason(error)}; make room or set TMPDIR"
                raise cannot_write(message, error) from error
            finally:
                if self._has_records and not lease.is_lost:
                    logger.info(f"{self.address}/{PARTIAL}: has what is finished; the same command goes on with it")

    def _has_dataset(self) -> bool:
        # Not tried again: before the work, a wrong address is likelier than a server that is away.
        key = self._prefix.key(DESCRIPTION)
        with s3_errors(self.address):
            return any(found == key for found, _ in list_keys(self._prefix.client, self._prefix.bucket, key))

    def check_workers(self, engine: Engine) -> None:
        """Let workers on other machines upload something, and find it; see `DatasetOutput.check_workers`."""
        if engine.workers_see_files:  # they are on this machine, with the same settings
            return
        for result in engine.map(try_upload, [(self.upload,)] * engine.window):
            name, etag = result.summary
            try:
                is_found = self._prefix.status(name).etag == etag
            except DataError:
                is_found = False
            if not is_found:
                raise UsageError(
                    f"{self.address}: workers use another S3 server than this command; set AWS_ENDPOINT_URL for both"
                )
            self._prefix.delete(name)

    def keep(self, name: str, written: Path | UploadedShard) -> list[str]:
        """Upload the shard, if that has not been done; see `DatasetOutput.keep`."""
        if isinstance(written, Path):
            self._prefix.guard()
            path = written
            written = self.upload.put(path)
            path.unlink()
        self._kept[name] = written
        return list(written)

    def is_kept(self, name: str, place: Any, facts: dict[str, Any]) -> bool:
        """Whether the object is there and has the same ETag; see `DatasetOutput.is_kept`."""
        shard = UploadedShard(*place)
        is_kept = self._left.get(shard.name) == S3Status(facts["bytes"], shard.etag)
        if is_kept:
            self._kept[name] = shard
            self._has_records = True
        return is_kept

    @cached_property
    def _left(self) -> dict[str, S3Status]:
        """What earlier commands have left."""
        return self._prefix.list(f"{PARTIAL}/")

    def write_record(self, name: str, content: bytes) -> None:
        """Put it below `.partial/`; see `DatasetOutput.write_record`."""
        self._prefix.put(_record(name), content)
        self._has_records = True

    def records(self) -> Iterator[tuple[str, bytes]]:
        """Get the records; see `DatasetOutput.records`."""
        records = [record for record in self._left if record.endswith(RECORD_SUFFIX)]
        for record, content in zip(records, in_threads(self._prefix.get, records), strict=True):
            yield record.removeprefix(f"{PARTIAL}/").removesuffix(RECORD_SUFFIX), content or b""

    def delete_all_except(self, names: Collection[str]) -> None:
        """Delete the other objects, and abort uploads; see `DatasetOutput.delete_all_except`."""
        kept = {*map(_record, names), *(self._kept[name].name for name in names)}
        self._delete([name for name in self._left if name not in kept and not is_probe(name)])
        try:
            self._prefix.abort_uploads(WRITTEN)
        except UsageError as error:  # an earlier version of the policy may lack this right
            logger.warning(f"interrupted uploads are not aborted: {error}")

    def publish(self, facts: dict[str, Any]) -> None:
        """Copy the shards to their place; see `DatasetOutput.publish`."""
        sizes = {shard["file"]: shard["bytes"] for split in SPLITS for shard in facts["shards"][split]}
        self._prefix.delete(DESCRIPTION)
        old = {name for split in SPLITS for name in self._prefix.list(f"{split}-") if "/" not in name}
        self._delete(old - sizes.keys())
        with Progress("copy shards", sum(sizes.values()), "bytes") as progress:
            for size, _ in zip(sizes.values(), in_threads(self._copy, sizes), strict=True):
                progress.advance(size)
        for name in facts["files"]:
            self._prefix.put_file(name, self.files / name)
        self._prefix.put_new(DESCRIPTION, (self.files / DESCRIPTION).read_bytes())
        self._has_records = False
        try:
            self._delete(self._prefix.list(f"{PARTIAL}/"))
        except UserError as error:
            logger.warning(f"the dataset is complete, but not all of {PARTIAL}/ could be deleted: {error}")

    def _copy(self, name: str) -> None:
        shard = self._kept[name]
        self._prefix.copy(shard.name, name, shard.etag)

    def _delete(self, names: Collection[str]) -> None:
        for _ in in_threads(self._prefix.delete, names):
            pass


def _record(name: str) -> str:
    """The name of a shard's record below the prefix."""
    return f"{PARTIAL}/{name}{RECORD_SUFFIX}"
