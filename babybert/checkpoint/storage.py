"""Checkpoints of a run in S3, each whole or not there, and the lease that keeps a second job out.

Below `s3://bucket/prefix/`:

    step-00001234/<attempt>/...    the files, as they lie in the local folder; each try to upload has its own name
    step-00001234/manifest.json    sizes, SHA-256 and the attempt: put last, in one piece, it makes the checkpoint exist
    metrics.jsonl                  the run's curve so far
    lease.json                     who writes here, put only if nobody else has (RFC 9110, If-None-Match and If-Match)

A crash at any moment leaves older checkpoints whole and at most an attempt without a manifest, which the next sweep
deletes. Deleting goes the other way round: the manifest first.
"""

import json
import re
import shutil
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from babybert.checkpoint.format import MANIFEST, checkpoint_name, checkpoint_problem, steps_to_delete
from babybert.errors import DataError, StorageError
from babybert.s3 import list_keys, make_client, s3_errors, split_address

STEP_MANIFEST = re.compile(r"(?:^|/)step-(\d{8})/manifest\.json$")
STEP_DATA = re.compile(r"(?:^|/)step-(\d{8})/([0-9a-f]{32})/[^/]+$")
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class S3Store:
    """The checkpoints below one prefix."""

    address: str

    def __post_init__(self) -> None:
        split_address(self.address)

    @cached_property
    def client(self) -> Any:
        """A boto3 client, made once; threads may share it."""
        return make_client()

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        return split_address(self.address)[0]

    def key(self, *parts: str) -> str:
        """The key of something below the prefix."""
        return "/".join([part for part in (split_address(self.address)[1].strip("/"),) if part] + list(parts))

    def check(self) -> None:
        """Read, write and delete here once. Raises UsageError, DataError or StorageError, saying which cannot be done."""
        client, probe = self.client, self.key(f".check-{uuid.uuid4().hex}")
        for action, call in (
            ("list", lambda: next(list_keys(client, self.bucket, self.key("step-")), None)),
            ("write", lambda: client.put_object(Bucket=self.bucket, Key=probe, Body=b"")),
            ("read", lambda: client.get_object(Bucket=self.bucket, Key=probe)["Body"].read()),
            ("delete", lambda: client.delete_object(Bucket=self.bucket, Key=probe)),
        ):
            with s3_errors(f"{self.address}: cannot {action} there"):
                call()

    def steps(self) -> list[int]:
        """The steps that have a manifest, newest first."""
        with s3_errors(self.address):
            found = [STEP_MANIFEST.search(key) for key, _ in list_keys(self.client, self.bucket, self.key("step-"))]
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def manifest(self, step: int) -> dict[str, Any]:
        """The manifest of a step. Raises DataError when it is missing or none."""
        key = self.key(checkpoint_name(step), MANIFEST)
        with s3_errors(f"s3://{self.bucket}/{key}"):
            content = self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        try:
            manifest = json.loads(content)
            assert re.fullmatch("[0-9a-f]{32}", manifest["attempt"]) and all(
                "/" not in name for name in manifest["files"]
            )
            return manifest
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise DataError(f"s3://{self.bucket}/{key}: not a manifest ({error!r})") from error

    def upload(self, folder: Path) -> int:
        """Put a local checkpoint there, the manifest last; `prune` sweeps what earlier tries left of it. Returns the bytes."""
        client, attempt, size = self.client, uuid.uuid4().hex, 0
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        with s3_errors(f"{self.address}/{folder.name}"):
            for name in manifest["files"]:
                client.upload_file(str(folder / name), self.bucket, self.key(folder.name, attempt, name))
                size += (folder / name).stat().st_size
            body = json.dumps({**manifest, "attempt": attempt}, indent=2).encode()
            client.put_object(Bucket=self.bucket, Key=self.key(folder.name, MANIFEST), Body=body)
        return size

    def download(self, step: int, run: Path) -> Path:
        """Fetch a step into the run's folder, whole or not at all. Raises DataError when it is not what its manifest says."""
        manifest, target = self.manifest(step), run / checkpoint_name(step)
        partial = run / f".partial-{target.name}"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            for name in manifest["files"]:
                key = self.key(target.name, manifest["attempt"], name)
                with s3_errors(f"s3://{self.bucket}/{key}"):
                    self.client.download_file(self.bucket, key, str(partial / name))
            (partial / MANIFEST).write_text(
                json.dumps({name: value for name, value in manifest.items() if name != "attempt"}, indent=2) + "\n",
                encoding="utf-8",
            )
            problem = checkpoint_problem(partial)
            if problem:
                raise DataError(f"{self.address}/{target.name}: {problem}")
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
        except OSError as error:
            raise StorageError(f"{target}: cannot be written: {error.strerror}; make room and start again") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return target

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` and the best, and tries that came to nothing."""
        client = self.client
        manifests = {}
        for step in self.steps():
            try:
                manifests[step] = self.manifest(step)
            except DataError:
                continue  # none that anybody will read; it is left for a person to look at
        doomed = steps_to_delete({step: manifest.get("held_out_loss") for step, manifest in manifests.items()}, keep)
        with s3_errors(self.address):
            self._delete(client, [self.key(checkpoint_name(step), MANIFEST) for step in doomed])
            kept = {step: manifest["attempt"] for step, manifest in manifests.items() if step not in doomed}
            orphans = []
            for key, _ in list_keys(client, self.bucket, self.key("step-")):
                match = STEP_DATA.search(key)
                if match and kept.get(int(match[1])) != match[2]:
                    orphans.append(key)
            self._delete(client, orphans)
            self._abort_parts()

    def _abort_parts(self) -> None:
        """Large files go up in parts; those of an upload that was killed are invisible, and paid for, until they are aborted."""
        for page in self.client.get_paginator("list_multipart_uploads").paginate(
            Bucket=self.bucket, Prefix=self.key("step-")
        ):
            for upload in page.get("Uploads", []):
                self.client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])

    def put_metrics(self, path: Path) -> None:
        """Keep the run's curve there as well."""
        if path.exists():
            with s3_errors(self.address):
                self.client.upload_file(str(path), self.bucket, self.key(METRICS))

    def get_metrics(self, path: Path) -> None:
        """Bring the curve back to a machine that has none."""
        try:
            with s3_errors(self.address):
                self.client.download_file(self.bucket, self.key(METRICS), str(path))
        except DataError:
            return

    def _delete(self, client: Any, keys: list[str]) -> None:
        for key in keys:
            client.delete_object(Bucket=self.bucket, Key=key)
