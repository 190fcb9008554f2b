"""Every query of both dashboards returns data from a real Prometheus that scrapes a real job and a real server.

With BABYBERT_PICTURES=FOLDER it collects data for longer and draws the panels of the dashboards (`make pictures`).
"""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deployment import ROOT, need
from processes import START_SECONDS, STOP_SECONDS
from served import wait_for

from babybert.checkpoint.format import find_checkpoint
from babybert.config import PrepareConfig, ServeConfig
from babybert.data.prepare import prepare
from babybert.serving.archive import write_archive
from babybert.serving.torchserve import TorchServe, free_ports

PICTURES = os.environ.get("BABYBERT_PICTURES")
WINDOW = "10s"
BOARDS = {
    path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "docker/grafana/dashboards").glob("*.json"))
}
QUERIES = [
    (board, panel["title"], target["expr"])
    for board, content in BOARDS.items()
    for panel in content["panels"]
    for target in panel["targets"]
]
REQUESTS = (
    {"text": "The sheriff rides with a revolver near the [MASK].", "top_k": 3},
    {"sentence_a": "Mary is superb as the pilot.", "sentence_b": "She launches near the planet with a laser."},
    {"text": "no mask"},
)


def fill_variables(query: str) -> str:
    """The query as Grafana sends it."""
    return query.replace("$__rate_interval", WINDOW).replace("$instance", ".*")


class Prometheus:
    """A Prometheus that scrapes a training job and a server every second, with the project's rules."""

    def __init__(self, folder: Path, program: str, training_port: int, serving_port: int) -> None:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        targets = {"babybert-pretrain": training_port, "babybert-serve": serving_port}
        scrapes = [
            {"job_name": name, "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}
            for name, target in targets.items()
        ]
        rules = [str(ROOT / "docker/prometheus/rules/*.yaml")]
        settings = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": rules,
            "scrape_configs": scrapes,
        }
        (folder / "prometheus.yml").write_text(json.dumps(settings))
        command = [
            program,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def values(self, query: str) -> list[float]:
        """The finite values that an instant query returns."""
        try:
            with urllib.request.urlopen(
                f"{self.url}/api/v1/query?query={urllib.parse.quote(query)}", timeout=5
            ) as answer:
                values = [float(series["value"][1]) for series in json.load(answer)["data"]["result"]]
        except OSError:
            return []
        return list(filter(math.isfinite, values))


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory, s3_endpoint: str) -> Iterator[Prometheus]:
    """A Prometheus while a job trains with a store, and a server of an early checkpoint answers requests."""
    program = need("prometheus", "on Debian: apt-get install prometheus")
    folder = tmp_path_factory.mktemp("dashboards")
    prepare(PrepareConfig(out=folder / "data", demo_documents=2000 if PICTURES else 80))
    metrics_port, inference_port, management_port, serving_port = free_ports(4)
    job = start_training(folder, s3_endpoint, metrics_port)
    processes = [job]
    stop = threading.Event()
    try:
        wait_for(lambda: has_checkpoint(folder, job), START_SECONDS)
        archive = write_archive(find_checkpoint(folder / "run"), folder)
        config = ServeConfig(inference_port=inference_port, management_port=management_port, metrics_port=serving_port)
        with TorchServe(config, archive) as server:
            client = threading.Thread(target=send_requests, args=(server.predictions_url, stop))
            client.start()
            started = Prometheus(folder, program, metrics_port, serving_port)
            processes.append(started.process)
            yield started
            stop.set()
            client.join()
    finally:
        stop.set()
        for process in processes:
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(STOP_SECONDS) for process in processes]
    assert codes[0] == 143


def start_training(folder: Path, s3_endpoint: str, metrics_port: int) -> "subprocess.Popen[bytes]":
    """A training job with metrics and a store, which runs until it is stopped."""
    import boto3
    from conftest import aws_variables

    keys = {"aws_access_key_id": "test-key", "aws_secret_access_key": "test-secret", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=s3_endpoint, **keys).create_bucket(Bucket="dashboards")
    if PICTURES:
        length = ["--epochs=100", "--schedule=constant", "--checkpoint-every=200"]
    else:
        length = ["--epochs=100000", "--checkpoint-every=20"]
    flags = [
        f"--data={folder / 'data'}",
        f"--out={folder / 'run'}",
        "--device=cpu",
        "--preset=tiny",
        "--log-every=5",
        f"--metrics-port={metrics_port}",
        "--store=s3://dashboards/run",
        "--max-minutes=15",
        *length,
    ]
    environment = {**os.environ, **aws_variables(s3_endpoint), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "babybert.cli", "pretrain", *flags]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


def has_checkpoint(folder: Path, job: "subprocess.Popen[bytes]") -> bool:
    """Whether the job has saved a checkpoint; fails if it has ended."""
    assert job.poll() is None
    return any((folder / "run").glob("step-*"))


def send_requests(url: str, stop: threading.Event) -> None:
    """Send requests of both tasks, and an invalid one, in turn until `stop` is set."""
    for request in itertools.cycle(REQUESTS):
        if stop.wait(0.1):
            return
        body = json.dumps(request).encode()
        post = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            urllib.request.urlopen(post, timeout=10).read()
        except OSError:
            continue


def needs_gpu(query: str) -> bool:
    """Whether the query has no data on a machine without a GPU."""
    return "babybert_gpu_" in query


def test_every_query_returns_data(prometheus: Prometheus) -> None:
    import torch

    missing = {query for *_, query in QUERIES if torch.cuda.is_available() or not needs_gpu(query)}
    deadline = time.monotonic() + 90
    while missing and time.monotonic() < deadline:
        missing = {query for query in missing if not prometheus.values(fill_variables(query))}
        time.sleep(0.5)
    assert not missing
    assert len(QUERIES) > 40
    assert prometheus.values('sum(up{job=~"babybert-.*"})') == [2]


def test_a_query_for_an_unknown_metric_returns_nothing(prometheus: Prometheus) -> None:
    assert prometheus.values(fill_variables('babybert_pretrain_los{instance=~"$instance"}')) == []


def test_no_alert_fires(prometheus: Prometheus) -> None:
    """The run and the server are healthy."""
    assert prometheus.values('count(ALERTS{alertstate="firing"})') == []
    assert prometheus.values("babybert_queue_seconds"), "the rules are not evaluated"


@pytest.mark.skipif(not PICTURES, reason="for `make pictures`")
def test_draw(prometheus: Prometheus) -> None:
    assert PICTURES
    start = time.time()
    time.sleep(float(os.environ.get("BABYBERT_PICTURES_SECONDS", "180")))
    for name, board in BOARDS.items():
        draw_dashboard(prometheus, board, start, time.time(), Path(PICTURES) / f"dashboard-{name}.png")


def draw_dashboard(prometheus: Prometheus, board: dict[str, Any], start: float, end: float, path: Path) -> None:
    """Draw the panels of a dashboard that have data without a GPU."""
    from matplotlib.figure import Figure

    panels = [panel for panel in board["panels"] if not any(needs_gpu(target["expr"]) for target in panel["targets"])]
    columns = 4
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.3 * rows), layout="constrained")
    for index, panel in enumerate(panels, start=1):
        draw_panel(prometheus, panel, start, end, figure.add_subplot(rows, columns, index))
    figure.supxlabel("seconds", fontsize=8)
    figure.savefig(path, dpi=90)


def draw_panel(prometheus: Prometheus, panel: dict[str, Any], start: float, end: float, axes: Any) -> None:
    """Draw all series of one panel over time."""
    units = {"s": " (s)", "percentunit": " (share)", "bytes": " (bytes)", "reqps": " (1/s)"}
    axes.set_title(panel["title"] + units.get(panel["fieldConfig"]["defaults"]["unit"], ""), fontsize=8)
    axes.tick_params(labelsize=7)
    for target in panel["targets"]:
        settings = {"query": fill_variables(target["expr"]), "start": start, "end": end, "step": 2}
        address = f"{prometheus.url}/api/v1/query_range?{urllib.parse.urlencode(settings)}"
        with urllib.request.urlopen(address, timeout=30) as answer:
            all_series = json.load(answer)["data"]["result"]
        for series in all_series:
            label = target["legendFormat"]
            for name, value in series["metric"].items():
                label = label.replace("{{" + name + "}}", value)
            times = [float(at) - start for at, _ in series["values"]]
            values = [float(value) for _, value in series["values"]]
            axes.plot(times, values, label=label or None)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=6)
