"""The lease that keeps a second job out of a run in S3."""

import json
import os
import socket
import threading
import time
import uuid
from typing import Any

from babybert.checkpoint.storage import S3Store
from babybert.errors import UserError
from babybert.progress import say
from babybert.s3 import s3_errors


class Lease:
    """The right to write below a prefix, for `seconds` at a time, renewed by a thread. Use as a context manager.

    One that has not been renewed for as long as it lasts belongs to nobody: it is watched for that time, so that
    clocks that disagree do no harm. Raises UserError when its owner is alive: exit 1, for an owner that is being
    evicted will be gone at the next try.
    """

    def __init__(self, store: S3Store, seconds: float = 45.0) -> None:
        self._store, self._seconds = store, seconds
        self._owner = {
            "owner": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "seconds": seconds,
        }
        self._etag = ""
        self._end = threading.Event()
        self.lost: str | None = None  # why, once another has it

    def __enter__(self) -> "Lease":
        with s3_errors(f"{self._store.address}: cannot take the lease"):
            self._take()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()
        if self.lost is None:
            try:
                with s3_errors(self._store.address):
                    self._store.client.delete_object(
                        Bucket=self._store.bucket, Key=self._store.key("lease.json"), IfMatch=self._etag
                    )
            except UserError as error:
                say(
                    f"warning: the lease could not be given back, and ends by itself in {self._seconds:.0f} s ({error})"
                )

    def _take(self) -> None:
        if self._put(IfNoneMatch="*"):
            return
        watched, holder = self._read()
        since = time.monotonic()
        if holder.get("owner") == self._owner["owner"]:  # a retry of our own put found the first one there
            self._etag = watched
            return
        whose = f"process {holder.get('process')} on {holder.get('host')}"
        dead = holder.get("host") == self._owner["host"] and not _is_alive(holder.get("process"))
        lasts = float(holder.get("seconds") or self._seconds)
        if not dead:
            say(f"{self._store.address}: in use by {whose}; waiting up to {lasts:.0f} s to see whether it is alive")
        while not dead and time.monotonic() - since < lasts:
            time.sleep(min(1.0, lasts / 10))
            now, _ = self._read()
            if now != watched:
                if self._put(IfNoneMatch="*"):  # it was given back
                    return
                raise UserError(f"{self._store.address}: {whose} is training there; stop it, or choose another --store")
        if not self._put(IfMatch=watched):
            raise UserError(
                f"{self._store.address}: another process was faster to take over from {whose}; stop it, or choose another --store"
            )

    def _put(self, **condition: str) -> bool:
        from botocore.exceptions import ClientError

        try:
            answer = self._store.client.put_object(
                Bucket=self._store.bucket, Key=self._store.key("lease.json"), Body=self._body(), **condition
            )
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in (
                "PreconditionFailed",
                "ConditionalRequestConflict",
                "412",
                "409",
                "404",
                "NoSuchKey",
            ):
                return False
            raise
        self._etag = answer["ETag"]
        return True

    def _body(self) -> bytes:
        return json.dumps({**self._owner, "renewed": time.time()}).encode()

    def _read(self) -> tuple[str, dict[str, Any]]:
        """ETag and content of the lease; empty if there is none."""
        from botocore.exceptions import ClientError

        try:
            answer = self._store.client.get_object(Bucket=self._store.bucket, Key=self._store.key("lease.json"))
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in ("NoSuchKey", "404"):
                return "", {}
            raise
        try:
            content = json.loads(answer["Body"].read())
        except ValueError:
            content = {}
        return answer["ETag"], content if isinstance(content, dict) else {}

    def _renew(self) -> None:
        while not self._end.wait(self._seconds / 3):
            try:
                with s3_errors(self._store.address):
                    if self._put(IfMatch=self._etag):
                        continue
                    etag, holder = self._read()
                    if holder.get("owner") == self._owner["owner"]:  # ours, put by a try whose answer was lost
                        self._etag = etag
                        continue
                    if not holder and self._put(IfNoneMatch="*"):
                        continue
                self.lost = (
                    f"process {holder.get('process')} on {holder.get('host')} has taken over {self._store.address}"
                )
                return
            except UserError:
                continue  # the server is away; uploads say so


def _is_alive(process: Any) -> bool:
    try:
        os.kill(int(process), 0)
    except (OSError, TypeError, ValueError) as error:
        return isinstance(error, PermissionError)
    return True
