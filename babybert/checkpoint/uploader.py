"""Uploads in the background: one at a time, the newest first, again and again until the server takes it.

Training never waits for it. A checkpoint that is still waiting when a newer one comes is not uploaded any more: the
newer one has all that it had.
"""

import contextlib
import os
import threading
import time
from pathlib import Path

from babybert.checkpoint.storage import S3Store
from babybert.errors import StorageError, UserError
from babybert.progress import say
from babybert.training.metrics import RunMetrics

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between two tries, doubling
BACKGROUND = 15  # of 19, the lowest


class Uploader:
    """A thread that brings checkpoints to a store."""

    def __init__(self, store: S3Store, keep: int, metrics: RunMetrics, curve: Path) -> None:
        self._store, self._keep, self._metrics, self._curve = store, keep, metrics, curve
        self._changed = threading.Condition()
        self._waiting: Path | None = None
        self._current: Path | None = None
        self._problem: str | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)
        self._thread.start()

    @property
    def in_use(self) -> frozenset[Path]:
        """The local checkpoints that it reads or is going to."""
        with self._changed:
            return frozenset(folder for folder in (self._waiting, self._current) if folder)

    def submit(self, folder: Path) -> None:
        """Upload this checkpoint as soon as the one before is through."""
        with self._changed:
            self._waiting = folder
            self._changed.notify_all()

    def finish(self, seconds: float) -> None:
        """Wait for what is under way. Raises StorageError if it is not through in `seconds`; the local copy is whole."""
        deadline = time.monotonic() + seconds
        with self._changed:
            if self._waiting or self._current:
                say(f"waiting for the upload to {self._store.address}")
            while (self._waiting or self._current) and self._thread.is_alive():
                left = deadline - time.monotonic()
                if left <= 0:
                    folder = self._waiting or self._current
                    self._closed = True
                    self._changed.notify_all()
                    raise StorageError(
                        f"{folder} is whole, but could not be uploaded ({self._problem or 'too slow'}); start again to go on from it"
                    )
                self._changed.wait(left)
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        # Threads have priorities of their own on Linux, and boto3's inherit this one: training goes first.
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BACKGROUND)
        pause = FIRST_PAUSE
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                self._current, self._waiting = self._waiting, None
                folder = self._current
            assert folder is not None
            try:
                self._upload(folder)
                self._problem, pause = None, FIRST_PAUSE
            except (UserError, OSError) as error:
                self._metrics.upload_failures.inc()
                self._problem = str(error)
                say(f"warning: {folder.name} is not uploaded yet: {error}; again in {pause:.0f} s")
                with self._changed:
                    self._waiting = self._waiting or folder
                    self._current = None
                    self._changed.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            with self._changed:
                self._current = None
                self._changed.notify_all()

    def _upload(self, folder: Path) -> None:
        start = time.monotonic()
        size = self._store.upload(folder)
        self._metrics.uploaded(size, time.monotonic() - start)
        self._store.put_metrics(self._curve)
        self._store.prune(self._keep)
