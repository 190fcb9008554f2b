"""One real TorchServe that the system tests share, and a client that sends any request, valid or not."""

import http.client
import json
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from processes import ChildProcess, start_babybert
from prometheus_client.parser import text_string_to_metric_families

from babybert.checkpoint.format import MODEL_FILES, save_model
from babybert.config import ModelConfig
from babybert.data.dataset import Dataset
from babybert.data.digest import sha256
from babybert.model.bert import BabyBert
from babybert.serving.archive import write_archive
from babybert.serving.torchserve import free_ports

DAMAGED = "goalkeeper"  # a word whose token embedding is NaN in the shared server's model
JSON = {"Content-Type": "application/json"}
Result = TypeVar("Result")


@dataclass(frozen=True)
class ServedResponse:
    """The response to one request; `body` is parsed JSON, the names of `headers` are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: Any


@dataclass(frozen=True)
class ServedModel:
    """A running `babybert serve`."""

    child: ChildProcess
    folder: Path
    inference_port: int
    management_port: int
    metrics_port: int

    @property
    def url(self) -> str:
        """Where requests go."""
        return f"http://127.0.0.1:{self.inference_port}/predictions/babybert"

    def ask(
        self,
        body: Any = None,
        headers: Mapping[str, str] = JSON,
        method: str = "POST",
        query: str = "",
        connection: http.client.HTTPConnection | None = None,
    ) -> ServedResponse:
        """The response to one request; `body` is sent as JSON unless it is bytes or None."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        client = connection or http.client.HTTPConnection("127.0.0.1", self.inference_port, timeout=60)
        client.request(method, f"/predictions/babybert{query}", data, dict(headers))
        response = client.getresponse()
        text = response.read()
        if connection is None:
            client.close()
        return ServedResponse(
            response.status,
            {name.lower(): value for name, value in response.getheaders()},
            json.loads(text, parse_constant=pytest.fail),
        )

    def archives(self) -> list[Path]:
        """The archives in the folder that it was started in."""
        return list((self.folder / "model-store").glob("*.mar"))

    def log_lines_with(self, word: str) -> str:
        """The lines on standard error that contain this word."""
        return "".join(line for line in self.child.lines if word in line)

    def models(self) -> list[dict[str, Any]]:
        """All versions of the model with their workers, from the management API."""
        address = f"http://127.0.0.1:{self.management_port}/models/babybert/all"
        with urllib.request.urlopen(address, timeout=10) as response:
            models: list[dict[str, Any]] = json.load(response)
        return models

    def model(self) -> dict[str, Any]:
        """The same for the only version."""
        (model,) = self.models()
        return model

    def worker_ids(self) -> list[int]:
        """The process ids of all workers of the only version."""
        return [int(worker["pid"]) for worker in self.model()["workers"]]

    def worker(self) -> int:
        """The process id of the only worker."""
        (worker,) = self.model()["workers"]
        assert worker["status"] == "READY"
        return int(worker["pid"])

    def samples(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """All samples at /metrics by name and labels, without the labels that TorchServe adds."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as response:
            families = list(text_string_to_metric_families(response.read().decode()))
        added_labels = {"ModelName", "Level", "Hostname"}
        samples = {}
        for family in families:
            for sample in family.samples:
                labels = frozenset(item for item in sample.labels.items() if item[0] not in added_labels)
                samples[sample.name, labels] = sample.value
        return samples

    def wait_for_metrics(self) -> None:
        """Wait until the metrics of all previous requests are there."""
        previous = -1.0
        while (current := self.value("babybert_inference_batch_requests_sum")) != previous:
            previous = current
            time.sleep(0.5)

    def value(self, name: str, **labels: str) -> float:
        """One sample; 0 if it does not exist yet."""
        return self.samples().get((name, frozenset(labels.items())), 0.0)


def wait_for(check: Callable[[], Result], seconds: float = 30) -> Result:
    """Call `check` until its result is true, and return that. Metrics, for example, arrive later than answers."""
    deadline = time.monotonic() + seconds
    while not (result := check()):
        assert time.monotonic() < deadline, f"it did not become true within {seconds:.0f} s"
        time.sleep(0.1)
    return result


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, demo: Dataset) -> Iterator[ServedModel]:
    """An untrained model with the demo's vocabulary behind `babybert serve`; the embedding of DAMAGED is NaN.

    Tests must leave it as it is.
    """
    folder = tmp_path_factory.mktemp("served")
    checkpoint = folder / "step-00000007"
    checkpoint.mkdir()
    torch.manual_seed(0)
    sizes = ModelConfig(vocab_size=demo.tokenizer.size, width=16, heads=2, layers=2, feed_forward=32)
    model = BabyBert(sizes)
    damaged_id = demo.tokenizer.id_of(DAMAGED)
    assert damaged_id is not None
    with torch.no_grad():
        model.embedding.token_embedding.embedding.weight[damaged_id] = float("nan")
    save_model(checkpoint, model, demo.tokenizer)
    files = {name: {"sha256": sha256(checkpoint / name)} for name in MODEL_FILES}
    (checkpoint / "manifest.json").write_text(json.dumps({"step": 7, "files": files}))
    write_archive(checkpoint, folder / "model-store")
    yield from serving(folder, "model-store/babybert.mar")


def serve_flags() -> tuple[list[int], list[str]]:
    """Free ports for inference, management and metrics, and the flags that set them."""
    ports = free_ports(3)
    names = ("inference", "management", "metrics")
    return ports, [f"--{name}-port={port}" for name, port in zip(names, ports, strict=True)]


def serving(folder: Path, *flags: str, environment: Mapping[str, str] | None = None) -> Iterator[ServedModel]:
    """`babybert serve` in a folder; it is ended when the generator is resumed."""
    ports, port_flags = serve_flags()
    child = start_babybert("serve", *port_flags, *flags, folder=folder, environment=environment)
    try:
        child.wait_for_line("POST")
        yield ServedModel(child, folder, *ports)
        if child.is_running:
            child.process.terminate()
            assert child.wait() == 0, child.output
    finally:
        child.kill()
