"""Every query of both dashboards, asked of a real Prometheus that scrapes a real job and a real server, returns data.

With BABYBERT_PICTURES=FOLDER it looks on for longer, and draws what the dashboards would show (`make pictures`).
"""

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
from pathlib import Path

import pytest
from deployment import ROOT, need

from babybert.checkpoint.format import find_checkpoint
from babybert.config import PrepareConfig, ServeConfig
from babybert.data.prepare import prepare
from babybert.serving.archive import write_archive
from babybert.serving.torchserve import Server, free_ports

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
QUESTIONS = (
    {"text": "The sheriff rides with a revolver near the [MASK].", "top_k": 3},
    {"sentence_a": "Mary is superb as the pilot.", "sentence_b": "She launches near the planet with a laser."},
    {"text": "no mask"},
)


def filled(query):
    """The query as Grafana sends it."""
    return query.replace("$__rate_interval", WINDOW).replace("$instance", ".*")


class Prometheus:
    """A Prometheus that scrapes both every second, with the project's own rules."""

    def __init__(self, folder, program, training, serving):
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        targets = {"babybert-pretrain": training, "babybert-serve": serving}
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

    def numbers(self, query):
        """What an instant query returns, numbers that are none left out."""
        try:
            with urllib.request.urlopen(
                f"{self.url}/api/v1/query?query={urllib.parse.quote(query)}", timeout=5
            ) as answer:
                found = [float(series["value"][1]) for series in json.load(answer)["data"]["result"]]
        except OSError:
            return []
        return [number for number in found if math.isfinite(number)]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory, s3_endpoint):
    """While a job trains with a store, and a server is asked of what the job has learned so far."""
    import boto3
    from conftest import aws_variables

    program, folder = need("prometheus", "on Debian: apt-get install prometheus"), tmp_path_factory.mktemp("dashboards")
    prepare(PrepareConfig(out=folder / "data", demo_documents=2000 if PICTURES else 80))
    metrics, inference, management, serving = free_ports(4)
    keys = {"aws_access_key_id": "test-key", "aws_secret_access_key": "test-secret", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=s3_endpoint, **keys).create_bucket(Bucket="dashboards")
    environment = {**os.environ, **aws_variables(s3_endpoint), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "babybert.cli",
        "pretrain",
        f"--data={folder / 'data'}",
        f"--out={folder / 'run'}",
        "--device=cpu",
    ]
    flags = [
        "--preset=tiny",
        "--log-every=5",
        f"--metrics-port={metrics}",
        "--store=s3://dashboards/run",
        "--max-minutes=15",
    ]
    flags += (
        ["--epochs=100", "--schedule=constant", "--checkpoint-every=200"]
        if PICTURES
        else ["--epochs=100000", "--checkpoint-every=20"]
    )
    processes, stop = (
        [subprocess.Popen([*command, *flags], env=environment, stderr=subprocess.DEVNULL)],
        threading.Event(),
    )
    try:
        deadline = time.monotonic() + 120
        while not list((folder / "run").glob("step-*")):
            assert processes[0].poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        archive = write_archive(find_checkpoint(folder / "run"), folder)
        with Server(
            ServeConfig(inference_port=inference, management_port=management, metrics_port=serving), archive
        ) as server:
            asking = threading.Thread(target=ask, args=(server.predictions_url, stop))
            asking.start()
            found = Prometheus(folder, program, metrics, serving)
            processes.append(found.process)
            yield found
            stop.set()
            asking.join()
    finally:
        stop.set()
        for process in processes:
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(60) for process in processes]
    assert codes[0] == 143


def ask(url, stop):
    """Questions of both kinds, and one that cannot be answered, until told to stop."""
    number = 0
    while not stop.wait(0.1):
        request = urllib.request.Request(
            url, json.dumps(QUESTIONS[number % 3]).encode(), {"Content-Type": "application/json"}
        )
        number += 1
        try:
            urllib.request.urlopen(request, timeout=10).read()
        except OSError:
            continue


def of_a_gpu(query):
    """Whether there is nothing to show without one."""
    return "babybert_gpu_" in query


def test_every_query_returns_data(prometheus):
    import torch

    missing = {query for *_, query in QUERIES if torch.cuda.is_available() or not of_a_gpu(query)}
    deadline = time.monotonic() + 90
    while missing and time.monotonic() < deadline:
        missing = {query for query in missing if not prometheus.numbers(filled(query))}
        time.sleep(0.5)
    assert not missing
    assert len(QUERIES) > 40
    assert prometheus.numbers('sum(up{job=~"babybert-.*"})') == [2]


def test_a_query_that_asks_for_nothing_is_seen(prometheus):
    assert prometheus.numbers(filled('babybert_pretrain_los{instance=~"$instance"}')) == []


def test_no_alert_fires(prometheus):
    """On a run and a server that are well."""
    assert prometheus.numbers('count(ALERTS{alertstate="firing"})') == []
    assert prometheus.numbers("babybert_queue_seconds"), "the rules are evaluated"


@pytest.mark.skipif(not PICTURES, reason="for `make pictures`")
def test_draw(prometheus):
    start = time.time()
    time.sleep(float(os.environ.get("BABYBERT_PICTURES_SECONDS", "180")))
    for name, board in BOARDS.items():
        draw(prometheus, board, start, time.time(), Path(PICTURES) / f"dashboard-{name}.png")


def draw(prometheus, board, start, end, path):
    """The board's panels that have data, each with its series over time."""
    from matplotlib.figure import Figure

    panels = [panel for panel in board["panels"] if not any(of_a_gpu(target["expr"]) for target in panel["targets"])]
    columns, rows = 4, math.ceil(len(panels) / 4)
    figure = Figure(figsize=(4.2 * columns, 2.3 * rows), layout="constrained")
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, place)
        unit = {"s": " (s)", "percentunit": " (share)", "bytes": " (bytes)", "reqps": " (1/s)"}.get(
            panel["fieldConfig"]["defaults"]["unit"], ""
        )
        axes.set_title(panel["title"] + unit, fontsize=8)
        axes.tick_params(labelsize=7)
        for target in panel["targets"]:
            parameters = urllib.parse.urlencode(
                {"query": filled(target["expr"]), "start": start, "end": end, "step": 2}
            )
            with urllib.request.urlopen(f"{prometheus.url}/api/v1/query_range?{parameters}", timeout=30) as answer:
                for series in json.load(answer)["data"]["result"]:
                    label = target["legendFormat"]
                    for name, value in series["metric"].items():
                        label = label.replace("{{" + name + "}}", value)
                    axes.plot(
                        [float(at) - start for at, _ in series["values"]],
                        [float(value) for _, value in series["values"]],
                        label=label or None,
                    )
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=6)
    figure.supxlabel("seconds", fontsize=8)
    figure.savefig(path, dpi=90)
