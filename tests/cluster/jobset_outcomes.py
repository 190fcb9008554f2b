"""Plays the ends of a pod of the overlay `multinode`. The JobSet controller decides what follows."""

import base64
import subprocess
from functools import partial
from pathlib import Path

import yaml
from control_plane import Cluster, Resource, find_program, responds, wait_for
from job_outcomes import Case
from manifests import K8S
from pods import end_deleted_pods, end_pod, evict_pod, pods_of, run_pod

from babybert.serving.torchserve import free_ports

OVERLAY = K8S / "overlays/multinode"
PROGRAM = "jobset-manager"
NAME = "babybert-pretrain"
NODES = 2
OUTCOME_SECONDS = 60.0

JOBSET_CASES = (
    Case("exit 0, both pods", "Completed", (0,)),
    Case("exit 1", "all pods restart, counted", (1,)),
    Case("exit 1, five times in a row", "Failed: ReachedMaxRestarts", (1,) * 5),
    Case("exit 2", "Failed: FailJobSetFailurePolicyAction", (2,)),
    Case("exit 3", "Failed: FailJobSetFailurePolicyAction", (3,)),
    Case("exit 130", "all pods restart, not counted", (130,), limit=0),
    Case("exit 143", "all pods restart, not counted", (143,), limit=0),
    Case("exit 137 (SIGKILL)", "all pods restart, counted", (137,)),
    Case("first init container: exit 2 (no Secret)", "Failed: FailJobSetFailurePolicyAction", (2,), init_container=0),
    Case("last init container: exit 3", "Failed: FailJobSetFailurePolicyAction", (3,), init_container=-1),
    Case("drained, exit 143", "all pods restart, not counted", (143,), is_evicted=True, limit=0),
    Case("drained, exit 1", "all pods restart, not counted", (1,), is_evicted=True, limit=0),
    Case("drained, exit 2", "all pods restart, not counted", (2,), is_evicted=True, limit=0),
)


def start_jobset_controller(cluster: Cluster, definitions: Path) -> None:
    """Start the controller, and register its webhooks, which a file of the folder `definitions` describes."""
    (port,) = free_ports(1)
    certificates = cluster.folder / "webhook"
    certificates.mkdir()
    certificate = certificates / "tls.crt"
    openssl = find_program("openssl", "install it")
    key = ["-newkey", "rsa:2048", "-nodes", "-keyout", str(certificates / "tls.key"), "-out", str(certificate)]
    name = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([openssl, "req", "-x509", *key, *name], check=True, capture_output=True)
    configuration = {
        "apiVersion": "config.jobset.x-k8s.io/v1alpha1",
        "kind": "Configuration",
        "webhook": {"host": "127.0.0.1", "port": port, "certDir": str(certificates)},
        "metrics": {"bindAddress": "0"},
        "health": {"healthProbeBindAddress": "0"},
        "leaderElection": {"leaderElect": False},
        "internalCertManagement": {"enable": False},
    }
    file = cluster.folder / "jobset.yaml"
    file.write_text(yaml.safe_dump(configuration))
    program = find_program(PROGRAM, "docs/deploy.md says how to get it", cluster.binaries)
    cluster.start_program(PROGRAM, program, f"--config={file}", f"--kubeconfig={cluster.kubeconfig}")
    cluster.wait_until_up(PROGRAM, lambda: responds(port))
    register_webhooks(cluster, definitions, f"https://127.0.0.1:{port}", certificate.read_bytes())


def register_webhooks(cluster: Cluster, definitions: Path, url: str, certificate: bytes) -> None:
    """Let the API server call the webhooks of JobSet at this address, in place of the Service of a pod."""
    for path in sorted(definitions.glob("*.yaml")):
        for resource in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            if resource and resource["kind"].endswith("WebhookConfiguration"):
                for webhook in resource["webhooks"]:
                    place = webhook["clientConfig"]["service"]["path"]
                    authority = base64.b64encode(certificate).decode()
                    webhook["clientConfig"] = {"url": url + place, "caBundle": authority}
                plural = resource["kind"].lower() + "s"
                cluster.create(f"/apis/{resource['apiVersion']}/{plural}", resource)


def play_jobset(cluster: Cluster, case: Case) -> str:
    """Create the JobSet in a new namespace, end a pod as the case says, and return what the controller did."""
    namespace = cluster.create_namespace()
    resources = list(yaml.safe_load_all(cluster.kubectl("kustomize", str(OVERLAY)).stdout))
    for resource in resources:
        if resource["kind"] == "JobSet" and case.limit is not None:
            resource["spec"]["failurePolicy"]["maxRestarts"] = case.limit
    cluster.apply(namespace, resources)
    seen: set[str] = set()
    for exit_code in case.exit_codes:
        pods = wait_for("new pods", partial(new_pods, cluster, namespace, seen), OUTCOME_SECONDS)
        seen |= {pod["metadata"]["uid"] for pod in pods}
        for pod in pods:
            run_pod(cluster, pod)
        if case.is_evicted:
            evict_pod(cluster, pods[0])
        for pod in pods if exit_code == 0 else pods[:1]:
            end_pod(cluster, pod, exit_code, case.init_container)
    return wait_for("an outcome", lambda: outcome(cluster, namespace, seen), OUTCOME_SECONDS)


def new_pods(cluster: Cluster, namespace: str, seen: set[str]) -> list[Resource] | None:
    """The pods of all nodes, none of them seen before. Deleted pods are ended."""
    end_deleted_pods(cluster, namespace)
    pods = [
        pod
        for pod in pods_of(cluster, namespace)
        if pod["metadata"]["uid"] not in seen and "jobset.sigs.k8s.io/jobset-name" in pod["metadata"]["labels"]
    ]
    return pods if len(pods) == NODES else None


def outcome(cluster: Cluster, namespace: str, seen: set[str]) -> str | None:
    """What the controller did after the last end of a pod. None while it has not decided."""
    path = f"/apis/jobset.x-k8s.io/v1alpha2/namespaces/{namespace}/jobsets/{NAME}"
    status = cluster.get(path).get("status", {})
    for condition in status.get("conditions", []):
        if condition["type"] in ("Completed", "Failed") and condition["status"] == "True":
            return "Completed" if condition["type"] == "Completed" else f"Failed: {condition['reason']}"
    if not new_pods(cluster, namespace, seen):
        return None
    return f"all pods restart, {'counted' if status.get('restartsCountTowardsMax') else 'not counted'}"
