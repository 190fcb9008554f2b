"""`make test-cluster`: a real Kubernetes control plane takes the manifests, and its Job controller the exit codes.

It starts etcd, the API server and the controllers on the loopback interface, without a kubelet: no pod runs. Then it
applies each manifest of k8s/. docs/deploy.md says which programs it needs.
"""

import argparse
import shutil
import signal
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType

from control_plane import Cluster, ClusterError, running_cluster
from job_outcomes import JOB_CASES, play_job
from manifests import apply_definitions, check_manifest, find_manifests
from pods import create_node

RUN_SECONDS = 300


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bin", type=Path, required=True, help="folder with kube-apiserver")
    parser.add_argument("--crds", type=Path, help="folder with CustomResourceDefinitions, as YAML")
    options = parser.parse_args()
    for folder in (options.bin, options.crds):
        if folder is not None and not folder.is_dir():
            parser.error(f"{folder} is not a folder")
    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    signal.alarm(RUN_SECONDS)
    start = time.monotonic()
    try:
        # The cluster is stopped before the threads are joined, so that they end at once if something failed.
        with ThreadPoolExecutor(len(JOB_CASES)) as pool, running_cluster(options.bin.resolve()) as cluster:
            print(cluster.versions(), flush=True)
            if options.crds is not None:
                apply_definitions(cluster, options.crds)
            ok = check_all(cluster, pool)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{'ok' if ok else 'FAILED'}, after {time.monotonic() - start:.0f} s")
    return 0 if ok else 1


def stop(number: int, frame: FrameType | None) -> None:
    """End at a signal, so that the programs are stopped and the folder is deleted."""
    if number == signal.SIGALRM:
        sys.exit(f"error: not done within {RUN_SECONDS} s")
    sys.exit(128 + number)


def check_all(cluster: Cluster, pool: ThreadPoolExecutor) -> bool:
    """Play all cases in threads, because they mostly wait, and meanwhile apply all manifests. Print the tables.

    Returns whether everything is as it should be.
    """
    has_controllers = shutil.which("kube-controller-manager", path=str(cluster.binaries)) is not None
    outcomes = []
    if has_controllers:
        cluster.start_controllers()
        create_node(cluster)
        outcomes = [pool.submit(play_job, cluster, case, f"job-{number}") for number, case in enumerate(JOB_CASES)]
    ok = check_manifests(cluster)
    if has_controllers:
        print("\n| end of a pod of the Job | expected | observed |\n| --- | --- | --- |", flush=True)
        for case, future in zip(JOB_CASES, outcomes, strict=True):
            ok &= print_outcome(case.end, case.expected, future)
    else:
        print("\nno kube-controller-manager: exit codes are not played")
    return ok


def print_outcome(end: str, expected: str, future: Future[str]) -> bool:
    """Print a row when its case has been played. Returns whether it is as expected."""
    try:
        observed = future.result()
    except ClusterError as error:
        observed = " ".join(str(error).split())
    print(f"| {end} | {expected} | {observed}{'' if observed == expected else ' **differs**'} |", flush=True)
    return observed == expected


def check_manifests(cluster: Cluster) -> bool:
    """Apply all manifests and print a table. Returns whether all are as they should be."""
    print("\n| manifest | applied twice, then server-side |\n| --- | --- |", flush=True)
    all_ok = True
    for manifest in find_manifests(cluster):
        result, ok = check_manifest(cluster, manifest)
        print(f"| `{manifest.name}` | {result} |", flush=True)
        all_ok &= ok
    return all_ok


if __name__ == "__main__":
    sys.exit(main())
