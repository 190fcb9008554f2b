"""Each alert fires on its problem and stays silent in similar situations (promtool), and names its runbook section."""

import re
from pathlib import Path

import pytest
import yaml
from deployment import ROOT, alerts, need, run_program

from babybert.training.metrics import RunMetrics

RULES = sorted((ROOT / "docker/prometheus/rules").glob("*.yaml"))
# Published by Prometheus itself and by kube-state-metrics.
EXTERNAL_METRICS = {"up", "kube_job_failed", "kube_deployment_status_replicas_available"}
METRIC_NAME = re.compile(r"\b(?:babybert[\w:]*|ts_\w+|Requests\w+|kube_\w+|up)\b(?=[{\[ ]|$)")


@pytest.mark.parametrize("name", [path.stem for path in RULES])
@pytest.mark.slow
def test_alerts_fire_and_stay_silent(name: str) -> None:
    promtool = need("promtool", "on Debian: apt-get install prometheus")
    done = run_program(promtool, "test", "rules", ROOT / f"docker/prometheus/tests/{name}.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", [*RULES, ROOT / "docker/prometheus/prometheus.yml"], ids=lambda path: path.stem)
def test_prometheus_accepts_the_configuration(path: Path) -> None:
    promtool = need("promtool", "on Debian: apt-get install prometheus")
    kind = ["config", "--syntax-only"] if path.suffix == ".yml" else ["rules"]
    done = run_program(promtool, "check", *kind, path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_tested_both_ways() -> None:
    fires: set[str] = set()
    silent: set[str] = set()
    for path in (ROOT / "docker/prometheus/tests").glob("*.yaml"):
        for test in yaml.safe_load(path.read_text())["tests"]:
            for check in test["alert_rule_test"]:
                (fires if check["exp_alerts"] else silent).add(check["alertname"])
    assert fires == silent == {rule["alert"] for rule in alerts()}


def test_each_alert_has_a_runbook_section() -> None:
    """The section has the name of the alert: what it means and what to do."""
    text = (ROOT / "docs/operations.md").read_text()
    for rule in alerts():
        section = re.search(rf"^#+ {rule['alert']}\n+(.*?)(?=^#|\Z)", text, re.M | re.S)
        assert section, rule["alert"]
        assert len(section[1]) > 80, rule["alert"]
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_rules_use_metrics_that_are_published() -> None:
    recorded: set[str] = set()
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            recorded |= {rule["record"] for rule in group["rules"] if "record" in rule}
            for rule in group["rules"]:
                expression = re.sub(r'"[^"]*"', '""', rule["expr"])
                for name in METRIC_NAME.findall(expression):
                    assert name in EXTERNAL_METRICS | recorded or is_published(name), name


def is_published(name: str) -> bool:
    """Whether the training job or the handler declares this metric."""
    base = re.sub(r"_(total|sum|count|bucket)$", "", name)
    declared = {family.name for family in RunMetrics().registry.collect()}
    handler = yaml.safe_load((ROOT / "handler/metrics.yaml").read_text(encoding="utf-8"))
    for kind in ("ts_metrics", "model_metrics"):
        for metrics in handler[kind].values():
            declared |= {metric["name"] for metric in metrics}
    return bool({name, base} & declared)
