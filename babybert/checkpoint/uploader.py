"""Uploads checkpoints in the background, one at a time, and retries until the server accepts them.

Training never waits for an upload, and a process of its own sends the files (`s3_upload_process.py`). If a newer
checkpoint arrives while an older one is waiting, the older one is not uploaded any more: the newer one replaces it. The
uploader stops for good when the lease of the store is lost.

A checkpoint is uploaded when its manifest is. Then follow the run's metrics and deleting what is old. If that fails, a
warning is logged, and the upload has succeeded nevertheless.
"""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from babybert.checkpoint.checkpoint_metrics import CheckpointMetrics
from babybert.checkpoint.storage import S3Store
from babybert.errors import StorageError, UserError
from babybert.s3_lease import LeaseLost

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between two attempts, doubled each time


class Uploader:
    """A thread that uploads checkpoints to a store, keeps the newest `keep` there, and uploads the metrics file too."""

    def __init__(self, store: S3Store, keep: int, metrics: CheckpointMetrics, metrics_file: Path) -> None:
        self._store = store
        self._keep = keep
        self._metrics = metrics
        self._metrics_file = metrics_file
        self._warned: set[str] = set()  # what has failed since it last succeeded; only the thread uses it
        self._changed = threading.Condition()  # guards the six fields below
        self._waiting: Path | None = None
        self._current: Path | None = None
        self._has_arrived = False  # whether `_current` is uploaded, and only what follows is left
        self._last_error: UserError | OSError | None = None
        self._lease_lost: LeaseLost | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)
        self._thread.start()

    @property
    def in_use(self) -> frozenset[Path]:
        """The local checkpoints that are being uploaded or wait for it."""
        with self._changed:
            return frozenset(folder for folder in (self._waiting, self._current) if folder)

    def submit(self, folder: Path) -> None:
        """Upload this checkpoint as soon as the current upload has ended."""
        with self._changed:
            self._waiting = folder
            self._changed.notify_all()

    def finish(self, seconds: float) -> None:
        """Wait until everything submitted is uploaded, and stop.

        Raises StorageError if an upload takes longer than `seconds` (the local copy is valid), LeaseLost if the lease
        is lost. The exit code is 1 whatever the reason is, because new credentials may come with the next process. If
        they do not, its check of the access ends it with 2.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            if self._waiting or self._current:
                logger.info(f"waiting for the upload to {self._store.address}")
            while (self._waiting or self._current) and self._thread.is_alive():
                seconds_left = deadline - time.monotonic()
                if seconds_left <= 0:
                    break
                self._changed.wait(seconds_left)
            unfinished = self._waiting or (None if self._has_arrived else self._current)
            self._closed = True
            self._changed.notify_all()
            if self._lease_lost:
                raise self._lease_lost
            if unfinished:
                reason = self._last_error or "too slow"
                raise StorageError(
                    f"{unfinished} is valid but could not be uploaded ({reason}); start again to continue from it"
                )

    def _run(self) -> None:
        pause = FIRST_PAUSE
        while (folder := self._next()) is not None:
            try:
                self._upload(folder)
            except LeaseLost as error:
                logger.warning(str(error))
                with self._changed:
                    self._lease_lost = error
                    self._changed.notify_all()
                return
            except (UserError, OSError) as error:
                self._metrics.upload_failures.inc()
                logger.warning(f"{folder.name} is not uploaded yet: {error}; retrying in {pause:.0f} s")
                with self._changed:
                    self._last_error = error
                    self._waiting = self._waiting or folder
                    self._current = None
                    self._changed.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                pause = FIRST_PAUSE
                with self._changed:
                    self._last_error = None
                    self._current = None
                    self._changed.notify_all()

    def _next(self) -> Path | None:
        """Wait for the next checkpoint to upload; None when the uploader is closed."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            self._current, self._waiting = self._waiting, None
            self._has_arrived = False
            return self._current

    def _upload(self, folder: Path) -> None:
        start = time.monotonic()
        size = self._store.upload(folder)
        self._metrics.record_upload(size, time.monotonic() - start)
        with self._changed:
            self._has_arrived = True
        self._try("the metrics are not uploaded", self._upload_metrics)
        self._try("old checkpoints are not deleted", lambda: self._store.prune(self._keep))
        self._try("interrupted uploads are not aborted", self._store.abort_uploads)

    def _upload_metrics(self) -> None:
        """Upload the run's metrics. Retries what may be temporary, until a newer checkpoint waits."""
        pause = FIRST_PAUSE
        while True:
            try:
                self._store.upload_metrics(self._metrics_file)
                return
            except (StorageError, OSError) as error:
                logger.warning(f"the metrics are not uploaded yet: {error}; retrying in {pause:.0f} s")
            with self._changed:
                if self._changed.wait_for(lambda: self._waiting or self._closed, pause):
                    return
            pause = min(2 * pause, LONGEST_PAUSE)

    def _try(self, problem: str, action: Callable[[], None]) -> None:
        """Call `action`. If it fails, log `problem` and the reason, once until it succeeds. Raises LeaseLost."""
        try:
            action()
        except LeaseLost:
            raise
        except (UserError, OSError) as error:
            if problem not in self._warned:
                logger.warning(f"{self._store.address}: {problem} ({error}); this is tried again after each upload")
            self._warned.add(problem)
        else:
            self._warned.discard(problem)
