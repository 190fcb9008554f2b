"""A real Prometheus scrapes a real TorchServe: what it has of each metric equals what was sent."""

import json
import subprocess
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml
from served import wait_for
from test_prometheus import get, need

from babybert.serving.torchserve import free_ports

HANDLER = Path(__file__).parents[2] / "handler"
PAIR = {"sentence_a": "a", "sentence_b": "b"}
ASKED = [
    {"text": "[MASK]"},  # 3 tokens
    {"text": ["[MASK] [MASK]", "the [MASK]"]},  # 4 and 4
    {"inputs": ["[MASK]"] * 3},  # 3 x 3
    PAIR,  # 5
    {"pairs": [PAIR, PAIR]},  # 2 x 5
    {"x": 1},
    {"text": "[MASK]" + " the" * 600},  # too long: read, but not by the model
]
# What ASKED moves, as PromQL and as a number.
MOVED = {
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


def declared():
    return {
        metric["name"]: metric
        for metrics in yaml.safe_load((HANDLER / "metrics.yaml").read_text())["model_metrics"].values()
        for metric in metrics
    }


def test_every_metric_is_declared_and_documented():
    page = (Path(__file__).parents[2] / "docs/api.md").read_text()
    source = (HANDLER / "babybert_handler.py").read_text()
    ours = [name for name in declared() if name.startswith("babybert_")]
    assert len(ours) == 9
    for name in ours:
        assert f"`{name}" in page, name
        assert f'"{name}": (' in source, name


def test_prometheus_has_what_was_sent(server, tmp_path):
    program = need("prometheus")
    (web,) = free_ports(1)
    (tmp_path / "prometheus.yml").write_text(
        f"global: {{scrape_interval: 1s}}\nscrape_configs: [{{job_name: serving, static_configs: [{{targets: ['127.0.0.1:{server.metrics_port}']}}]}}]\n"
    )
    command = [
        program,
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{web}",
    ]
    prometheus = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def result(query):
        answer = get(f"http://127.0.0.1:{web}/api/v1/query?query={urllib.parse.quote(query)}")
        return json.loads(answer)["data"]["result"] if answer else []

    def value(query):
        found = result(query)
        return float(found[0]["value"][1]) if found else 0.0

    try:
        server.settled()
        before = {
            query: server.value(name, **labels) for query, (name, labels) in ((query, sample(query)) for query in MOVED)
        }
        batches = server.value("babybert_inference_batch_requests_count")
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(server.ask, ASKED))
        assert [answer.status for answer in answers] == [200] * 5 + [400] * 2
        for query, moved in MOVED.items():
            wait_for(lambda query=query, moved=moved: value(query) == before[query] + moved)
        # Every batch is in the histograms once; a batch of which nothing was read has no phases.
        count = value("babybert_inference_batch_requests_count")
        assert 1 <= count - batches <= 7
        assert value("babybert_inference_batch_seconds_count") == count
        seconds = value("babybert_inference_batch_seconds_sum")
        phases = [
            value(f'babybert_inference_phase_seconds_sum{{phase="{phase}"}}')
            for phase in ("tokenize", "forward", "answer")
        ]
        assert all(0 < phase < seconds for phase in phases)
        assert sum(phases) <= seconds
        assert 0 < value("babybert_model_load_seconds") < 60
        (info,) = result("babybert_model_info")
        assert info["value"][1] == "1"
        headers = answers[0].headers
        assert (info["metric"]["version"], info["metric"]["step"]) == (
            headers["x-babybert-version"],
            headers["x-babybert-step"],
        )
        assert len(info["metric"]["digest"]) == 64
    finally:
        prometheus.terminate()
        prometheus.wait(60)


def sample(query):
    """A PromQL selector's name and labels."""
    name, _, labels = query.partition("{")
    return name, dict(part.split("=") for part in labels.rstrip("}").replace('"', "").split(",") if part)
