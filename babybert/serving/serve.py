"""`babybert serve`: from a checkpoint, a run or an archive to a server that answers until it is told to end.

With `--watch` it follows the run: each newer checkpoint that is whole is registered beside the one that is served, and
loaded before any request goes to it; then it becomes the default, and the old one is taken away when what it was asked
has long been answered. No request fails; for so long both are in memory. What cannot be served (a wrong digest, a full
disk, weights that do not load) is said, and the old version stays.
"""

import contextlib
import signal
import tempfile
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path

from babybert.config import ServeConfig
from babybert.errors import UserError
from babybert.progress import say
from babybert.serving.archive import MODEL_NAME, check_archive, write_archive
from babybert.serving.torchserve import QUIET_SECONDS, Server

RETIRE_SECONDS = 10.0  # from the new default to the end of the old version


def serve(config: ServeConfig) -> int:
    """Serve until Ctrl-C or SIGTERM and return the exit code: 0 after those. Raises UserError if TorchServe ends by itself."""
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stopped.append(number))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="babybert-archive-")))
        archive, source = Path(config.source), None
        if (archive / f"{MODEL_NAME}.mar").is_file():
            archive = archive / f"{MODEL_NAME}.mar"
        if archive.suffix != ".mar":
            from babybert.checkpoint.source import (
                CheckpointSource,  # loads PyTorch, which a server of an archive has no use for
            )

            source = CheckpointSource(config.source)
            archive = write_archive(source.find(folder), folder)
        server = stack.enter_context(Server(config, archive))
        say(
            f"serving {config.source}, version {server.served['version']}: POST {server.predictions_url}, metrics at {server.metrics_url}; Ctrl-C stops it"
        )
        if config.token_auth:
            say(f"each request needs 'Authorization: Bearer KEY'; the keys are in {server.keys}")
        watcher = Watcher(server, source.newer) if source and config.watch else None
        while not stopped:
            if server.process.poll() is not None:
                raise UserError(f"TorchServe ended by itself:\n{server.last_lines()}")
            if watcher:
                watcher.look()
            time.sleep(0.2)
        if stopped[0] == signal.SIGTERM:
            say(
                f"SIGTERM: ending when nobody has asked for {QUIET_SECONDS:.0f} s, in {config.drain_seconds:.0f} s at the latest"
            )
            server.drain(config.drain_seconds, lambda: len(stopped) > 1)
    say("stopped")
    return 0


class Watcher:
    """Looks for a newer checkpoint every `watch_seconds`, and rolls it in. `newer(step, folder)` fetches one, if there is one."""

    def __init__(self, server: Server, newer: Callable[[int, Path], Path | None]) -> None:
        self._server, self._newer = server, newer
        self._tried = server.served["step"]  # a step that would not load is not tried again
        self._next = time.monotonic() + server.config.watch_seconds
        self._retiring: list[tuple[float, str]] = []  # when, and which version
        self._said = ""

    def look(self) -> None:
        """Do what is due; returns within the seconds that a worker needs to load."""
        now = time.monotonic()
        while self._retiring and self._retiring[0][0] <= now:
            self._remove(self._retiring.pop(0)[1])
        if now < self._next:
            return
        self._next = now + self._server.config.watch_seconds
        try:
            with tempfile.TemporaryDirectory(prefix="babybert-watch-") as folder:
                checkpoint = self._newer(self._tried, Path(folder))
                if checkpoint:
                    self._roll(write_archive(checkpoint, Path(folder) / "store"))
            self._said = ""
        except UserError as error:
            if str(error) != self._said:  # once, however often it is tried again
                say(f"warning: {error}; still serving version {self._server.served['version']}")
            self._said = str(error)

    def _roll(self, archive: Path) -> None:
        served, server = check_archive(archive), self._server
        version, before = served["version"], server.served["version"]
        stored = server.put(archive, version)
        self._tried = served["step"]
        try:
            query = (
                f"url={stored.name}&model_name={MODEL_NAME}&initial_workers={server.config.workers}&synchronous=true"
            )
            server.manage("POST", f"/models?{query}", server.config.start_seconds)
            server.manage("PUT", f"/models/{MODEL_NAME}/{version}/set-default")
        except (OSError, ValueError) as error:
            reason = error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else str(error)
            self._remove(version)
            raise UserError(f"version {version} cannot be served: {' '.join(reason.split())[:300]}") from error
        server.served = served
        self._retiring.append((time.monotonic() + RETIRE_SECONDS, before))
        say(f"serving version {version} in place of {before}")

    def _remove(self, version: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # one that was never registered is not there either
            self._server.manage("DELETE", f"/models/{MODEL_NAME}/{version}")
        (self._server.store / f"{MODEL_NAME}-{version}.mar").unlink(missing_ok=True)
