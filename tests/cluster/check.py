"""`make test-cluster`: a real Kubernetes control plane takes all manifests, and its controllers the exit codes of pods.

It starts etcd, the API server and the controllers on the loopback interface, without a kubelet: no pod runs. It applies
each manifest of k8s/, and reports ends of pods as a kubelet would. docs/deploy.md says which programs it needs.
"""

import argparse
import signal
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType

from control_plane import Cluster, ClusterError, running_cluster
from job_outcomes import JOB_CASES, Case, play_job
from jobset_outcomes import JOBSET_CASES, play_jobset, start_jobset_controller
from jobset_outcomes import PROGRAM as JOBSET_PROGRAM
from manifests import apply_definitions, check_manifest, find_manifests
from pods import create_node

RUN_SECONDS = 300


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--bin", type=Path, required=True, help="folder with kube-apiserver, and controllers if there are any"
    )
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
        with (
            ThreadPoolExecutor(len(JOB_CASES) + len(JOBSET_CASES)) as pool,
            running_cluster(options.bin.resolve()) as cluster,
        ):
            print(cluster.versions(), flush=True)
            if options.crds is not None:
                apply_definitions(cluster, options.crds)
            ok = check_all(cluster, options.crds, pool)
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


def check_all(cluster: Cluster, definitions: Path | None, pool: ThreadPoolExecutor) -> bool:
    """Play all cases in threads, because they mostly wait, and meanwhile apply all manifests. Print the tables.

    Returns whether everything is as it should be.
    """
    tables: list[tuple[str, tuple[Case, ...], list[Future[str]]]] = []
    if cluster.has_program("kube-controller-manager"):
        cluster.start_controllers()
        create_node(cluster)
        tables.append(("Job", JOB_CASES, [pool.submit(play_job, cluster, case) for case in JOB_CASES]))
        if definitions is not None and cluster.has_program(JOBSET_PROGRAM):
            start_jobset_controller(cluster, definitions)
            tables.append(("JobSet", JOBSET_CASES, [pool.submit(play_jobset, cluster, case) for case in JOBSET_CASES]))
    ok = check_manifests(cluster)
    for kind, cases, outcomes in tables:
        print(f"\n| end of a pod of the {kind} | expected | observed |\n| --- | --- | --- |", flush=True)
        for case, future in zip(cases, outcomes, strict=True):
            ok &= print_outcome(case, future)
    for kind in ("Job", "JobSet"):
        if kind not in {name for name, _, _ in tables}:
            print(f"\nThe {kind} was not played: its controller is missing.")
    return ok


def print_outcome(case: Case, future: Future[str]) -> bool:
    """Print a row when its case has been played. Returns whether it is as expected."""
    try:
        observed = future.result()
    except ClusterError as error:
        observed = " ".join(str(error).split())
    differs = "" if observed == case.expected else " **differs**"
    print(f"| {case.end} | {case.expected} | {observed}{differs} |", flush=True)
    return not differs


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
