"""Each alert fires on what it is for and keeps quiet on what is near it (promtool), and says where its paragraph stands."""

import re
import subprocess

import pytest
import yaml
from deployment import ROOT, alerts, need

RULES = sorted((ROOT / "docker/prometheus/rules").glob("*.yaml"))
METRICS = (ROOT / "babybert/training/metrics.py").read_text() + (ROOT / "handler/metrics.yaml").read_text()
FROM_ELSEWHERE = {
    "up",
    "kube_job_failed",
    "kube_deployment_status_replicas_available",
}  # Prometheus itself, kube-state-metrics


@pytest.mark.parametrize("name", [path.stem for path in RULES])
def test_alerts_fire_and_keep_quiet(name):
    promtool = need("promtool", "on Debian: apt-get install prometheus")
    done = subprocess.run(
        [promtool, "test", "rules", ROOT / f"docker/prometheus/tests/{name}.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", [*RULES, ROOT / "docker/prometheus/prometheus.yml"], ids=lambda path: path.stem)
def test_prometheus_takes_it(path):
    promtool = need("promtool", "on Debian: apt-get install prometheus")
    kind = ["config", "--syntax-only"] if path.suffix == ".yml" else ["rules"]
    done = subprocess.run([promtool, "check", *kind, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_tested_both_ways():
    fires, quiet = set(), set()
    for path in (ROOT / "docker/prometheus/tests").glob("*.yaml"):
        for test in yaml.safe_load(path.read_text())["tests"]:
            for check in test["alert_rule_test"]:
                (fires if check["exp_alerts"] else quiet).add(check["alertname"])
    assert fires == quiet == {rule["alert"] for rule in alerts()}


def test_each_alert_has_a_paragraph():
    """Under a heading with its name: what it means and what to do."""
    text = (ROOT / "docs/operations.md").read_text()
    for rule in alerts():
        section = re.search(rf"^#+ {rule['alert']}\n+(.*?)(?=^#|\Z)", text, re.M | re.S)
        assert section, rule["alert"]
        assert len(section[1]) > 80, rule["alert"]
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_rules_ask_for_metrics_that_are_published():
    recorded = set()
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            recorded |= {rule["record"] for rule in group["rules"] if "record" in rule}
            for rule in group["rules"]:
                for name in set(
                    re.findall(
                        r"\b(?:babybert[\w:]*|ts_\w+|Requests\w+|kube_\w+|up)\b(?=[{\[ ]|$)",
                        re.sub(r'"[^"]*"', '""', rule["expr"]),
                    )
                ):
                    base = re.sub(r"_(total|sum|count|bucket)$", "", name)
                    assert (
                        name in FROM_ELSEWHERE | recorded
                        or f'"{base}"' in METRICS
                        or f"name: {name}," in METRICS
                        or f"name: {base}," in METRICS
                    ), name
