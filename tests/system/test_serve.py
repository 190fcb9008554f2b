"""`babybert serve` as a process: rolling in versions, draining, tokens, full queues, and a worker that is killed."""

import http.client
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil  # type: ignore[import-untyped, unused-ignore]
import pytest
from conftest import S3, aws_variables
from deployment import ROOT
from processes import babybert_output, start_babybert
from served import JSON, ServedModel, serve_flags, serving, wait_for

from babybert.checkpoint.storage import S3Store
from babybert.config import ServeConfig
from babybert.errors import UsageError, UserError
from babybert.s3 import list_keys
from babybert.serving import torchserve_settings
from babybert.serving.archive import write_archive
from babybert.serving.request_schema import MAX_BODY_BYTES
from babybert.serving.torchserve import TorchServe, free_ports
from babybert.training.train import pretrain

BODY = json.dumps({"text": "the film is [MASK] ."}).encode()


class LoadGenerator:
    """Clients that send requests without a pause, each on its own connection, which it keeps open as long as it can."""

    def __init__(self, port: int, clients: int) -> None:
        self.port, self.clients = port, clients
        # How often each (status, version) came; without a response, (name of the error, None).
        self.answers: Counter[tuple[int | str, str | None]] = Counter()
        self._stop = threading.Event()

    def _send_requests(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        while not self._stop.is_set():
            try:
                connection.request("POST", "/predictions/babybert", BODY, JSON)
                answer = connection.getresponse()
                answer.read()
                self.answers[answer.status, answer.headers.get("x-babybert-version")] += 1
            except (OSError, http.client.HTTPException) as error:
                self.answers[type(error).__name__, None] += 1
                connection.close()
                time.sleep(0.05)
        connection.close()

    def statuses(self) -> set[int | str]:
        """All statuses and errors so far."""
        return {status for status, _ in self.answers}

    def versions(self) -> set[str]:
        """All versions that have answered so far."""
        return {version for _, version in self.answers if version}

    def answered(self) -> int:
        """How many requests were answered with 200 so far."""
        return sum(count for (status, _), count in self.answers.items() if status == 200)

    @contextmanager
    def running(self) -> Iterator["LoadGenerator"]:
        """Send requests until the block is left."""
        threads = [threading.Thread(target=self._send_requests) for _ in range(self.clients)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()


@contextmanager
def served(folder: Path, *flags: str, **environment: str) -> Iterator[ServedModel]:
    """`babybert serve` in a folder until the block is left."""
    yield from serving(folder, *flags, environment=environment)


# The settings of another TorchServe, which TS_CONFIG_FILE names. It opens every port and turns all protection off.
FOREIGN_SETTINGS = """
inference_address=http://0.0.0.0:{}
management_address=http://0.0.0.0:{}
metrics_address=http://0.0.0.0:{}
disable_token_authorization=true
enable_model_api=true
enable_envvars_config=true
max_request_size=100000000
"""


def hostile_environment(folder: Path) -> dict[str, str]:
    """Variables that TorchServe, Java or the workers read, and that change our settings or stop the server."""
    settings = folder / "foreign.properties"
    settings.write_text(FOREIGN_SETTINGS.format(*free_ports(3)))
    temporary = folder / "Ü #1, 9%"
    temporary.mkdir(exist_ok=True)
    return {
        "TS_CONFIG_FILE": str(settings),
        "TS_INFERENCE_ADDRESS": "http://0.0.0.0:1",
        "TS_DISABLE_TOKEN_AUTHORIZATION": "true",
        "TS_OPEN_INFERENCE_PROTOCOL": "true",
        "LOG4J_CONFIGURATION_FILE": "/dev/null",
        "JAVA_TOOL_OPTIONS": "-Xmx1m",
        "JDK_JAVA_OPTIONS": "--no-such-option",
        "_JAVA_OPTIONS": "-Dmodel_server_home=/nowhere",
        "CLASSPATH": "/nowhere",
        "LOCAL_RANK": "1",
        "RANK": "x",
        **dict.fromkeys(("http_proxy", "HTTP_PROXY", "ALL_PROXY"), "http://127.0.0.1:9"),
        "no_proxy": "",
        "NO_PROXY": "",
        "LC_ALL": "C",
        "TMPDIR": str(temporary),
    }


def served_version(server: ServedModel) -> str:
    """The version that answers now."""
    return server.ask({"text": "[MASK]"}).headers["x-babybert-version"]


@pytest.fixture(scope="module")
def archive(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    sizes = ["--width=8", "--heads=2", "--feed-forward=16"]
    settings = ["--max-steps=2", "--no-metrics", "--device=cpu"]
    babybert_output("pretrain", f"--data={demo_folder}", f"--out={folder / 'run'}", *settings, *sizes)
    return write_archive(folder / "run" / "step-00000002", folder)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A temporary folder whose path leaves room for the names of TorchServe's sockets, which are limited."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_a_run_in_s3_is_followed_without_a_failed_request(
    small: Any, s3: S3, s3_endpoint: str, tmp_path: Path, short_path: Path
) -> None:
    address, run = f"s3://{s3.bucket}/runs/one", tmp_path / "run"
    store = S3Store(address)
    for step in (4, 8, 12):
        pretrain(small(max_steps=step, keep_checkpoints=9))
    store.upload(run / "step-00000004")
    environment = {**aws_variables(s3_endpoint), "TMPDIR": str(short_path)}
    with (
        served(tmp_path, address, "--watch", "--watch-seconds=0.5", **environment) as server,
        LoadGenerator(server.inference_port, 4).running() as load,
    ):
        assert served_version(server).startswith("4-")
        store.upload(run / "step-00000012")
        corrupt_weights(s3, "runs/one/step-00000012/")
        store.upload(run / "step-00000008")
        wait_for(lambda: any(version.startswith("8-") for version in load.versions()), 60)
        assert not any(version.startswith("12-") for version in load.versions())
        wait_for(lambda: len(server.models()) == 1, 60)  # the old version is removed
        wait_for(lambda: [path.name[:11] for path in short_path.glob("babybert-serve-*/store/*")] == ["babybert-8-"])
        time.sleep(1)
        assert server.log_lines_with("skipping").count("step-00000012") == 1
    assert load.statuses() == {200}, load.answers
    assert sorted(int(version.split("-")[0]) for version in load.versions()) == [4, 8]


def corrupt_weights(s3: S3, prefix: str) -> None:
    """Change the last byte of the weights of a checkpoint in S3."""
    keys = [key for key, _ in list_keys(s3.client, s3.bucket, prefix) if key.endswith("model.safetensors")]
    (weights,) = keys
    content = s3.client.get_object(Bucket=s3.bucket, Key=weights)["Body"].read()
    s3.client.put_object(Bucket=s3.bucket, Key=weights, Body=content[:-1] + b"x")


def test_a_checkpoint_that_cannot_be_served_leaves_the_old_version(
    small: Any, tmp_path: Path, short_path: Path
) -> None:
    run = tmp_path / "run"
    pretrain(small(max_steps=4))
    with served(tmp_path, "run", "--watch", "--watch-seconds=0.5", TMPDIR=str(short_path)) as server:
        (folder,) = short_path.glob("babybert-serve-*")
        (folder / "store").rename(folder / "elsewhere")
        (folder / "store").write_text("a file, where no archive can be put")
        pretrain(small(max_steps=8))
        wait_for(lambda: "still serving version 4-" in server.log_lines_with("warning"), 60)
        assert served_version(server).startswith("4-")
        (folder / "store").unlink()
        (folder / "elsewhere").rename(folder / "store")
        wait_for(lambda: served_version(server).startswith("8-"), 60)  # it is tried again
    assert (run / "step-00000004").is_dir()


def test_after_sigterm_it_serves_until_there_are_no_more_requests(archive: Path) -> None:
    with served(archive.parent, "babybert.mar", "--drain-seconds=20") as server:
        with LoadGenerator(server.inference_port, 4).running() as load:
            time.sleep(1)
            server.child.send_signal(signal.SIGTERM)
            time.sleep(3)  # other clients may continue for a while after SIGTERM
            assert server.child.is_running
        assert load.statuses() == {200}, load.answers
        ended = time.monotonic()
        assert server.child.wait(30) == 0
        assert time.monotonic() - ended < 15


def test_a_second_signal_ends_it_at_once(archive: Path) -> None:
    with (
        served(archive.parent, "babybert.mar", "--drain-seconds=300") as server,
        LoadGenerator(server.inference_port, 2).running(),
    ):
        server.child.send_signal(signal.SIGTERM)
        time.sleep(2)
        assert server.child.is_running
        server.child.send_signal(signal.SIGTERM)
        assert server.child.wait(30) == 0


def test_with_tokens_only_requests_with_a_token_are_answered(archive: Path) -> None:
    environment = hostile_environment(archive.parent)
    with served(archive.parent, "babybert.mar", "--token-auth", **environment) as server:
        (key_file,) = Path(environment["TMPDIR"]).glob("babybert-serve-*/key_file.json")
        assert key_file.stat().st_mode & 0o077 == 0
        key = json.loads(key_file.read_text())["inference"]["key"]
        for path, body in (("/predictions/babybert", BODY), ("/ping", None)):
            request = urllib.request.Request(f"http://127.0.0.1:{server.inference_port}{path}", body, JSON)
            with pytest.raises(urllib.error.HTTPError, match="400"):
                urllib.request.urlopen(request, timeout=30)
            request.add_header("Authorization", f"Bearer {key}")
            assert urllib.request.urlopen(request, timeout=30).status == 200
        assert server.samples()  # the metrics need no token

        assert is_ready(server.management_port, environment["TMPDIR"])
        replace_management_key(key_file)
        assert is_ready(server.management_port, environment["TMPDIR"])
        assert not is_ready(server.management_port)  # without the keys


def test_an_expired_management_key_is_renewed(archive: Path) -> None:
    inference, management, metrics = free_ports(3)
    config = ServeConfig(token_auth=True, inference_port=inference, management_port=management, metrics_port=metrics)
    with TorchServe(config, archive) as server:
        replace_management_key(server.key_file)
        assert server.manage("GET", "/models/babybert")[0]["modelName"] == "babybert"


def replace_management_key(key_file: Path) -> None:
    """Write another management key, which TorchServe refuses as it refuses one that has expired."""
    keys = json.loads(key_file.read_text())
    keys["management"]["key"] = "expired_"
    key_file.write_text(json.dumps(keys))


def test_management_listens_on_loopback_only_and_no_model_can_be_registered(archive: Path) -> None:
    environment = hostile_environment(archive.parent)
    # A folder with an archive.
    with served(archive.parent, ".", "--host=0.0.0.0", "--workers=2", **environment) as server:
        assert [worker["status"] for worker in server.model()["workers"]] == ["READY", "READY"]
        paths = {server.inference_port: "/ping", server.management_port: "/models", server.metrics_port: "/metrics"}
        for address, (port, path) in itertools.product(own_addresses(), paths.items()):
            expected = None if port == server.management_port else 200
            assert status_of(f"http://{address}:{port}{path}") == expected
        url = f"http://127.0.0.1:{server.management_port}/models?url={archive.name}"
        with pytest.raises(urllib.error.HTTPError, match="405"):
            urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=30)
        # Without the body: the server answers and closes the connection before it has read it.
        connection = http.client.HTTPConnection("127.0.0.1", server.inference_port, timeout=30)
        connection.request("POST", urlsplit(server.url).path, headers={"Content-Length": str(MAX_BODY_BYTES + 1)})
        assert connection.getresponse().status == 413
        variables = psutil.Process(server.worker_ids()[0]).environ()
        assert not set(variables) & set(environment) - {"TMPDIR", "LC_ALL"}


def test_a_server_that_does_not_use_our_settings_is_stopped(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchserve_settings, "PASSED_ON", ("*",))
    monkeypatch.setenv("TS_CONFIG_FILE", hostile_environment(tmp_path)["TS_CONFIG_FILE"])
    inference, management, metrics = free_ports(3)
    config = ServeConfig(inference_port=inference, management_port=management, metrics_port=metrics)
    server = TorchServe(config, archive)
    with pytest.raises(UserError, match=r"TorchServe listens on 0\.0\.0\.0:.*, where it was not told to"), server:
        pytest.fail("it was accepted")
    assert server.process.poll() is not None


def test_a_port_that_is_taken_while_torchserve_starts(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of gRPC is replaced by another; one of the settings is named in the error."""
    inference, management, metrics, grpc = free_ports(4)
    config = ServeConfig(inference_port=inference, management_port=management, metrics_port=metrics)
    offered = [[grpc, free_ports(1)[0]]]  # for the first start
    monkeypatch.setattr(torchserve_settings, "free_ports", lambda count: (offered or [free_ports(count)]).pop())
    with socket.socket() as other:
        other.bind(("127.0.0.1", grpc))
        other.listen()
        with TorchServe(config, archive) as server:
            listening = torchserve_settings.listening_addresses(server.process.pid)
            assert ("127.0.0.1", inference) in listening
            assert ("127.0.0.1", grpc) not in listening
    assert not offered

    launch = TorchServe._launch

    def launch_too_late(self: TorchServe, *arguments: Any) -> None:
        other.bind(("127.0.0.1", management))
        other.listen()
        launch(self, *arguments)

    monkeypatch.setattr(TorchServe, "_launch", launch_too_late)
    refused = pytest.raises(UsageError, match=rf"cannot listen on 127\.0\.0\.1:{management} \(")
    with socket.socket() as other, refused, TorchServe(config, archive):
        pytest.fail("it was accepted")


def test_it_waits_for_the_first_checkpoint(small: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Probes see a server that is alive but not ready. The environment has a proxy, which no request may go to."""
    folder = tmp_path_factory.mktemp("wait")  # a short name: the paths of sockets are limited
    run = folder / "run"
    run.mkdir()
    environment = hostile_environment(folder)
    ports, flags = serve_flags()
    child = start_babybert(
        "serve", "run", "--watch", "--watch-seconds=0.5", *flags, folder=folder, environment=environment
    )
    try:
        line = child.wait_for_line("waiting for the first checkpoint")
        assert "run: no valid checkpoint there; train one with `babybert pretrain --out run`" in line
        server = ServedModel(child, folder, *ports)
        assert (status_of(f"http://127.0.0.1:{ports[0]}/ping"), server.ask({"text": "[MASK]"}).status) == (200, 503)
        assert not is_ready(ports[1])
        pretrain(small(max_steps=4, out=run))
        child.wait_for_line("POST")
        assert is_ready(ports[1])
        assert server.ask({"text": "[MASK]"}).headers["x-babybert-version"].startswith("4-")
        for url in (f"file://{folder}/x.mar", f"http://127.0.0.1:{ports[0]}/x.mar"):
            request = urllib.request.Request(f"http://127.0.0.1:{ports[1]}/models?url={url}", method="POST")
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(request, timeout=30)
        pretrain(small(max_steps=8, out=run))
        wait_for(lambda: served_version(server).startswith("8-"), 60)
        assert child.output.count("waiting") == 1
        child.send_signal(signal.SIGTERM)
        assert child.wait() == 0
    finally:
        child.kill()


def is_ready(management_port: int, temporary: str = tempfile.gettempdir()) -> bool:
    """What the command `ready` of the serving image says; `temporary` is the server's folder for temporary files."""
    variables = {
        **os.environ,
        "BABYBERT_SERVE_MANAGEMENT_PORT": str(management_port),
        "TMPDIR": temporary,
        "http_proxy": "127.0.0.1:9",
    }
    command = [sys.executable, str(ROOT / "docker" / "ready.py")]
    return subprocess.run(command, env=variables, capture_output=True, timeout=60).returncode == 0


@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_waiting_at_once(tmp_path: Path, signal_number: int, code: int) -> None:
    """It does not wait until it looks for a checkpoint again."""
    watch = ("--watch", "--watch-seconds=600")
    child = start_babybert("serve", ".", *watch, *serve_flags()[1], folder=tmp_path, environment={})
    try:
        child.wait_for_line("waiting for the first checkpoint")
        child.send_signal(signal_number)
        assert child.wait(60) == code
    finally:
        child.kill()


def own_addresses() -> list[str]:
    """The IPv4 addresses of this machine that are not loopback."""
    done = subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=30)
    return [address for address in done.stdout.split() if ":" not in address]


def status_of(url: str) -> int | None:
    """The HTTP status of a GET request, or None without a connection."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return int(response.status)
    except OSError:
        return None


def test_a_killed_worker_is_replaced(archive: Path) -> None:
    with served(archive.parent, "babybert.mar") as server, LoadGenerator(server.inference_port, 4).running() as load:
        wait_for(lambda: load.answered() > 20)
        killed = server.worker()
        os.kill(killed, signal.SIGKILL)

        def is_replaced() -> bool:
            (worker,) = server.model()["workers"]
            return bool(worker["status"] == "READY" and worker["pid"] != killed)

        wait_for(is_replaced, 60)
        before = load.answered()
        wait_for(lambda: load.answered() > before + 20)
    # At worst refused, never without a response. TorchServe answers a request in the worker with 507 or 500 ("Worker
    # died."), by which of its threads notices first that the worker is gone.
    assert load.statuses() <= {200, 500, 503, 507}, load.answers


def test_requests_beyond_the_queue_are_refused_at_once(archive: Path) -> None:
    """While the worker is stopped the queue fills; when it continues, all requests in the queue are answered."""
    with served(archive.parent, "babybert.mar") as server:
        worker = server.worker()
        os.kill(worker, signal.SIGSTOP)
        with LoadGenerator(server.inference_port, 150).running() as load:
            wait_for(lambda: load.answers[503, None] > 50)
            assert load.answered() == 0
            os.kill(worker, signal.SIGCONT)
            wait_for(lambda: load.answered() > 100)
        assert load.statuses() == {200, 503}, load.answers


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], "corrupt, or not an archive"),
        (
            lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
            "(.* differs from its digest in served.json|corrupt, or not an archive)",
        ),
        (lambda content: b"", "corrupt, or not an archive"),
    ],
    ids=["truncated", "flipped bit", "empty"],
)
def test_a_corrupt_archive_is_refused_before_anything_listens(
    archive: Path, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    (tmp_path / "x.mar").write_bytes(damage(archive.read_bytes()))
    command = [sys.executable, "-m", "babybert.cli", "serve", "x.mar"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert re.search(f"^babybert serve: error: x.mar: {message}", line), line
