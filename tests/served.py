"""One real TorchServe, shared by all system tests of what it answers, and a client that sends whatever it is told to."""

import http.client
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from babybert.checkpoint.format import MODEL_FILES, save_model
from babybert.config import ModelConfig
from babybert.data.dataset import Dataset, sha256
from babybert.model.bert import BabyBert
from babybert.serving.archive import write_archive
from babybert.serving.torchserve import free_ports

DAMAGED = "goalkeeper"  # a word whose vector is not a number in the model that is served
JSON = {"Content-Type": "application/json"}


def babybert(folder: Path, *arguments: str) -> str:
    """Run one command in `folder` and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "babybert.cli", *arguments], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: Any  # parsed JSON


@dataclass(frozen=True)
class Served:
    """A running `babybert serve`."""

    process: subprocess.Popen[str]
    folder: Path
    inference_port: int
    management_port: int
    metrics_port: int
    lines: list[str]  # of its standard error, so far

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.inference_port}/predictions/babybert"

    def ask(
        self,
        body: Any = None,
        headers: Mapping[str, str] = JSON,
        method: str = "POST",
        query: str = "",
        connection: Any = None,
    ) -> Answer:
        """The answer to one request; `body` is sent as JSON unless it is bytes or None."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        own = connection or http.client.HTTPConnection("127.0.0.1", self.inference_port, timeout=60)
        own.request(method, f"/predictions/babybert{query}", data, dict(headers))
        answer = own.getresponse()
        text = answer.read()
        if connection is None:
            own.close()
        return Answer(
            answer.status,
            {name.lower(): value for name, value in answer.getheaders()},
            json.loads(text, parse_constant=pytest.fail),
        )

    def archives(self) -> list[Path]:
        """What it serves."""
        return list((self.folder / "model-store").glob("*.mar"))

    def said(self, word: str) -> str:
        """The lines on standard error with this word in them."""
        return "".join(line for line in self.lines if word in line)

    def models(self) -> list[dict[str, Any]]:
        """What the management API says of the versions that it has, and their workers."""
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self.management_port}/models/babybert/all", timeout=10
        ) as answer:
            return json.load(answer)

    def model(self) -> dict[str, Any]:
        """The same of the only version."""
        (model,) = self.models()
        return model

    def worker(self) -> int:
        """The process id of the only worker."""
        (worker,) = self.model()["workers"]
        assert worker["status"] == "READY"
        return worker["pid"]

    def samples(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """All samples at /metrics by name and labels, without those that TorchServe adds to ours."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        added = {"ModelName", "Level", "Hostname"}
        return {
            (s.name, frozenset((k, v) for k, v in s.labels.items() if k not in added)): s.value
            for family in families
            for s in family.samples
        }

    def settled(self) -> None:
        """Wait until the metrics of what was asked before are there."""
        former = None
        while former != (former := self.value("babybert_inference_batch_requests_sum")):
            time.sleep(0.5)

    def value(self, name: str, **labels: str) -> float:
        """One sample; 0 where it is not there yet."""
        return self.samples().get((name, frozenset(labels.items())), 0.0)


def wait_for(check: Callable[[], Any], seconds: float = 30) -> Any:
    """What `check` returns as soon as it is true; metrics travel by the worker's output, a moment behind the answers."""
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.1)
    return found


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, demo: Dataset) -> Iterator[Served]:
    """An untrained model of the demo's vocabulary behind `babybert serve`, one word of it damaged; tests must leave it as it is."""
    folder = tmp_path_factory.mktemp("served")
    (checkpoint := folder / "step-00000007").mkdir()
    torch.manual_seed(0)
    sizes = ModelConfig(vocab_size=demo.tokenizer.size, width=16, heads=2, layers=2, feed_forward=32)
    model = BabyBert(sizes)
    with torch.no_grad():
        model.embedding.token_embedding.embedding.weight[int(demo.tokenizer.id_of(DAMAGED))] = float("nan")
    save_model(checkpoint, model, demo.tokenizer)
    files = {name: {"sha256": sha256(checkpoint / name)} for name in MODEL_FILES}
    (checkpoint / "manifest.json").write_text(json.dumps({"step": 7, "files": files}))
    write_archive(checkpoint, folder / "model-store")
    yield from serving(folder, "model-store/babybert.mar")


def serving(folder: Path, *flags: str, environment: Mapping[str, str] | None = None) -> Iterator[Served]:
    """`babybert serve` in a folder, until it is no longer needed."""
    ports = free_ports(3)
    ports_flags = [
        f"--{name}-port={port}" for name, port in zip(("inference", "management", "metrics"), ports, strict=True)
    ]
    command, lines = [sys.executable, "-m", "babybert.cli", "serve", *ports_flags, *flags], []
    process = subprocess.Popen(
        command, cwd=folder, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
    )
    assert process.stderr
    for line in process.stderr:
        lines.append(line)
        if "POST" in line:
            break
    else:
        pytest.fail("".join(lines))
    threading.Thread(target=lines.extend, args=(process.stderr,), daemon=True).start()
    try:
        yield Served(process, folder, *ports, lines)
        if process.poll() is None:
            process.terminate()
            assert process.wait(60) == 0
    finally:
        process.kill()
