"""A real Prometheus scrapes a real TorchServe: each metric has the value that the requests imply."""

import json
import subprocess
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from processes import STOP_SECONDS
from served import ServedModel, wait_for
from test_prometheus import get, need

from babybert.serving.torchserve import free_ports

HANDLER = Path(__file__).parents[2] / "handler"
PAIR = {"sentence_a": "a", "sentence_b": "b"}
REQUESTS: list[dict[str, Any]] = [
    {"text": "[MASK]"},  # 3 tokens
    {"text": ["[MASK] [MASK]", "the [MASK]"]},  # 4 and 4
    {"inputs": ["[MASK]"] * 3},  # 3 x 3
    PAIR,  # 5
    {"pairs": [PAIR, PAIR]},  # 2 x 5
    {"x": 1},
    {"text": "[MASK]" + " the" * 600},  # too long: tokenized, but not read by the model
]
# By how much REQUESTS change each sample, by its selector in PromQL.
CHANGES = {
    'babybert_inference_requests_total{task="fill-mask",outcome="ok"}': 3,
    'babybert_inference_requests_total{task="fill-mask",outcome="bad_request"}': 1,
    'babybert_inference_requests_total{task="next-sentence",outcome="ok"}': 2,
    'babybert_inference_requests_total{task="unknown",outcome="bad_request"}': 1,
    'babybert_inference_items_total{task="fill-mask"}': 7,
    'babybert_inference_items_total{task="next-sentence"}': 3,
    "babybert_inference_masks_total": 7,
    "babybert_inference_tokens_total": 35,
    "babybert_inference_batch_requests_sum": 7,
}


def declared_metrics() -> list[str]:
    """The names of our metrics in handler/metrics.yaml."""
    metrics_by_type = yaml.safe_load((HANDLER / "metrics.yaml").read_text())["model_metrics"]
    names = [metric["name"] for metrics in metrics_by_type.values() for metric in metrics]
    return [name for name in names if name.startswith("babybert_")]


def test_every_metric_is_declared_and_documented() -> None:
    page = (Path(__file__).parents[2] / "docs/api.md").read_text()
    source = (HANDLER / "babybert_handler.py").read_text()
    names = declared_metrics()
    assert len(names) == 9
    for name in names:
        assert f"`{name}" in page, name
        assert f'"{name}": (' in source, name


def test_prometheus_has_the_values_of_the_requests(server: ServedModel, tmp_path: Path) -> None:
    program = need("prometheus")
    (web,) = free_ports(1)
    scrape = {"job_name": "serving", "static_configs": [{"targets": [f"127.0.0.1:{server.metrics_port}"]}]}
    settings = {"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]}
    (tmp_path / "prometheus.yml").write_text(json.dumps(settings))
    command = [
        program,
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{web}",
    ]
    prometheus = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def query(selector: str) -> list[dict[str, Any]]:
        answer = get(f"http://127.0.0.1:{web}/api/v1/query?query={urllib.parse.quote(selector)}")
        result: list[dict[str, Any]] = json.loads(answer)["data"]["result"] if answer else []
        return result

    def value(selector: str) -> float:
        result = query(selector)
        return float(result[0]["value"][1]) if result else 0.0

    try:
        server.wait_for_metrics()
        before = {selector: served_value(server, selector) for selector in CHANGES}
        batches_before = server.value("babybert_inference_batch_requests_count")
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(server.ask, REQUESTS))
        assert [answer.status for answer in answers] == [200] * 5 + [400] * 2
        for selector, change in CHANGES.items():
            expected = before[selector] + change
            wait_for(lambda selector=selector, expected=expected: value(selector) == expected)  # type: ignore[misc]
        # Each batch is counted once in the histograms; a batch without a valid item has no phases.
        batches = value("babybert_inference_batch_requests_count")
        assert 1 <= batches - batches_before <= 7
        assert value("babybert_inference_batch_seconds_count") == batches
        seconds = value("babybert_inference_batch_seconds_sum")
        phases = [
            value(f'babybert_inference_phase_seconds_sum{{phase="{phase}"}}')
            for phase in ("tokenize", "forward", "answer")
        ]
        assert all(0 < phase < seconds for phase in phases)
        assert sum(phases) <= seconds
        assert 0 < value("babybert_model_load_seconds") < 60
        (info,) = query("babybert_model_info")
        assert info["value"][1] == "1"
        assert info["metric"]["version"] == answers[0].headers["x-babybert-version"]
        assert info["metric"]["step"] == answers[0].headers["x-babybert-step"]
        assert len(info["metric"]["digest"]) == 64
    finally:
        prometheus.terminate()
        prometheus.wait(STOP_SECONDS)


def served_value(server: ServedModel, selector: str) -> float:
    """The value that the server itself has for a PromQL selector."""
    name, _, labels = selector.partition("{")
    pairs = [label.split("=") for label in labels.rstrip("}").replace('"', "").split(",") if label]
    return server.value(name, **dict(pairs))
