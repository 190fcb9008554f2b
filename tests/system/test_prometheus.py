"""A real Prometheus scrapes a real training run, and a real Pushgateway keeps its last values."""

import json
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from processes import STOP_SECONDS, babybert_output
from served import wait_for

from babybert.serving.torchserve import free_ports

RUN = ["pretrain", "--preset=tiny", "--width=16", "--batch-size=16", "--device=cpu", "--log-every=5"]


def need(program: str) -> str:
    """The path of a program; without it the test is skipped."""
    path = shutil.which(program)
    if not path:
        pytest.skip(f"{program} is not installed; on Debian: apt-get install {program}")
    return path


def get(url: str) -> str:
    """The text at an address, or "" without an answer."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            text: str = answer.read().decode()
            return text
    except (urllib.error.URLError, ConnectionError):
        return ""


def test_prometheus_scrapes_a_run(demo_folder: Path, tmp_path: Path) -> None:
    program = need("prometheus")
    metrics, web = free_ports(2)
    scrape = {"job_name": "pretrain", "static_configs": [{"targets": [f"127.0.0.1:{metrics}"]}]}
    settings = {"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]}
    (tmp_path / "prometheus.yml").write_text(json.dumps(settings))
    run = [
        sys.executable,
        "-m",
        "babybert.cli",
        *RUN,
        f"--data={demo_folder}",
        f"--out={tmp_path / 'run'}",
        "--epochs=100000",
        f"--metrics-port={metrics}",
    ]
    server = [
        program,
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{web}",
    ]
    processes = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for command in (run, server)
    ]

    def value(query: str) -> float | None:
        answer = get(f"http://127.0.0.1:{web}/api/v1/query?query={urllib.parse.quote(query)}")
        result = json.loads(answer)["data"]["result"] if answer else []
        return float(result[0]["value"][1]) if result else None

    try:
        wait_for(lambda: value("babybert_pretrain_pairs_total") and value("babybert_checkpoint_saves_total"), 60)
        assert value('up{job="pretrain"}') == 1
        assert wait_for(lambda: (value("rate(babybert_pretrain_pairs_total[10s])") or 0) > 0, 60)
        for query in (
            'babybert_pretrain_loss{objective="mlm",split="train"}',
            'babybert_pretrain_loss{objective="nsp",split="validation"}',
            'babybert_pretrain_mlm_accuracy{top="5"}',
            "babybert_pretrain_tokens_total",
            "babybert_pretrain_masked_tokens_total",
            "babybert_pretrain_step_seconds_count",
            "babybert_pretrain_data_wait_seconds_count",
            "babybert_pretrain_learning_rate",
            "babybert_pretrain_gradient_norm",
            "babybert_pretrain_left_seconds",
            "babybert_checkpoint_bytes_total",
            "babybert_checkpoint_age_seconds",
        ):
            assert (value(query) or 0) > 0, query
        for query in (
            "babybert_pretrain_restarts",
            "babybert_checkpoint_fallbacks_total",
            "babybert_checkpoint_failures_total",
        ):
            assert value(query) == 0, query
        median = value("histogram_quantile(0.5, babybert_pretrain_step_seconds_bucket)")
        assert median is not None
        assert median < 1
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(STOP_SECONDS) for process in processes]
    assert codes[0] == 143


def test_the_last_values_of_a_short_job_are_pushed(demo_folder: Path, tmp_path: Path) -> None:
    program = need("prometheus-pushgateway")
    (port,) = free_ports(1)
    gateway = subprocess.Popen(
        [program, f"--web.listen-address=127.0.0.1:{port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: get(f"http://127.0.0.1:{port}/-/ready"), 60)
        flags = ["--epochs=1", "--no-metrics", f"--pushgateway=127.0.0.1:{port}"]
        babybert_output(*RUN, f"--data={demo_folder}", f"--out={tmp_path / 'short'}", *flags)
        text = get(f"http://127.0.0.1:{port}/metrics")
        (line,) = [line for line in text.splitlines() if line.startswith("babybert_pretrain_progress_ratio")]
        assert 'run="short"' in line
        assert line.endswith(" 1")
    finally:
        gateway.kill()
        gateway.wait(STOP_SECONDS)
