"""Write monitoring.yaml from the alerts and dashboards in docker/: `make monitoring`. A test checks that it is current.

The file is for `kubectl apply` in a cluster with the Prometheus operator, which reads PodMonitor, ServiceMonitor and
PrometheusRule, and with a Grafana whose sidecar loads ConfigMaps that have the label `grafana_dashboard`.
"""

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
RULES, DASHBOARDS = ROOT / "docker/prometheus/rules", ROOT / "docker/grafana/dashboards"
OUT = ROOT / "k8s/monitoring.yaml"
HEAD = """\
# Written by k8s/render_monitoring.py (`make monitoring`) from docker/prometheus/rules and docker/grafana/dashboards.
# Needs the Prometheus operator. If yours selects resources by a label (`release: ...`), add that label.
"""


class Block(str):
    """A text that is written as a YAML block, line by line."""


def _block(dumper: yaml.SafeDumper, text: Block) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style="|")


yaml.SafeDumper.add_representer(Block, _block)


def render() -> str:
    """The content of the file."""
    return HEAD + yaml.safe_dump_all(resources(), sort_keys=False, width=160, allow_unicode=True)


def resources() -> list[dict[str, Any]]:
    """The monitors, the alerts and the dashboards."""
    endpoint = {"port": "metrics", "interval": "15s"}
    # Only a process that should answer is a target: not a pod that prepares or loads, nor the other nodes of a JobSet.
    relabelings = [
        {"sourceLabels": ["__meta_kubernetes_pod_ready"], "regex": "true", "action": "keep"},
        {
            "sourceLabels": ["__meta_kubernetes_pod_label_batch_kubernetes_io_job_completion_index"],
            "regex": "[1-9][0-9]*",
            "action": "drop",
        },
    ]
    training = {"jobLabel": "app.kubernetes.io/name", "podMetricsEndpoints": [{**endpoint, "relabelings": relabelings}]}
    monitors = [
        # jobLabel gives the series the `job` label that rules and dashboards select by, the same as with compose
        _resource("PodMonitor", "babybert-pretrain", training),
        _resource("ServiceMonitor", "babybert-serve", {"jobLabel": "app.kubernetes.io/name", "endpoints": [endpoint]}),
    ]
    for monitor in monitors:
        monitor["spec"]["selector"] = {"matchLabels": {"app.kubernetes.io/name": monitor["metadata"]["name"]}}
    groups = [
        group
        for path in sorted(RULES.glob("*.yaml"))
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    ]
    rule = _resource("PrometheusRule", "babybert", {"groups": groups})
    texts = {
        f"babybert-{path.name}": Block(path.read_text(encoding="utf-8")) for path in sorted(DASHBOARDS.glob("*.json"))
    }
    labels = {"app.kubernetes.io/name": "babybert", "grafana_dashboard": "1"}
    return [
        *monitors,
        rule,
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "babybert-dashboards", "labels": labels},
            "data": texts,
        },
    ]


def _resource(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": name, "labels": {"app.kubernetes.io/name": name}}
    return {"apiVersion": "monitoring.coreos.com/v1", "kind": kind, "metadata": metadata, "spec": spec}


if __name__ == "__main__":
    OUT.write_text(render(), encoding="utf-8")
    print(OUT)
