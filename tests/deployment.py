"""Shared by the tests of images, manifests, alerts and dashboards: where the files are and how they are rendered."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
OVERLAYS = ("base", "overlays/local", "overlays/aws", "overlays/multinode", "overlays/kueue")
SECONDS = 120  # time limit of one external program

Resource = dict[str, Any]  # one Kubernetes object, or any part of one


def need(program: str, hint: str) -> str:
    """The path of a program. If it is missing, the test is skipped with a hint at how to install it."""
    path = shutil.which(program, path=str(Path(sys.executable).parent)) or shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed; {hint}")
    return path


def run_program(*command: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run an external program with a time limit and capture its output. `env` replaces its environment."""
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=SECONDS)


def rendered(overlay: str) -> list[Resource]:
    """The resources that `kubectl apply -k k8s/<overlay>` would send."""
    kubectl = need("kubectl", "`make lint-deploy` installs it")
    done = run_program(kubectl, "kustomize", ROOT / "k8s" / overlay)
    assert done.returncode == 0, done.stderr
    return [resource for resource in yaml.safe_load_all(done.stdout) if resource]


def written(name: str) -> list[Resource]:
    """The resources in one file below k8s/."""
    text = (ROOT / "k8s" / name).read_text(encoding="utf-8")
    return [resource for resource in yaml.safe_load_all(text) if resource]


def only(resources: list[Resource], kind: str, name: str | None = None) -> Resource:
    """The single resource of this kind (and name)."""
    (match,) = [
        resource for resource in resources if resource["kind"] == kind and name in (None, resource["metadata"]["name"])
    ]
    return match


def pod_templates(resources: list[Resource]) -> dict[str, Resource]:
    """The pod template of each resource that starts pods, by "kind/name"."""
    templates = {}
    for resource in resources:
        spec = resource.get("spec", {})
        name = f"{resource['kind']}/{resource['metadata']['name']}"
        if resource["kind"] == "JobSet":
            templates[name] = spec["replicatedJobs"][0]["template"]["spec"]["template"]
        elif "template" in spec:
            templates[name] = spec["template"]
    return templates


def alerts() -> Iterator[Resource]:
    """Each alert in docker/prometheus/rules."""
    for path in sorted((ROOT / "docker/prometheus/rules").glob("*.yaml")):
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]:
            yield from (rule for rule in group["rules"] if "alert" in rule)
