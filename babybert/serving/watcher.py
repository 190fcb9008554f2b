"""Follow a run while its model is served: roll in each newer checkpoint without a failed request.

A newer checkpoint is registered with TorchServe as another version of the model and loaded before any request goes to
it. Then it becomes the default version. The old version is removed RETIRE_SECONDS later, when all its requests are
answered. Until then both are in memory. A checkpoint that cannot be served (a wrong digest, a full disk, weights that
do not load) is logged, and the old version stays.
"""

import contextlib
import logging
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path

from babybert.errors import UserError
from babybert.folders import temporary_folder
from babybert.serving.archive import MODEL_NAME, check_archive, write_archive
from babybert.serving.torchserve import TorchServe

RETIRE_SECONDS = 10.0  # from the new default version to the removal of the old one
MAX_REASON_CHARACTERS = 300  # of TorchServe's explanation, which can be a traceback

logger = logging.getLogger(__name__)


class CheckpointWatcher:
    """Looks for a newer checkpoint every `watch_seconds`. Call `poll` often.

    Args:
        server: the running TorchServe.
        find_newer: called with a step and a folder to download to; returns a checkpoint above that step, or None
            (`CheckpointSource.newer`).
    """

    def __init__(self, server: TorchServe, find_newer: Callable[[int, Path], Path | None]) -> None:
        self._server = server
        self._find_newer = find_newer
        self._last_tried_step = server.served["step"]  # a checkpoint that does not load is not tried again
        self._next_look = time.monotonic() + server.config.watch_seconds
        self._retiring: list[tuple[float, str]] = []  # (when to remove, version), in order of time
        self._last_warning = ""

    def poll(self) -> None:
        """Remove retired versions and look for a newer checkpoint, if it is time; blocks while a worker loads."""
        now = time.monotonic()
        while self._retiring and self._retiring[0][0] <= now:
            _, version = self._retiring.pop(0)
            self._remove(version)
        if now < self._next_look:
            return
        self._next_look = now + self._server.config.watch_seconds
        try:
            self._serve_newer_checkpoint()
            self._last_warning = ""
        except UserError as error:
            if str(error) != self._last_warning:  # log a problem once, however often it is tried again
                logger.warning(f"{error}; still serving version {self._server.served['version']}")
            self._last_warning = str(error)

    def _serve_newer_checkpoint(self) -> None:
        with temporary_folder("watch") as folder:
            checkpoint = self._find_newer(self._last_tried_step, folder)
            if checkpoint:
                self._roll_in(write_archive(checkpoint, folder / "store", self._server.config.int8))

    def _roll_in(self, archive: Path) -> None:
        """Make an archive the default version, and schedule the removal of the former one. Raises UserError."""
        server = self._server
        served = check_archive(archive)
        version = served["version"]
        former_version = server.served["version"]
        stored = server.add_to_store(archive, version)
        self._last_tried_step = served["step"]
        try:
            self._register(stored.name, version)
        except (OSError, ValueError) as error:
            reason = error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else str(error)
            self._remove(version)
            reason = " ".join(reason.split())[:MAX_REASON_CHARACTERS]
            raise UserError(f"version {version} cannot be served: {reason}") from error
        server.served = served
        self._retiring.append((time.monotonic() + RETIRE_SECONDS, former_version))
        logger.info(f"serving version {version} in place of {former_version}")

    def _register(self, archive_name: str, version: str) -> None:
        """Load a version, wait for its workers, then send all new requests to it. Raises OSError, ValueError."""
        workers = self._server.config.workers
        query = f"url={archive_name}&model_name={MODEL_NAME}&initial_workers={workers}&synchronous=true"
        self._server.manage("POST", f"/models?{query}", timeout=self._server.config.start_seconds)
        self._server.manage("PUT", f"/models/{MODEL_NAME}/{version}/set-default")

    def _remove(self, version: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a version that was never registered is not there
            self._server.manage("DELETE", f"/models/{MODEL_NAME}/{version}")
        (self._server.store / f"{MODEL_NAME}-{version}.mar").unlink(missing_ok=True)
