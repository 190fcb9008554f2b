"""Wait for the first checkpoint of a run, which `babybert serve --watch` does instead of ending with an error.

Meanwhile the process is alive but not ready, and says so where TorchServe will listen: on the inference port, `/ping`
is answered with 200, as TorchServe answers it before a worker is ready, and everything else with 503. The management
port is closed, so probes of readiness fail.
"""

import contextlib
import http.server
import json
import logging
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from babybert.config import ServeConfig
from babybert.errors import NoCheckpoint, StorageError
from babybert.serving.request_schema import MAX_BODY_BYTES
from babybert.serving.torchserve_settings import cannot_listen, resolve_host

if TYPE_CHECKING:
    from babybert.checkpoint.source import CheckpointSource  # imports PyTorch

LOG_SECONDS = 60.0  # between two lines in the log
CLIENT_SECONDS = 5.0  # for a client to send its request
PING = (200, {"status": "waiting for the first checkpoint"})
NO_MODEL = (503, {"error": "there is no model yet: the server waits for the first checkpoint; try again later"})

logger = logging.getLogger(__name__)


def wait_for_checkpoint(source: "CheckpointSource", folder: Path, config: ServeConfig) -> Path:
    """The newest valid checkpoint of a run, as soon as there is one. One from S3 is downloaded into `folder`.

    A folder or bucket that does not exist and credentials that are refused raise DataError or UsageError at once. A
    storage that does not answer is asked again.
    """
    with contextlib.ExitStack() as stack:
        next_line = 0.0
        while True:
            try:
                return source.find(folder)
            except (NoCheckpoint, StorageError) as error:
                if next_line == 0.0:
                    stack.enter_context(answering_not_ready(config))
                if time.monotonic() >= next_line:
                    logger.info(f"waiting for the first checkpoint, looking every {config.watch_seconds:g} s: {error}")
                    next_line = time.monotonic() + LOG_SECONDS
            time.sleep(config.watch_seconds)


@contextlib.contextmanager
def answering_not_ready(config: ServeConfig) -> Iterator[None]:
    """Answer requests on the inference port as long as the block runs. Raises UsageError if the port is taken."""
    host = resolve_host(config.host)
    try:
        server = _NotReadyServer((host, config.inference_port), _NotReadyHandler)
    except OSError as error:
        raise cannot_listen(host, config.inference_port, "inference_port", error) from error
    with server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()


class _NotReadyServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True  # TorchServe listens on the same port a moment later
    daemon_threads = True
    block_on_close = False


class _NotReadyHandler(http.server.BaseHTTPRequestHandler):
    timeout = CLIENT_SECONDS

    def do_GET(self) -> None:
        self._answer(*(PING if self.path == "/ping" else NO_MODEL))

    def do_POST(self) -> None:
        # If the body were not read, the client could find its connection reset, and no answer.
        with contextlib.suppress(ValueError):
            self.rfile.read(max(0, min(int(self.headers["Content-Length"] or 0), MAX_BODY_BYTES)))
        self._answer(*NO_MODEL)

    def _answer(self, status: int, content: dict[str, str]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """No line for each request, as with TorchServe."""
