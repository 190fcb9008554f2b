"""A real Prometheus scrapes a real run, and a real Pushgateway keeps its last values."""

import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest

from babybert.serving.torchserve import free_ports

RUN = ["pretrain", "--preset=tiny", "--width=16", "--batch-size=16", "--device=cpu", "--log-every=5"]


def need(program):
    found = shutil.which(program)
    if not found:
        pytest.skip(f"{program} is not installed; on Debian: apt-get install {program}")
    return found


def get(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, ConnectionError):
        return ""


def wait_for(check, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.2)
    return found


def test_prometheus_scrapes_a_run(demo_folder, tmp_path):
    program = need("prometheus")
    metrics, web = free_ports(2)
    (tmp_path / "prometheus.yml").write_text(
        f"global: {{scrape_interval: 1s}}\nscrape_configs: [{{job_name: pretrain, static_configs: [{{targets: ['127.0.0.1:{metrics}']}}]}}]\n"
    )
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

    def value(query):
        answer = get(f"http://127.0.0.1:{web}/api/v1/query?query={urllib.parse.quote(query)}")
        result = json.loads(answer)["data"]["result"] if answer else []
        return float(result[0]["value"][1]) if result else None

    try:
        wait_for(lambda: value("babybert_pretrain_pairs_total") and value("babybert_checkpoint_saves_total"))
        assert value('up{job="pretrain"}') == 1
        assert wait_for(lambda: value("rate(babybert_pretrain_pairs_total[10s])")) > 0
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
        assert value("histogram_quantile(0.5, babybert_pretrain_step_seconds_bucket)") < 1
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(60) for process in processes]
    assert codes[0] == 143


def test_the_end_of_a_short_job_is_not_lost(demo_folder, tmp_path):
    program = need("prometheus-pushgateway")
    (port,) = free_ports(1)
    gateway = subprocess.Popen(
        [program, f"--web.listen-address=127.0.0.1:{port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: get(f"http://127.0.0.1:{port}/-/ready"))
        command = [
            sys.executable,
            "-m",
            "babybert.cli",
            *RUN,
            f"--data={demo_folder}",
            f"--out={tmp_path / 'short'}",
            "--epochs=1",
            "--no-metrics",
        ]
        subprocess.run([*command, f"--pushgateway=127.0.0.1:{port}"], check=True, capture_output=True)
        text = get(f"http://127.0.0.1:{port}/metrics")
        (line,) = [line for line in text.splitlines() if line.startswith("babybert_pretrain_progress_ratio")]
        assert 'run="short"' in line
        assert line.endswith(" 1")
    finally:
        gateway.kill()
        gateway.wait()
