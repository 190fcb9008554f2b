"""What the tests of images, manifests, alerts and dashboards share: where these files are, and how they are rendered."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
OVERLAYS = ("base", "overlays/local", "overlays/aws", "overlays/multinode", "overlays/kueue")
BESIDE_PYTHON = str(Path(sys.executable).parent)


def need(program, hint):
    """The path of a program; the test is skipped, and says how to get it, where it is missing."""
    found = shutil.which(program, path=BESIDE_PYTHON) or shutil.which(program)
    if not found:
        pytest.skip(f"{program} is not installed; {hint}")
    return found


def rendered(overlay):
    """The resources that `kubectl apply -k k8s/<overlay>` would send."""
    kubectl = need("kubectl", "`make lint-deploy` brings it")
    done = subprocess.run([kubectl, "kustomize", str(ROOT / "k8s" / overlay)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [resource for resource in yaml.safe_load_all(done.stdout) if resource]


def written(name):
    """The resources of one file."""
    return [resource for resource in yaml.safe_load_all((ROOT / "k8s" / name).read_text(encoding="utf-8")) if resource]


def only(resources, kind, name=None):
    """The one resource of this kind (and name)."""
    (found,) = [
        resource for resource in resources if resource["kind"] == kind and name in (None, resource["metadata"]["name"])
    ]
    return found


def pod_templates(resources):
    """The pod templates of all that starts pods, by "kind/name"."""
    found = {}
    for resource in resources:
        spec, name = resource.get("spec", {}), f"{resource['kind']}/{resource['metadata']['name']}"
        if resource["kind"] == "JobSet":
            found[name] = spec["replicatedJobs"][0]["template"]["spec"]["template"]
        elif "template" in spec:
            found[name] = spec["template"]
    return found


def alerts():
    """Each alert of docker/prometheus/rules."""
    for path in sorted((ROOT / "docker/prometheus/rules").glob("*.yaml")):
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]:
            yield from (rule for rule in group["rules"] if "alert" in rule)
