"""`make soak`: a run that is killed 50 times at random moments ends with the same bits as an uninterrupted run.

A small run on generated reviews saves a checkpoint every few steps to disk and to a local S3 server. It is killed after
a random time, with SIGTERM one time in five and otherwise with SIGKILL. After one SIGKILL in four its local folder is
deleted too, as when a node is lost. At the end the last weights and optimizer state, on disk and in the store, are
compared with those of an uninterrupted run.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from conftest import Seaweed, aws_variables
from processes import babybert_command

from babybert.checkpoint.format import newest_valid
from babybert.checkpoint.storage import S3Store
from babybert.config import PrepareConfig
from babybert.data.digest import sha256
from babybert.data.prepare import prepare

RUN = [
    "pretrain",
    "--preset=tiny",
    "--width=16",
    "--dropout=0.1",
    "--batch-size=8",
    "--device=cpu",
    "--no-metrics",
    "--checkpoint-every=15",
    "--keep-checkpoints=2",
]
FILES = ("model.safetensors", "training.pt")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name, s3_store(Path(name)) as store:
        work = Path(name)
        prepare(PrepareConfig(out=work / "data", demo_documents=300))
        epochs = max(4, options.kills // 6)
        command = babybert_command(*RUN, f"--data={work / 'data'}", f"--epochs={epochs}")
        subprocess.run([*command, f"--out={work / 'uninterrupted'}"], check=True, capture_output=True, timeout=900)
        expected = newest_valid(work / "uninterrupted")
        assert expected is not None
        print(f"uninterrupted: {expected.name}", flush=True)

        counts = soak([*command, f"--out={work / 'run'}", f"--store={store.address}"], work / "run", options.kills, rng)
        on_disk = newest_valid(work / "run")
        assert on_disk is not None
        in_store = store.download(store.steps()[0], work / "downloaded")
        equal = all(
            sha256(folder / file) == sha256(expected / file) for folder in (on_disk, in_store) for file in FILES
        )
        print(json.dumps({**counts, "last_checkpoint": on_disk.name, "bit_equal": equal}, indent=2))
        same_step = on_disk.name == in_store.name == expected.name
        return 0 if equal and same_step and not counts["corrupt_loads"] else 1


@contextlib.contextmanager
def s3_store(work: Path) -> Iterator[S3Store]:
    """A prefix of a real S3 server that runs in a folder below `work`."""
    folder = work / "seaweed"
    folder.mkdir()
    server = Seaweed(folder)
    server.start()
    try:
        os.environ.update(aws_variables(server.url))
        os.environ["BABYBERT_S3_TIMEOUT"] = "5"
        store = S3Store("s3://soak/run")
        store.client.create_bucket(Bucket="soak")
        yield store
    finally:
        server.kill()


def soak(command: list[str], run: Path, kills: int, rng: random.Random) -> dict[str, int]:
    """Start the command and kill it `kills` times, then let it finish. Returns counts of what happened."""
    counts: collections.Counter[str] = collections.Counter(corrupt_loads=0)
    for attempt in range(kills + 1):
        start = time.monotonic()
        job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if attempt == kills:
            output, _ = job.communicate(timeout=900)
        else:
            output = kill_after_random_time(job, rng, counts)
        count_events(output, job.returncode, counts)
        if attempt < kills and job.returncode == -signal.SIGKILL and rng.random() < 0.25:
            shutil.rmtree(run, ignore_errors=True)
            counts["disks_lost"] += 1
        resumed = next((line for line in reversed(output.splitlines()) if "resuming" in line), "from the beginning")
        print(f"{attempt + 1:>3} {time.monotonic() - start:5.1f} s  exit {job.returncode:>4}  {resumed}", flush=True)
    return dict(counts)


def kill_after_random_time(job: subprocess.Popen[str], rng: random.Random, counts: collections.Counter[str]) -> str:
    """Send SIGKILL or SIGTERM unless the process ends before. Returns its output."""
    seconds = 2.0 + rng.random() * 2.5  # the start alone takes two seconds
    try:
        output, _ = job.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kind = signal.SIGTERM if rng.random() < 0.2 else signal.SIGKILL
        job.send_signal(kind)
        counts[kind.name] += 1
        output, _ = job.communicate(timeout=120)
    return output


def count_events(output: str, exit_code: int, counts: collections.Counter[str]) -> None:
    """Count what one process reported."""
    counts[f"exit_{exit_code}"] += 1
    counts["resumed"] += "resuming from" in output
    counts["fallbacks"] += output.count("skipping")
    counts["waited_for_a_lease"] += output.count("waiting up to")
    counts["corrupt_loads"] += "Traceback" in output or exit_code == 3
    if exit_code not in (0, 143, -signal.SIGKILL):
        print(output)


if __name__ == "__main__":
    sys.exit(main())
