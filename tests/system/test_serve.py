"""`babybert serve` from outside: rolling versions in, draining, tokens, refusals, and a worker that is killed."""

import http.client
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import contextmanager

import pytest
from conftest import aws_variables
from served import JSON, serving, wait_for

from babybert.checkpoint.storage import S3Store
from babybert.s3 import list_keys
from babybert.serving.archive import write_archive
from babybert.training.train import pretrain

BODY = json.dumps({"text": "the film is [MASK] ."}).encode()


class Load:
    """Clients that ask without a pause, each on a connection of its own that it keeps while it can."""

    def __init__(self, port, clients):
        self.port, self.clients, self.end = port, clients, threading.Event()
        self.answers = Counter()  # by status, or by the error there was in place of one, and version

    def _ask(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        while not self.end.is_set():
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

    def versions(self):
        return {version for _, version in self.answers}

    @contextmanager
    def running(self):
        threads = [threading.Thread(target=self._ask) for _ in range(self.clients)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self.end.set()
            for thread in threads:
                thread.join()


@contextmanager
def served(folder, *flags, **environment):
    yield from serving(folder, *flags, environment=environment)


@pytest.fixture(scope="module")
def archive(demo_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    flags = [
        f"--data={demo_folder}",
        f"--out={folder / 'run'}",
        "--max-steps=2",
        "--no-metrics",
        "--device=cpu",
        "--width=8",
        "--heads=2",
        "--feed-forward=16",
    ]
    subprocess.run([sys.executable, "-m", "babybert.cli", "pretrain", *flags], check=True, capture_output=True)
    return write_archive(folder / "run" / "step-00000002", folder)


def test_a_run_in_s3_is_followed_without_a_request_that_fails(small, s3, s3_endpoint, tmp_path):
    address, run = f"s3://{s3.bucket}/runs/one", tmp_path / "run"
    store = S3Store(address)
    for step in (4, 8, 12):
        pretrain(small(max_steps=step, keep_checkpoints=9))
    store.upload(run / "step-00000004")
    environment = {**aws_variables(s3_endpoint), "TMPDIR": str(tmp_path)}
    with (
        served(tmp_path, address, "--watch", "--watch-seconds=0.5", **environment) as server,
        Load(server.inference_port, 4).running() as load,
    ):
        version = server.ask({"text": "[MASK]"}).headers["x-babybert-version"]
        assert version.startswith("4-")
        store.upload(run / "step-00000012")
        (weights,) = [
            key
            for key, _ in list_keys(s3.client, s3.bucket, "runs/one/step-00000012/")
            if key.endswith("model.safetensors")
        ]
        good = s3.client.get_object(Bucket=s3.bucket, Key=weights)["Body"].read()
        s3.client.put_object(Bucket=s3.bucket, Key=weights, Body=good[:-1] + b"x")
        store.upload(run / "step-00000008")
        wait_for(lambda: any(name.startswith("8-") for name in load.versions()), 60)
        assert not any(name.startswith("12-") for name in load.versions())
        wait_for(lambda: len(server.models()) == 1, 60)  # the old version is gone
        wait_for(lambda: [path.name[:11] for path in tmp_path.glob("babybert-serve-*/store/*")] == ["babybert-8-"])
        time.sleep(1)
        assert server.said("passing over").count("step-00000012") == 1
    assert {status for status, _ in load.answers} == {200}, load.answers
    assert sorted(int(name.split("-")[0]) for name in load.versions()) == [4, 8]


def test_what_cannot_be_served_leaves_the_old_version(small, tmp_path):
    run = tmp_path / "run"
    pretrain(small(max_steps=4))
    with served(tmp_path, "run", "--watch", "--watch-seconds=0.5", TMPDIR=str(tmp_path)) as server:
        (folder,) = tmp_path.glob("babybert-serve-*")
        (folder / "store").rename(folder / "elsewhere")
        (folder / "store").write_text("where no archive can be put")
        pretrain(small(max_steps=8))
        wait_for(lambda: "still serving version 4-" in server.said("warning"), 60)
        assert server.ask({"text": "[MASK]"}).headers["x-babybert-version"].startswith("4-")
        (folder / "store").unlink()
        (folder / "elsewhere").rename(folder / "store")
        wait_for(
            lambda: server.ask({"text": "[MASK]"}).headers["x-babybert-version"].startswith("8-"), 60
        )  # it is tried again
    assert (run / "step-00000004").is_dir()


def test_sigterm_is_heeded_when_nobody_asks_any_more(archive):
    with served(archive.parent, "babybert.mar", "--drain-seconds=20") as server:
        with Load(server.inference_port, 4).running() as load:
            time.sleep(1)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(3)  # as long as others go on sending here
            assert server.process.poll() is None
        assert {status for status, _ in load.answers} == {200}, load.answers
        ended = time.monotonic()
        assert server.process.wait(30) == 0
        assert time.monotonic() - ended < 15


def test_a_second_signal_ends_it_at_once(archive):
    with (
        served(archive.parent, "babybert.mar", "--drain-seconds=300") as server,
        Load(server.inference_port, 2).running(),
    ):
        server.process.send_signal(signal.SIGTERM)
        time.sleep(2)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0


def test_with_tokens_only_who_has_one_is_answered(archive):
    with served(archive.parent, "babybert.mar", "--token-auth", TMPDIR=str(archive.parent)) as server:
        (keys,) = archive.parent.glob("babybert-serve-*/key_file.json")
        assert keys.stat().st_mode & 0o077 == 0
        key = json.loads(keys.read_text())["inference"]["key"]
        for path, body in (("/predictions/babybert", BODY), ("/ping", None)):
            request = urllib.request.Request(f"http://127.0.0.1:{server.inference_port}{path}", body, JSON)
            with pytest.raises(urllib.error.HTTPError, match="400"):
                urllib.request.urlopen(request, timeout=30)
            request.add_header("Authorization", f"Bearer {key}")
            assert urllib.request.urlopen(request, timeout=30).status == 200
        assert server.samples()  # without one


def test_nothing_but_predictions_listens_to_others_and_no_model_can_be_put(archive):
    with served(archive.parent, ".", "--host=0.0.0.0", "--workers=2") as server:  # a folder with an archive
        assert [worker["status"] for worker in server.model()["workers"]] == ["READY", "READY"]
        own = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
        addresses = [address for address in own if ":" not in address]
        for address, port in itertools.product(
            addresses, (server.inference_port, server.management_port, server.metrics_port)
        ):
            path = {server.inference_port: "/ping", server.management_port: "/models", server.metrics_port: "/metrics"}[
                port
            ]
            try:
                reached = urllib.request.urlopen(f"http://{address}:{port}{path}", timeout=5).status
            except OSError:
                reached = None
            assert reached == (None if port == server.management_port else 200)
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.management_port}/models?url={archive.name}", method="POST"
        )
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(request, timeout=30)


def test_a_worker_that_is_killed_comes_back_by_itself(archive):
    with served(archive.parent, "babybert.mar") as server, Load(server.inference_port, 4).running() as load:
        wait_for(lambda: load.answers[200, server_version(load)] > 20)
        killed = server.worker()
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: (worker := server.model()["workers"][0])["status"] == "READY" and worker["pid"] != killed, 60)
        before = load.answers[200, server_version(load)]
        wait_for(lambda: load.answers[200, server_version(load)] > before + 20)
    assert {status for status, _ in load.answers} <= {200, 503, 507}, (
        load.answers
    )  # refused at worst, never hung or cut


def server_version(load):
    return next((version for version in load.versions() if version), None)


def test_more_than_the_queue_takes_is_refused_at_once(archive):
    """The worker is stopped for a while: all that wait in the queue have their answer when it goes on, and none is lost."""
    with served(archive.parent, "babybert.mar") as server:
        worker = server.worker()
        os.kill(worker, signal.SIGSTOP)
        with Load(server.inference_port, 150).running() as load:
            wait_for(lambda: load.answers[503, None] > 50)
            assert load.answers[200, server_version(load)] == 0
            os.kill(worker, signal.SIGCONT)
            wait_for(lambda: load.answers[200, server_version(load)] > 100)
        assert {status for status, _ in load.answers} == {200, 503}, load.answers


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], "damaged, or no archive"),
        (
            lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
            "(is not the one that was packed|damaged)",
        ),
        (lambda content: b"", "damaged, or no archive"),
    ],
)
def test_a_damaged_archive_is_refused_before_anything_listens(archive, tmp_path, damage, message):
    (tmp_path / "x.mar").write_bytes(damage(archive.read_bytes()))
    done = subprocess.run(
        [sys.executable, "-m", "babybert.cli", "serve", "x.mar"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert re.search(f"^babybert serve: error: x.mar: {message}", line), line
