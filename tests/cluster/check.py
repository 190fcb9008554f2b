"""`make test-cluster`: a real Kubernetes control plane takes the manifests, and its Job controller the exit codes.

It starts etcd, the API server and the controllers on the loopback interface, without a kubelet: no pod runs. Then it
applies each manifest of k8s/. docs/deploy.md says which programs it needs.
"""

import argparse
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from control_plane import Cluster, ClusterError, running_cluster
from manifests import apply_definitions, check_manifest, find_manifests

RUN_SECONDS = 300


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bin", type=Path, required=True, help="folder with kube-apiserver")
    parser.add_argument("--crds", type=Path, help="folder with CustomResourceDefinitions, as YAML")
    options = parser.parse_args()
    for folder in (options.bin, options.crds):
        if folder is not None and not folder.is_dir():
            parser.error(f"{folder} is not a folder")
    signal.signal(signal.SIGALRM, stop)
    signal.signal(signal.SIGTERM, stop)
    signal.alarm(RUN_SECONDS)
    start = time.monotonic()
    try:
        with running_cluster(options.bin.resolve()) as cluster:
            print(cluster.versions(), flush=True)
            if options.crds is not None:
                apply_definitions(cluster, options.crds)
            ok = check_manifests(cluster)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{'ok' if ok else 'FAILED'}, after {time.monotonic() - start:.0f} s")
    return 0 if ok else 1


def stop(number: int, frame: FrameType | None) -> None:
    """End at a signal, so that the programs are stopped and the folder is deleted."""
    why = f"not done within {RUN_SECONDS} s" if number == signal.SIGALRM else "stopped"
    raise ClusterError(why)


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
