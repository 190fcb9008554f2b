"""Plays the ends of a pod of k8s/pretrain-job.yaml. The Job controller decides what follows."""

import time
from dataclasses import dataclass

import yaml
from control_plane import Cluster, Resource, wait_for
from manifests import K8S
from pods import FINALIZER, end_pod, evict_pod, has_ended, pods_of, run_pod

MANIFEST = K8S / "pretrain-job.yaml"
NAME = "babybert-pretrain"
OUTCOME_SECONDS = 60.0  # the first new pod comes after 10 s
LAST_POD_SECONDS = 200.0  # the fourth new pod comes 80 s after the third, which came 40 s after the second
QUIET_SECONDS = 15.0  # longer than the delay of the first new pod


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        end: What happens, for people.
        expected: What the controller should do.
        exit_codes: Of one pod after the other.
        init_container: The index of the init container that ends the pod. None: the container after them ends it.
        is_evicted: Whether the node is drained before.
        limit: In place of the manifest's `backoffLimit` or `maxRestarts`. With 0, a counted failure is final.
    """

    end: str
    expected: str
    exit_codes: tuple[int, ...]
    init_container: int | None = None
    is_evicted: bool = False
    limit: int | None = None


JOB_CASES = (
    Case("exit 0", "Complete", (0,)),
    Case("exit 1", "new pod, counted", (1,)),
    Case("exit 1, five pods in a row", "Failed: BackoffLimitExceeded", (1,) * 5),
    Case("exit 2", "Failed: PodFailurePolicy", (2,)),
    Case("exit 3", "Failed: PodFailurePolicy", (3,)),
    Case("exit 130", "new pod, not counted", (130,), limit=0),
    Case("exit 143", "new pod, not counted", (143,), limit=0),
    Case("exit 137 (SIGKILL)", "new pod, counted", (137,)),
    Case("first init container: exit 2 (no Secret)", "Failed: PodFailurePolicy", (2,), init_container=0),
    Case("last init container: exit 3", "Failed: PodFailurePolicy", (3,), init_container=-1),
    Case("last init container: exit 1", "new pod, counted", (1,), init_container=-1),
    Case("drained, exit 143", "new pod, not counted", (143,), is_evicted=True, limit=0),
    Case("drained, exit 1", "new pod, not counted", (1,), is_evicted=True, limit=0),
    Case("drained, exit 2", "Failed: PodFailurePolicy", (2,), is_evicted=True),
    Case("drained, has not ended yet", "no new pod", (), is_evicted=True),
)


def play_job(cluster: Cluster, case: Case) -> str:
    """Create the Job in a new namespace, end its pods as the case says, and return what the controller did."""
    namespace = cluster.create_namespace()
    resources = list(yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8")))
    for resource in resources:
        if resource["kind"] == "Job" and case.limit is not None:
            resource["spec"]["backoffLimit"] = case.limit
    cluster.apply(namespace, resources)
    for exit_code in case.exit_codes or (None,):
        pod = wait_for("a new pod", lambda: running_pod(cluster, namespace), LAST_POD_SECONDS)
        run_pod(cluster, pod)
        if case.is_evicted:
            evict_pod(cluster, pod)
        if exit_code is not None:
            end_pod(cluster, pod, exit_code, case.init_container)
    if not case.exit_codes:
        time.sleep(QUIET_SECONDS)
        return "no new pod" if len(pods_of(cluster, namespace)) == 1 else "new pod"
    return wait_for("an outcome", lambda: outcome(cluster, namespace), OUTCOME_SECONDS)


def running_pod(cluster: Cluster, namespace: str) -> Resource | None:
    """The pod that has not ended, if there is one."""
    return next((pod for pod in pods_of(cluster, namespace) if not has_ended(pod)), None)


def outcome(cluster: Cluster, namespace: str) -> str | None:
    """What the controller did after the last end of a pod. None while it has not decided."""
    status = cluster.get(f"/apis/batch/v1/namespaces/{namespace}/jobs/{NAME}")["status"]
    for condition in status.get("conditions", []):
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            return "Complete" if condition["type"] == "Complete" else f"Failed: {condition['reason']}"
    pods = pods_of(cluster, namespace)
    if any(has_ended(pod) and FINALIZER in pod["metadata"].get("finalizers", []) for pod in pods):
        return None
    if not any(not has_ended(pod) for pod in pods):
        return None
    return "new pod, counted" if status.get("failed") else "new pod, not counted"
