"""The lease that keeps a second job from writing below the same S3 prefix.

The lease is an object that names its owner. It is created only if it does not exist, and replaced only if it has not
changed (RFC 9110, If-None-Match and If-Match), so of several jobs exactly one gets it. A thread renews it. A lease that
is not renewed for as long as it lasts may be taken over. The new owner watches it for that time, so clocks that
disagree do no harm.

An owner that was suspended for longer than the lease lasts has lost it without knowing. Therefore it asks
`require_held` before every write and delete (fencing). Between that answer and the write lies the time of one request:
S3 offers no condition on another object that would close this gap.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from typing import Any

from babybert.errors import StorageError, UserError
from babybert.s3 import get_if_exists, put_if
from babybert.s3_errors import s3_errors

logger = logging.getLogger(__name__)

LEASE_SECONDS = 45.0


class LeaseLost(UserError):
    """Another job has taken over. Exit code 1: a restart waits for it to end."""


class Lease:
    """The right to write below a prefix, for `seconds` at a time. Use as a context manager.

    Args:
        client: a boto3 client.
        bucket: the bucket.
        key: the object of the lease.
        address: what the lease is for, for messages.
        flag: the setting that names the address, for messages.
        seconds: how long the lease lasts without being renewed.

    Raises UserError when the owner is alive. The exit code is 1, so that a Kubernetes Job tries again: an owner that
    is being evicted will be gone by then.
    """

    def __init__(
        self, client: Any, bucket: str, key: str, address: str, flag: str, seconds: float = LEASE_SECONDS
    ) -> None:
        self._client = client
        self._bucket = bucket
        self._key = key
        self._address = address
        self._flag = flag
        self._seconds = seconds
        self._owner = uuid.uuid4().hex
        self._etag = ""  # of the lease as this process wrote it last
        self._stop = threading.Event()
        self._lost_to: str | None = None

    def __enter__(self) -> "Lease":
        with s3_errors(f"{self._address}: cannot take the lease"):
            self._acquire()
        self._thread = threading.Thread(target=self._renew_until_stopped, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        if self.is_lost:
            return
        try:
            with s3_errors(self._address):
                self._client.delete_object(Bucket=self._bucket, Key=self._key, IfMatch=self._etag)
        except UserError as problem:
            logger.warning(f"the lease could not be released and expires in {self._seconds:.0f} s ({problem})")

    @property
    def is_lost(self) -> bool:
        """Whether another job is known to have taken over."""
        return self._lost_to is not None

    def raise_if_lost(self) -> None:
        """Raise LeaseLost if another job is known to have taken over. Costs nothing."""
        if self._lost_to is not None:
            raise LeaseLost(
                f"{self._lost_to} has taken over {self._address}: this job stops, so that the two do not mix"
            )

    def require_held(self) -> None:
        """Ask the server whether this process still owns the lease.

        Raises LeaseLost if another one does, StorageError if that cannot be known now.
        """
        self.raise_if_lost()
        with s3_errors(self._address):
            _, content = self._read()
        if content.get("owner") == self._owner:
            return
        if not content:
            raise StorageError(f"s3://{self._bucket}/{self._key} is missing; waiting until it is renewed")
        self._lost_to = _describe(content)
        self.raise_if_lost()

    def _acquire(self) -> None:
        """Take the lease: at once if it is free or its owner is known to be dead, else after it has expired."""
        if self._put(IfNoneMatch="*"):
            return
        etag, content = self._read()
        if content.get("owner") == self._owner:  # a retried request: the first one had succeeded
            self._etag = etag
            return
        if not _is_dead_process_of_this_host(content) and not self._wait_until_expired(etag, content):
            return
        if not self._put(IfMatch=etag):
            raise UserError(
                f"{self._address}: another process was faster to take over from {_describe(content)}; "
                f"stop it, or choose another {self._flag}"
            )

    def _wait_until_expired(self, etag: str, content: dict[str, Any]) -> bool:
        """Watch the lease for as long as it lasts. True if nobody renewed it, False if it was released and is ours.

        Raises UserError if its owner renewed it.
        """
        lifetime = float(content.get("seconds") or self._seconds)
        logger.info(
            f"{self._address}: in use by {_describe(content)}; waiting up to {lifetime:.0f} s "
            "to see whether it is alive"
        )
        start = time.monotonic()
        while time.monotonic() - start < lifetime:
            time.sleep(min(1.0, lifetime / 10))
            current_etag, _ = self._read()
            if current_etag == etag:
                continue
            if self._put(IfNoneMatch="*"):  # it was released
                return False
            raise UserError(
                f"{self._address}: {_describe(content)} is writing there; stop it, or choose another {self._flag}"
            )
        return True

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(self._seconds / 3):
            # While the server is away, the lease is neither renewed nor known to be lost. Uploads report the error.
            with contextlib.suppress(UserError), s3_errors(self._address):
                self._renew()
            if self.is_lost:
                return

    def _renew(self) -> None:
        if self._put(IfMatch=self._etag):
            return
        etag, content = self._read()
        if content.get("owner") == self._owner:  # written by a request whose answer was lost
            self._etag = etag
        elif content or not self._put(IfNoneMatch="*"):  # it was not simply deleted
            self._lost_to = _describe(content)

    def _put(self, **condition: str) -> bool:
        """Write the lease if `condition` holds; returns whether it did."""
        content = {
            "owner": self._owner,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "seconds": self._seconds,
            "renewed": time.time(),
        }
        etag = put_if(self._client, self._bucket, self._key, json.dumps(content).encode(), **condition)
        if etag is None:
            return False
        self._etag = etag
        return True

    def _read(self) -> tuple[str, dict[str, Any]]:
        """ETag and content of the lease; ("", {}) if there is none."""
        found = get_if_exists(self._client, self._bucket, self._key)
        if found is None:
            return "", {}
        etag, body = found
        try:
            content = json.loads(body)
        except ValueError:
            content = {}
        return etag, content if isinstance(content, dict) else {}


def _describe(content: dict[str, Any]) -> str:
    """The owner of a lease, for messages."""
    return f"process {content.get('process')} on {content.get('host')}"


def _is_dead_process_of_this_host(content: dict[str, Any]) -> bool:
    """Whether the owner ran on this host and its process is gone: then nobody needs to wait."""
    if content.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(content["process"]), 0)
    except PermissionError:
        return False  # it belongs to another user
    except (OSError, KeyError, TypeError, ValueError):  # no such process, or no valid process id in the lease
        return True
    return False
