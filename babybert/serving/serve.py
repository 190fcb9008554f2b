"""`babybert serve`: serve a checkpoint, a run or an archive with TorchServe until Ctrl-C or SIGTERM.

A run stands for its newest valid checkpoint. With `--watch` the server waits for the first one (see `waiting.py`) and
follows the run (see `watcher.py`).
"""

import contextlib
import logging
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from babybert.config import ServeConfig
from babybert.errors import UserError
from babybert.folders import temporary_folder
from babybert.serving.archive import MODEL_NAME, write_archive
from babybert.serving.torchserve import QUIET_SECONDS, TorchServe
from babybert.serving.waiting import wait_for_checkpoint
from babybert.serving.watcher import CheckpointWatcher

if TYPE_CHECKING:
    from babybert.checkpoint.source import CheckpointSource

POLL_SECONDS = 0.2  # between two looks at signals, the process and the watcher

logger = logging.getLogger(__name__)


def serve(config: ServeConfig) -> int:
    """Serve until Ctrl-C or SIGTERM; returns 0 after those.

    Before the model is served there is nothing to drain, so SIGTERM raises SystemExit(143), and Ctrl-C
    KeyboardInterrupt. Raises UserError, also if TorchServe exits unexpectedly.
    """
    signal.signal(signal.SIGTERM, _end_at_once)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(temporary_folder("archive"))
        archive, source = _open_source(config, folder)
        server = stack.enter_context(TorchServe(config, archive))
        received_signals: list[int] = []
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_number, lambda received, frame: received_signals.append(received))
        _log_addresses(config, server)
        watcher = CheckpointWatcher(server, source.newer) if source and config.watch else None
        while not received_signals:
            if server.process.poll() is not None:
                raise UserError(f"TorchServe ended by itself:\n{server.last_lines()}")
            if watcher:
                watcher.poll()
            time.sleep(POLL_SECONDS)
        if received_signals[0] == signal.SIGTERM:
            logger.info(
                f"SIGTERM: ending after {QUIET_SECONDS:.0f} s without a request, "
                f"at the latest in {config.drain_seconds:.0f} s"
            )
            server.drain(config.drain_seconds, hurry=lambda: len(received_signals) > 1)
    logger.info("stopped")
    return 0


def _end_at_once(signal_number: int, frame: object) -> None:
    logger.info("SIGTERM: ending before a model was served")
    raise SystemExit(128 + signal_number)


def _open_source(config: ServeConfig, folder: Path) -> "tuple[Path, CheckpointSource | None]":
    """The archive to serve, which is written to `folder` for a checkpoint, and the source that `--watch` follows."""
    path = Path(config.source)
    if (path / f"{MODEL_NAME}.mar").is_file():
        replace(config, source=str(path / f"{MODEL_NAME}.mar"), watch=False)  # raises UsageError for --int8
        return path / f"{MODEL_NAME}.mar", None
    if path.suffix == ".mar":
        return path, None
    # Here, because it imports PyTorch, which serving an archive does not need.
    from babybert.checkpoint.source import CheckpointSource
    from babybert.export.onnx_graphs import check_onnx

    if config.int8:
        check_onnx("--int8")
    source = CheckpointSource(config.source)
    checkpoint = wait_for_checkpoint(source, folder, config) if config.watch else source.find(folder)
    return write_archive(checkpoint, folder, config.int8), source


def _log_addresses(config: ServeConfig, server: TorchServe) -> None:
    logger.info(
        f"serving {config.source}, version {server.served['version']}: POST {server.predictions_url}, "
        f"metrics at {server.metrics_url}; Ctrl-C stops it"
    )
    if config.token_auth:
        logger.info(f"each request needs 'Authorization: Bearer KEY'; the keys are in {server.key_file}")
