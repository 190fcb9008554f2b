"""What a kubelet tells the API server about pods. Here nothing runs: each container ends as the test says."""

import contextlib

from control_plane import Cluster, ClusterError, Resource

NODE = "node"
FINALIZER = "batch.kubernetes.io/job-tracking"  # of a pod that the Job controller has not counted yet
TERMINATED = 143


def create_node(cluster: Cluster) -> None:
    """A node that is always ready."""
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}}
    cluster.create("/api/v1/nodes", node)
    ready = {"type": "Ready", "status": "True", "reason": "KubeletReady"}
    cluster.patch(f"/api/v1/nodes/{NODE}/status", {"status": {"conditions": [ready]}})


def pods_of(cluster: Cluster, namespace: str) -> list[Resource]:
    """All pods of a namespace."""
    pods: list[Resource] = cluster.get(f"/api/v1/namespaces/{namespace}/pods")["items"]
    return pods


def path_of(pod: Resource) -> str:
    """The path of a pod in the API."""
    return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"


def has_ended(pod: Resource) -> bool:
    """Whether all its containers have ended, with any exit code."""
    return pod["status"]["phase"] in ("Succeeded", "Failed")


def run_pod(cluster: Cluster, pod: Resource) -> None:
    """Put a pod on the node, in place of the scheduler, and say that it runs."""
    name = pod["metadata"]["name"]
    target = {"apiVersion": "v1", "kind": "Node", "name": NODE}
    binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": target}
    cluster.create(f"{path_of(pod)}/binding", binding)
    cluster.patch(f"{path_of(pod)}/status", {"status": {"phase": "Running"}})


def end_pod(cluster: Cluster, pod: Resource, exit_code: int, init_container: int | None = None) -> None:
    """Say that a container of a pod has ended with this code, and the pod with it. A deleted pod then disappears.

    Args:
        init_container: Its index in the list of init containers. None: the only other container.
    """
    spec = pod["spec"]
    first, (main,) = spec.get("initContainers", []), spec["containers"]
    ended = (main if init_container is None else first[init_container])["name"]
    statuses, state = [], {"terminated": {"exitCode": 0, "reason": "Completed"}}
    for container in (*first, main):  # those before the one that ended have succeeded, those after it wait
        name, image = container["name"], container["image"]
        if name == ended and exit_code:
            state = {"terminated": {"exitCode": exit_code, "reason": "Error"}}
        statuses.append(
            {"name": name, "image": image, "imageID": "", "ready": False, "restartCount": 0, "state": state}
        )
        if name == ended:
            state = {"waiting": {"reason": "PodInitializing"}}
    status = {
        "phase": "Failed" if exit_code else "Succeeded",
        "initContainerStatuses": statuses[:-1],
        "containerStatuses": statuses[-1:],
    }
    ended_pod = cluster.patch(f"{path_of(pod)}/status", {"status": status})
    if "deletionTimestamp" in ended_pod["metadata"]:
        cluster.delete(path_of(pod))


def end_deleted_pods(cluster: Cluster, namespace: str) -> None:
    """End each running pod that was deleted, as after SIGTERM."""
    for pod in pods_of(cluster, namespace):
        if "deletionTimestamp" in pod["metadata"] and not has_ended(pod):
            with contextlib.suppress(ClusterError):  # it is gone already
                end_pod(cluster, pod, TERMINATED)


def evict_pod(cluster: Cluster, pod: Resource) -> None:
    """Drain the node: the API server marks the pod with the condition DisruptionTarget and deletes it gracefully."""
    metadata = {"name": pod["metadata"]["name"], "namespace": pod["metadata"]["namespace"]}
    cluster.create(f"{path_of(pod)}/eviction", {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata})
