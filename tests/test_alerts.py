"""Each alert fires on its problem and stays silent in similar situations (promtool), and names its runbook section."""

import re
from pathlib import Path

import pytest
import yaml
from deployment import OVERLAYS, ROOT, alerts, need, only, pod_templates, rendered, run_program, written

from babybert.training.metrics import RunMetrics

RULES = sorted((ROOT / "docker/prometheus/rules").glob("*.yaml"))
RULE_TESTS = sorted((ROOT / "docker/prometheus/tests").glob("*.yaml"))
# Published by Prometheus itself and by kube-state-metrics.
EXTERNAL_METRICS = {"up", "kube_job_failed", "kube_job_owner", "kube_deployment_status_replicas_available"}
METRIC_NAME = re.compile(r"\b(?:babybert[\w:]*|ts_\w+|Requests\w+|kube_\w+|up)\b(?=[{\[ ]|$)")


@pytest.mark.slow
@pytest.mark.parametrize("path", RULE_TESTS, ids=lambda path: path.stem)
def test_alerts_fire_and_stay_silent(path: Path) -> None:
    """Each alert for itself, and whole lives of a system, in which a healthy one has no alert at any time."""
    promtool = need("promtool", "on Debian: apt-get install prometheus")
    done = run_program(promtool, "test", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", [*RULES, ROOT / "docker/prometheus/prometheus.yml"], ids=lambda path: path.stem)
def test_prometheus_accepts_the_configuration(path: Path) -> None:
    promtool = need("promtool", "on Debian: apt-get install prometheus")
    kind = ["config", "--syntax-only"] if path.suffix == ".yml" else ["rules"]
    done = run_program(promtool, "check", *kind, path)
    assert done.returncode == 0, done.stdout + done.stderr


def is_target(pod: dict[str, str]) -> bool:
    """Whether the PodMonitor's relabelings keep a pod with these labels of Prometheus' service discovery."""
    endpoint = only(written("monitoring.yaml"), "PodMonitor")["spec"]["podMetricsEndpoints"][0]
    for rule in endpoint["relabelings"]:
        (label,) = rule["sourceLabels"]
        matches = re.fullmatch(rule["regex"], pod.get(label, "")) is not None
        if matches != {"keep": True, "drop": False}[rule["action"]]:
            return False
    return True


def test_only_a_process_that_should_answer_is_a_target() -> None:
    """Otherwise BabyBertTrainingDown would fire for a run that prepares, loads or has ended."""
    ready, index = (
        "__meta_kubernetes_pod_ready",
        "__meta_kubernetes_pod_label_batch_kubernetes_io_job_completion_index",
    )
    assert is_target({ready: "true"})
    assert not is_target({ready: "false"})  # the init container, or the startup probe has not passed
    assert is_target({ready: "true", index: "0"})  # rank 0 of a JobSet runs there
    for node in ("1", "10"):
        assert not is_target({ready: "true", index: node})
    for overlay in OVERLAYS:
        for name, template in pod_templates(rendered(overlay)).items():
            if name.endswith("babybert-pretrain"):
                (container,) = template["spec"]["containers"]
                assert "startupProbe" in container, overlay  # without it, a pod is ready while it loads
                assert "readinessProbe" not in container, overlay  # with it, a pod that hangs would be no target
    scrapes = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())["scrape_configs"]
    (training,) = [scrape for scrape in scrapes if scrape["job_name"] == "babybert-pretrain"]
    assert "static_configs" not in training
    assert training["dns_sd_configs"][0]["names"] == ["pretrain"]


def test_each_alert_is_tested_both_ways() -> None:
    fires: set[str] = set()
    silent: set[str] = set()
    for path in RULE_TESTS:
        for test in yaml.safe_load(path.read_text())["tests"]:
            for check in test.get("alert_rule_test", []):
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
