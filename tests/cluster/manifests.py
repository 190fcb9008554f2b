"""Applies each manifest of k8s/ as its users do: twice client-side, then server-side."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from control_plane import Cluster, Resource, wait_for

K8S = Path(__file__).parents[2] / "k8s"
DEFINITION_SECONDS = 30.0
TRIAL_ACCOUNT = "trial"  # pods need an account; without controllers a namespace has no `default`
MESSAGE_LINES = 2  # of kubectl; what follows is advice


@dataclass(frozen=True)
class Manifest:
    """A file, or a folder with a kustomization."""

    path: Path
    resources: list[Resource]

    @property
    def name(self) -> str:
        """Its path in the repository."""
        return str(self.path.relative_to(K8S.parent))

    @property
    def flag(self) -> str:
        """How `kubectl apply` takes it."""
        return f"--kustomize={self.path}" if self.path.is_dir() else f"--filename={self.path}"


def find_manifests(cluster: Cluster) -> list[Manifest]:
    """All files directly in k8s/ and all folders below it with a kustomization, rendered."""
    manifests = []
    folders = [path.parent for path in K8S.rglob("kustomization.yaml")]
    for path in [*sorted(K8S.glob("*.yaml")), *sorted(folders)]:
        text = cluster.kubectl("kustomize", str(path)).stdout if path.is_dir() else path.read_text(encoding="utf-8")
        manifests.append(Manifest(path, [each for each in yaml.safe_load_all(text) if each]))
    return manifests


def apply_definitions(cluster: Cluster, folder: Path) -> None:
    """Create the CustomResourceDefinitions of all files in a folder. Other objects in the files are left out."""
    for path in sorted(folder.glob("*.yaml")):
        for resource in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            if resource and resource["kind"] == "CustomResourceDefinition":
                resource["spec"].pop("conversion", None)  # a webhook in a pod, which does not run
                cluster.create("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", resource)
                name, spec = resource["metadata"]["name"], resource["spec"]
                kind = {"apiVersion": f"{spec['group']}/{spec['versions'][0]['name']}", "kind": spec["names"]["kind"]}
                wait_for(f"the definition {name}", partial(cluster.knows, kind), DEFINITION_SECONDS)


def pod_specs(value: Any) -> Iterator[Resource]:
    """The specification of each pod that is described anywhere in a resource."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for each in value.values():
            yield from pod_specs(each)
    elif isinstance(value, list):
        for each in value:
            yield from pod_specs(each)


def pods_to_try(manifest: Manifest) -> str:
    """A pod of each template. The API server itself checks the templates of its own kinds only, not of a JobSet."""
    pods = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"generateName": f"{manifest.path.stem}-"},
            "spec": {**spec, "serviceAccountName": TRIAL_ACCOUNT},
        }
        for spec in pod_specs(manifest.resources)
    ]
    return yaml.safe_dump_all(pods)


def check_manifest(cluster: Cluster, manifest: Manifest) -> tuple[str, bool]:
    """Apply a manifest in a namespace of its own, and try its pods. Returns the result, and whether it is good.

    A manifest with a kind of objects that the API server does not know is skipped.
    """
    unknown = sorted({each["kind"] for each in manifest.resources if not cluster.knows(each)})
    if unknown:
        return f"skipped: no definition of {', '.join(unknown)}", True
    namespace = f"--namespace={cluster.create_namespace()}"
    cluster.kubectl("create", namespace, "serviceaccount", TRIAL_ACCOUNT)
    steps = {
        "the first time": cluster.kubectl("apply", namespace, manifest.flag),
        "again": cluster.kubectl("apply", namespace, manifest.flag),
        "server-side": cluster.kubectl("apply", namespace, "--server-side", manifest.flag),
    }
    if pods := pods_to_try(manifest):
        steps["its pods"] = cluster.kubectl("create", namespace, "--dry-run=server", "--filename=-", text=pods)
    for step, done in steps.items():
        if done.returncode or done.stderr:
            message = " ".join(done.stderr.splitlines()[:MESSAGE_LINES]) or f"exit code {done.returncode}"
            return f"{step}: {message}", False
    return "no error, no conflict, no warning", True
