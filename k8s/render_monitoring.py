"""Write monitoring.yaml from the alerts and dashboards that compose uses too: `make monitoring`; a test holds them in step.

One file that `kubectl apply` supports, where Prometheus' operator is installed (its resources are PodMonitor,
ServiceMonitor and PrometheusRule), and Grafana with the sidecar that looks for ConfigMaps labelled `grafana_dashboard`.
"""

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
RULES, DASHBOARDS = ROOT / "docker/prometheus/rules", ROOT / "docker/grafana/dashboards"
OUT = ROOT / "k8s/monitoring.yaml"
HEAD = """\
# Written by k8s/render_monitoring.py (`make monitoring`) from docker/prometheus/rules and docker/grafana/dashboards.
# Needs Prometheus' operator. Where it takes only resources with a certain label (`release: ...`), add that label.
"""


class Block(str):
    """A text that YAML shows as a block, line by line."""


def _block(dumper: yaml.SafeDumper, text: Block) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style="|")


yaml.SafeDumper.add_representer(Block, _block)


def render() -> str:
    """The whole file."""
    return HEAD + yaml.safe_dump_all(resources(), sort_keys=False, width=160, allow_unicode=True)


def resources() -> list[dict[str, Any]]:
    """What monitors, alerts and shows."""
    endpoint = {"port": "metrics", "interval": "15s"}
    monitors = [
        # jobLabel: the series get the job's name that the rules and dashboards ask for, as compose gives them
        _resource(
            "PodMonitor", "babybert-pretrain", {"jobLabel": "app.kubernetes.io/name", "podMetricsEndpoints": [endpoint]}
        ),
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
