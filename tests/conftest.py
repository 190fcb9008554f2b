"""Shared by all tests: a small prepared demo corpus, settings for a model of a few thousand parameters, an S3 server."""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from babybert.config import PrepareConfig, PretrainConfig
from babybert.data.basic_english import BasicEnglishTokenizer
from babybert.data.dataset import Dataset, open_dataset
from babybert.data.prepare import prepare
from babybert.data.tokenizer import Tokenizer

pytest_plugins = ["served"]  # the server that system tests share

SMALL = {
    "preset": "tiny",
    "width": 8,
    "heads": 2,
    "layers": 1,
    "feed_forward": 16,
    "batch_size": 8,
    "metrics": False,
    "device": "cpu",
    "log_every": 5,
}


@pytest.fixture(autouse=True)
def _log_level(caplog: pytest.LogCaptureFixture) -> None:
    """Let `caplog` see the project's messages of level INFO."""
    caplog.set_level(logging.INFO, logger="babybert")


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 generated reviews, prepared; tests must not change it."""
    folder = tmp_path_factory.mktemp("demo")
    prepare(PrepareConfig(out=folder, demo_documents=80, validation_fraction=0.2))
    return folder


@pytest.fixture(scope="session")
def demo(demo_folder: Path) -> Dataset:
    return open_dataset(demo_folder)


@pytest.fixture
def small(demo_folder: Path, tmp_path: Path) -> Any:
    """A function that makes the settings of a small run in a folder of the test's own."""

    def make(**settings: Any) -> PretrainConfig:
        return PretrainConfig(**{**SMALL, "data": demo_folder, "out": tmp_path / "run", "epochs": 2, **settings})

    return make


def imdb_review_folder(root: Path, texts: list[str]) -> Path:
    """A folder laid out like the public archive, with these reviews."""
    for number, text in enumerate(texts):
        folder = root / "aclImdb" / ("train", "test")[number % 2] / ("pos", "neg")[number // 2 % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}_7.txt").write_text(text, encoding="utf-8")
    return root


def tokenizer_of(*texts: str) -> Tokenizer:
    """The tokenizer that `prepare` would make of these texts."""
    words = BasicEnglishTokenizer()
    for text in texts:
        words.add(text)
    return words.finish(min_frequency=1, vocab_size=None)[0]


SUICIDAL = """
import importlib, os, signal, sys
from babybert import cli

module, _, name = sys.argv[1].partition(":")
*path, name = name.split(".")
owner, calls = importlib.import_module(module), int(sys.argv[2])
for part in path:
    owner = getattr(owner, part)
original = getattr(owner, name)

def wrapped(*arguments, **named):
    global calls
    calls -= 1
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **named)

setattr(owner, name, wrapped)
sys.exit(cli.main(sys.argv[3:]))
"""


def run_until_killed(function: str, calls: int, *flags: str) -> None:
    """A babybert command that kills itself with SIGKILL at the `calls`-th call of `module:Class.function`."""
    job = subprocess.run([sys.executable, "-c", SUICIDAL, function, str(calls), *flags], capture_output=True, text=True)
    assert job.returncode == -signal.SIGKILL, job.stderr


@dataclass(frozen=True)
class S3:
    """A running server with a bucket of the test's own."""

    client: Any
    bucket: str


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from serve_s3(tmp_path_factory)


def serve_s3(folders: Any) -> Iterator[str]:
    """A SeaweedFS server in a folder of its own; yields its address."""
    server = Seaweed(folders.mktemp("seaweed"))
    server.start()
    try:
        yield server.url
    finally:
        server.kill()


class Seaweed:
    """A SeaweedFS server on loopback, which checks keys and checksums as S3 does, and can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        assert weed, "weed is not there; run `make install`"
        writer = {
            "name": "test",
            "credentials": [{"accessKey": "test-key", "secretKey": "test-secret"}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }
        reader = {
            "name": "reader",
            "credentials": [{"accessKey": "read-key", "secretKey": "read-secret"}],
            "actions": ["Read", "List"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [writer, reader]}))
        master, volume, filer, s3 = _ports_with_room(4)
        command = [
            weed,
            "mini",
            f"-dir={folder}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-master.telemetry=false",
            "-webdav=false",
            "-admin.ui=false",
        ]
        ports = [
            f"-master.port={master}",
            f"-volume.port={volume}",
            f"-filer.port={filer}",
            f"-s3.port={s3}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        ]
        self._command, self._folder = [*command, *ports, f"-s3.config={folder / 's3.json'}"], folder
        self.url = f"http://127.0.0.1:{s3}"

    def start(self) -> None:
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, cwd=self._folder)
        deadline = time.monotonic() + 60
        while not _answers(self.url):
            assert self._process.poll() is None, (self._folder / "log").read_text()[-2000:]
            assert time.monotonic() < deadline, (self._folder / "log").read_text()[-2000:]
            time.sleep(0.1)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> S3:
    """An empty bucket; the AWS variables point to the server."""
    import boto3

    for name, value in aws_variables(s3_endpoint).items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    bucket = f"bucket-{time.time_ns()}"
    client.create_bucket(Bucket=bucket)
    return S3(client, bucket)


def aws_variables(endpoint: str) -> dict[str, str]:
    """What leads boto3 to the server."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
    }


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1):
            return True
    except urllib.error.HTTPError:
        return True  # it refuses us without a signature, so it is up
    except OSError:
        return False


def _ports_with_room(count: int) -> list[int]:
    """Free ports below 50000: the server listens on each port + 10000 as well."""
    found: list[int] = []
    for port in range(20000 + os.getpid() % 20000, 50000):
        try:
            for number in (port, port + 10000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", number))
        except OSError:
            continue
        found.append(port)
        if len(found) == count:
            break
    return found


ONES = 2**32 - 1


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ (x >> 16)) * 0x7FEB352D & ONES
    x = (x ^ (x >> 15)) * 0x846CA68B & ONES
    return x ^ (x >> 16)


def dropout_mask(rows: int, columns: int, dropout_p: float, seed_2: torch.Tensor) -> torch.Tensor:
    """What the kernels' dropout keeps, computed in int64: a product that wraps has its lowest 32 bits right."""
    first, second = seed_2.tolist()
    key = _mix((torch.arange(rows) + first) & ONES) ^ second
    return _mix((key[:, None] + torch.arange(columns) * 0x9E3779B9) & ONES) >= min(round(dropout_p * 2**32), ONES)
