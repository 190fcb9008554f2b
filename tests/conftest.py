"""Shared by all tests: a small prepared data set, settings for a model of a few thousand parameters, an S3 server."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from faulty_proxy import S3Proxy, pass_all
from processes import run_until_killed as run_until_killed  # tests import it from here

from babybert.config import PrepareConfig, PretrainConfig
from babybert.data.basic_english import BasicEnglishTokenizer
from babybert.data.dataset import Dataset, open_dataset
from babybert.data.prepare import prepare
from babybert.data.tokenizer import Tokenizer
from babybert.data.wordpiece_trainer import WordPieceTrainer
from babybert.serving.torchserve import free_ports

pytest_plugins = ["served"]  # the TorchServe that the system tests share

# The servers of the tests are on loopback, whatever proxy the environment names.
urllib.request.install_opener(urllib.request.build_opener(urllib.request.ProxyHandler({})))

TESTS = Path(__file__).parent
SYSTEM_SECONDS = 1200
SYSTEM_FOLDERS = (TESTS / "system", TESTS / "web")

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test below tests/system and tests/web as a system test, which may take longer than the others."""
    for item in items:
        if any(folder in item.path.parents for folder in SYSTEM_FOLDERS):
            item.add_marker(pytest.mark.system)
            item.add_marker(pytest.mark.timeout(SYSTEM_SECONDS))


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Escape surrogates in a report: pytest-xdist sends it as UTF-8, and some tests log names that are not UTF-8."""
    data = yield
    return _without_surrogates(data)


def _without_surrogates(data: Any) -> Any:
    """The same lists and dictionaries, with surrogates in their texts as backslash escapes."""
    if isinstance(data, str):
        return data.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(data, dict):
        return {_without_surrogates(key): _without_surrogates(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return type(data)(map(_without_surrogates, data))
    return data


@pytest.fixture(autouse=True)
def _log_level(caplog: pytest.LogCaptureFixture) -> None:
    """Let `caplog` see the project's messages of level INFO."""
    logging.getLogger("babybert").propagate = True  # a command that ran in an earlier test has turned it off
    caplog.set_level(logging.INFO, logger="babybert")


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set made from 80 generated reviews. Tests must not change it."""
    folder = tmp_path_factory.mktemp("demo")
    prepare(PrepareConfig(out=folder, demo_documents=80, validation_fraction=0.2))
    return folder


@pytest.fixture(scope="session")
def demo(demo_folder: Path) -> Dataset:
    """The opened data set of `demo_folder`."""
    return open_dataset(demo_folder)


@pytest.fixture
def small(demo_folder: Path, tmp_path: Path) -> Callable[..., PretrainConfig]:
    """A function that returns the settings of a small run in a temporary folder; keywords override settings."""

    def make(**settings: Any) -> PretrainConfig:
        return PretrainConfig(**{**SMALL, "data": demo_folder, "out": tmp_path / "run", "epochs": 2, **settings})

    return make


def imdb_review_folder(root: Path, texts: list[str]) -> Path:
    """A folder laid out like the public archive, with these reviews."""
    for index, text in enumerate(texts):
        split = ("train", "test")[index % 2]
        label = ("pos", "neg")[index // 2 % 2]
        folder = root / "aclImdb" / split / label
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}_7.txt").write_text(text, encoding="utf-8")
    return root


def tokenizer_of(*texts: str) -> Tokenizer:
    """The tokenizer that `prepare` would build from these texts."""
    builder = BasicEnglishTokenizer()
    for text in texts:
        builder.add(text)
    return builder.finish(min_frequency=1, vocab_size=None)[0]


def wordpiece_of(*texts: str, vocab_size: int, min_frequency: int = 1) -> Tokenizer:
    """The WordPiece tokenizer that `prepare` would train on these texts."""
    trainer = WordPieceTrainer()
    for text in texts:
        trainer.add(text)
    return trainer.finish(min_frequency, vocab_size)


@dataclass(frozen=True)
class S3:
    """A client of the running S3 server, and a bucket that only this test uses."""

    client: Any
    bucket: str


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an S3 server that all tests share."""
    yield from serve_s3(tmp_path_factory)


class FolderFactory(Protocol):
    """What makes temporary folders, as pytest's `tmp_path_factory` does."""

    def mktemp(self, basename: str) -> Path: ...


def serve_s3(folders: FolderFactory) -> Iterator[str]:
    """Run a SeaweedFS server in a temporary folder; yields its address."""
    server = Seaweed(folders.mktemp("seaweed"))
    server.start()
    try:
        yield server.url
    finally:
        server.kill()


class Seaweed:
    """A SeaweedFS server on loopback that can be killed and restarted. It verifies keys and checksums as S3 does."""

    def __init__(self, folder: Path) -> None:
        weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        assert weed, "weed is not installed; run `make install`"
        accounts = folder / "s3.json"
        accounts.write_text(
            json.dumps(
                {
                    "identities": [
                        _identity("test", ["Admin", "Read", "List", "Tagging", "Write"]),
                        _identity("read", ["Read", "List"]),
                    ]
                }
            )
        )
        numbers = iter(free_ports(8))
        ports = {name: (next(numbers), next(numbers)) for name in ("master", "volume", "filer", "s3")}  # HTTP, gRPC
        self._folder = folder
        self._command = [
            weed,
            "mini",
            f"-dir={folder}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-master.telemetry=false",
            "-webdav=false",
            "-admin.ui=false",
            *(f"-{name}.port={http}" for name, (http, _) in ports.items()),
            *(f"-{name}.port.grpc={grpc}" for name, (_, grpc) in ports.items()),
            # Each bucket gets volumes of its own. The default limit depends on the free disk space, and all tests
            # together have more buckets than it allows.
            "-volume.max=5000",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.config={accounts}",
        ]
        self.url = f"http://127.0.0.1:{ports['s3'][0]}"

    def start(self) -> None:
        """Start it and wait until it responds."""
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, cwd=self._folder)
        deadline = time.monotonic() + 60
        while not _responds(self.url):
            assert self._process.poll() is None, (self._folder / "log").read_text()[-2000:]
            assert time.monotonic() < deadline, (self._folder / "log").read_text()[-2000:]
            time.sleep(0.1)

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(60)


def _identity(name: str, actions: list[str]) -> dict[str, Any]:
    """An account of the S3 server with the keys `<name>-key` and `<name>-secret`."""
    credentials = [{"accessKey": f"{name}-key", "secretKey": f"{name}-secret"}]
    return {"name": name, "credentials": credentials, "actions": actions}


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> S3:
    """An empty bucket. The AWS environment variables point to the server."""
    import boto3

    for name, value in aws_variables(s3_endpoint).items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    bucket = f"bucket-{time.time_ns()}"
    client.create_bucket(Bucket=bucket)
    return S3(client, bucket)


@pytest.fixture
def s3_proxy(s3: S3, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Proxy]:
    """A proxy that can refuse requests to the S3 server. The AWS variables point to it; `s3.client` avoids it."""
    proxy = S3Proxy(s3_endpoint, pass_all)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.close()


def aws_variables(endpoint: str) -> dict[str, str]:
    """The environment variables with which boto3 uses the server at `endpoint`."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
    }


def _responds(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1):
            return True
    except urllib.error.HTTPError:
        return True  # the request has no signature, so the server refuses it: it is up
    except OSError:
        return False


ONES = 2**32 - 1  # 32 bits set; `& ONES` is the remainder modulo 2^32


def _mix(hash_N: torch.Tensor) -> torch.Tensor:
    hash_N = (hash_N ^ (hash_N >> 16)) * 0x7FEB352D & ONES
    hash_N = (hash_N ^ (hash_N >> 15)) * 0x846CA68B & ONES
    return hash_N ^ (hash_N >> 16)


def gradient(x: torch.Tensor) -> torch.Tensor:
    """The gradient of a leaf after a backward pass."""
    assert x.grad is not None
    return x.grad


def dropout_mask(rows: int, columns: int, dropout_p: float, seed_2: torch.Tensor) -> torch.Tensor:
    """The entries that the kernels' dropout keeps, (rows, columns).

    The kernels compute in uint32. This reference computes in int64, where a product that overflows still has the right
    lowest 32 bits.
    """
    first, second = seed_2.tolist()
    key = _mix((torch.arange(rows) + first) & ONES) ^ second
    threshold = min(round(dropout_p * 2**32), ONES)
    return _mix((key[:, None] + torch.arange(columns) * 0x9E3779B9) & ONES) >= threshold
