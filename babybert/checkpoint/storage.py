"""The checkpoints of a run in S3.

Below `s3://bucket/prefix/`:

    step-00001234/<attempt>/...    the files of a local checkpoint; each upload has a new attempt id
    step-00001234/manifest.json    the manifest with the attempt id; put last, it makes the checkpoint exist
    metrics.jsonl                  the run's curve so far
    lease.json                     who may write here; see `s3_lease.py`

A crash at any moment leaves the older checkpoints valid and at most an attempt without a manifest, which the next
`prune` deletes. Deleting goes the other way round: the manifest first. Where S3 refuses to delete a manifest, the files
of its checkpoint stay, too.

Every write and delete calls `guard` first, which the lease sets: a job that has lost its lease changes nothing. The
guard costs one small request.
"""

import contextlib
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from babybert.checkpoint.format import (
    MANIFEST,
    STEP_FOLDER,
    Manifest,
    checkpoint_name,
    checkpoint_problem,
    read_manifest,
)
from babybert.checkpoint.retention import steps_to_delete
from babybert.errors import DataError, StorageError, UsageError, os_reason
from babybert.s3 import list_keys, list_uploads, make_client, split_address, upload_file
from babybert.s3_access import check_access
from babybert.s3_errors import s3_errors
from babybert.s3_lease import LEASE_SECONDS, Lease
from babybert.s3_upload_process import UploadProcess

MANIFEST_KEY = re.compile(r"(?:^|/)step-([0-9]{8})/manifest\.json\Z")
DATA_KEY = re.compile(r"(?:^|/)step-([0-9]{8})/([0-9a-f]{32})/[^/]+\Z")
METRICS = "metrics.jsonl"
LEASE = "lease.json"


def split_step(address: str) -> tuple[str, int | None]:
    """`s3://bucket/prefix/step-00001234` as the run's address and the step; (address, None) for a run's address."""
    prefix, _, last = address.rstrip("/").rpartition("/")
    match = STEP_FOLDER.match(last)
    return (prefix, int(match[1])) if match else (address, None)


class S3Store:
    """The checkpoints below one prefix. Raises UsageError for an address that is not `s3://bucket/...`.

    Every method raises DataError, UsageError or StorageError for errors of S3 (see `s3_errors.py`).
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.bucket, prefix = split_address(address)
        self._prefix = prefix.strip("/")
        self.guard: Callable[[], None] = lambda: None  # raises if this process may no longer write

    @cached_property
    def client(self) -> Any:
        """A boto3 client, made once. Threads may share it."""
        return make_client()

    def key(self, *parts: str) -> str:
        """The key of something below the prefix."""
        return "/".join((self._prefix, *parts)) if self._prefix else "/".join(parts)

    def check_access(self) -> None:
        """Try everything that a run does here. Says what cannot be done, and which right it needs."""
        check_access(self.client, self.bucket, self.key("step-"), self.address)

    @contextlib.contextmanager
    def lease(self, seconds: float = LEASE_SECONDS) -> Iterator[Lease]:
        """Take the lease of the store, which from then on guards every change; see `Lease`."""
        with Lease(self.client, self.bucket, self.key(LEASE), self.address, "--store", seconds) as lease:
            self.guard = lease.require_held
            yield lease

    def steps(self) -> list[int]:
        """The steps that have a manifest, newest first."""
        with s3_errors(self.address):
            matches = [MANIFEST_KEY.search(key) for key, _ in list_keys(self.client, self.bucket, self.key("step-"))]
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def manifest(self, step: int) -> Manifest:
        """The manifest of a step. Raises DataError when it is missing or corrupt."""
        key = self.key(checkpoint_name(step), MANIFEST)
        with s3_errors(f"s3://{self.bucket}/{key}"):
            content = self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        try:
            manifest = Manifest.from_json(content)
            if not re.fullmatch("[0-9a-f]{32}", manifest.attempt or "") or any("/" in name for name in manifest.files):
                raise ValueError("its attempt id or its file names are invalid")
        except ValueError as error:
            raise DataError(f"s3://{self.bucket}/{key}: not a valid manifest ({error})") from error
        return manifest

    def upload(self, folder: Path) -> int:
        """Upload a local checkpoint, the manifest last. Returns its size in bytes.

        Another process sends the files. What earlier attempts left of the same step stays until `prune`.
        """
        manifest = read_manifest(folder)
        attempt = uuid.uuid4().hex
        with UploadProcess() as process:
            for name in manifest.files:
                self.guard()
                process.upload(folder / name, self.bucket, self.key(folder.name, attempt, name))
        body = Manifest(manifest.step, manifest.held_out_loss, manifest.files, attempt, manifest.format).to_json()
        self.guard()
        with s3_errors(f"{self.address}/{folder.name}"):
            self.client.put_object(Bucket=self.bucket, Key=self.key(folder.name, MANIFEST), Body=body.encode())
        return sum(entry.bytes for entry in manifest.files.values())

    def download(self, step: int, run: Path) -> Path:
        """Download a step into the run's folder, completely or not at all.

        Raises DataError when it does not match its manifest, StorageError when the disk cannot take it.
        """
        manifest = self.manifest(step)
        assert manifest.attempt is not None  # `manifest` has checked it
        target = run / checkpoint_name(step)
        partial = run / f".partial-{target.name}"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            for name in manifest.files:
                key = self.key(target.name, manifest.attempt, name)
                with s3_errors(f"s3://{self.bucket}/{key}"):
                    self.client.download_file(self.bucket, key, str(partial / name))
            local = Manifest(manifest.step, manifest.held_out_loss, manifest.files, None, manifest.format)
            (partial / MANIFEST).write_text(local.to_json(), encoding="utf-8")
            problem = checkpoint_problem(partial)
            if problem:
                raise DataError(f"{self.address}/{target.name}: {problem}")
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
        except OSError as error:
            raise StorageError(
                f"{target}: cannot be written: {os_reason(error)}; free some space and start again"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return target

    def prune(self, keep: int) -> None:
        """Delete all checkpoints except the newest `keep` and the best, and what failed attempts left behind.

        What S3 refuses to delete stays, and everything else is deleted. Then UsageError is raised.
        """
        manifests: dict[int, Manifest] = {}
        for step in self.steps():
            try:
                manifests[step] = self.manifest(step)
            except DataError:
                continue  # readers skip this step: its files are deleted below, its manifest stays for a person to see
        losses = {step: manifest.held_out_loss for step, manifest in manifests.items()}
        old_steps = steps_to_delete(losses, keep)
        refusals = self.delete_objects(self.key(checkpoint_name(step), MANIFEST) for step in old_steps)
        # Then every file whose attempt is named by no manifest that still exists.
        with s3_errors(self.address):
            keys = [key for key, _ in list_keys(self.client, self.bucket, self.key("step-"))]
        steps = {int(match[1]) for match in map(MANIFEST_KEY.search, keys) if match}
        attempts = {step: manifest.attempt for step, manifest in manifests.items() if step in steps}
        data_keys = [match for match in map(DATA_KEY.search, keys) if match]
        refusals += self.delete_objects(match.string for match in data_keys if attempts.get(int(match[1])) != match[2])
        if refusals:
            raise UsageError(f"{len(refusals)} objects stay, the first: {refusals[0]}") from refusals[0]

    def delete_objects(self, keys: Iterable[str]) -> list[UsageError]:
        """Delete these objects, one after the other: some S3 servers lack the call that deletes several.

        Returns the refusals of S3. Other errors are raised.
        """
        refusals = []
        for key in keys:
            self.guard()
            try:
                with s3_errors(f"s3://{self.bucket}/{key}"):
                    self.client.delete_object(Bucket=self.bucket, Key=key)
            except UsageError as error:
                refusals.append(error)
        return refusals

    def abort_uploads(self) -> None:
        """Abort uploads that were killed: their parts are invisible, and S3 charges for them until they are aborted."""
        with s3_errors(self.address):
            for key, upload in list_uploads(self.client, self.bucket, self.key("step-")):
                if DATA_KEY.search(key):  # else it is the probe of a job that checks its access
                    self.guard()
                    self.client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload)

    def upload_metrics(self, path: Path) -> None:
        """Upload the run's `metrics.jsonl`, if there is one."""
        if path.exists():
            self.guard()
            with s3_errors(f"s3://{self.bucket}/{self.key(METRICS)}"):
                upload_file(self.client, path, self.bucket, self.key(METRICS))

    def download_metrics(self, path: Path) -> None:
        """Download the run's `metrics.jsonl` to `path`, if the store has one."""
        try:
            with s3_errors(self.address):
                self.client.download_file(self.bucket, self.key(METRICS), str(path))
        except DataError:
            return  # the store has none
