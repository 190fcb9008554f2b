"""`make soak`: one run, killed again and again at random moments, must end as if nobody had touched it.

A small run on generated reviews, with checkpoints every few steps to a local S3 server, is killed with SIGKILL 50 times (SIGTERM in one of
five), after a random time; in one of four its local folder is lost as well, as when a node goes away. Prints what
happened, and compares the last weights and optimizer, here and in the store, with those of an uninterrupted run.
"""

import argparse
import collections
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
from typing import Any

import conftest

from babybert.checkpoint.format import newest_valid, read_state
from babybert.checkpoint.storage import S3Store
from babybert.config import PrepareConfig
from babybert.data.dataset import sha256
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
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        prepare(PrepareConfig(out=work / "data", demo_documents=300))
        command = [
            sys.executable,
            "-m",
            "babybert.cli",
            *RUN,
            f"--data={work / 'data'}",
            f"--epochs={max(4, options.kills // 6)}",
        ]
        subprocess.run([*command, f"--out={work / 'whole'}"], check=True, capture_output=True)
        expected = newest_valid(work / "whole")
        assert expected is not None
        steps = read_state(expected)["step"]
        print(f"uninterrupted: {steps} steps", flush=True)
        for store in s3_store(work):
            tally = soak(
                [*command, f"--out={work / 'run'}", f"--store={store.address}"], work / "run", options.kills, rng
            )
            found = newest_valid(work / "run")
            assert found is not None
            there = store.download(store.steps()[0], work / "fetched")
            equal = [sha256(folder / file) == sha256(expected / file) for folder in (found, there) for file in FILES]
            print(
                json.dumps(
                    {
                        **tally,
                        "steps": steps,
                        "last_step": found.name,
                        "restarts_recorded": read_state(found)["restarts"],
                        "bit_equal": all(equal),
                    },
                    indent=2,
                )
            )
            return 0 if all(equal) and found.name == there.name == expected.name and not tally["corrupt_loads"] else 1
    raise AssertionError("there is one store")


def s3_store(work: Path) -> Iterator[S3Store]:
    """A prefix of a real S3 server."""

    class Folders:
        def mktemp(self, name: str) -> Path:
            (work / name).mkdir()
            return work / name

    servers: Iterator[str] = conftest.serve_s3(Folders())
    os.environ.update(conftest.aws_variables(next(servers)))
    os.environ["BABYBERT_S3_TIMEOUT"] = "5"
    store = S3Store("s3://soak/run")
    store.client.create_bucket(Bucket="soak")
    yield store
    servers.close()  # type: ignore[attr-defined]


def soak(command: list[str], run: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Start and kill until it has been done often enough, then let it end."""
    tally: collections.Counter[str] = collections.Counter(corrupt_loads=0)
    for number in range(kills + 1):
        start = time.monotonic()
        job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if number == kills:
            output, _ = job.communicate(timeout=900)
        else:
            limit = 2.0 + rng.random() * 2.5  # the start takes two seconds
            try:
                output, _ = job.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                kind = signal.SIGTERM if rng.random() < 0.2 else signal.SIGKILL
                job.send_signal(kind)
                tally[kind.name] += 1
                output, _ = job.communicate(timeout=120)
        count(output, job.returncode, tally)
        if number < kills and job.returncode == -signal.SIGKILL and rng.random() < 0.25:
            shutil.rmtree(run, ignore_errors=True)
            tally["disks_lost"] += 1
        last = next((line for line in reversed(output.splitlines()) if "resuming" in line), "from the beginning")
        print(f"{number + 1:>3} {time.monotonic() - start:5.1f} s  exit {job.returncode:>4}  {last}", flush=True)
    return dict(tally)


def count(output: str, code: int, tally: collections.Counter[str]) -> None:
    """What a process said of itself."""
    tally[f"exit_{code}"] += 1
    tally["resumed"] += "resuming from" in output
    tally["fallbacks"] += output.count("passing over")
    tally["waited_for_a_lease"] += output.count("waiting up to")
    tally["corrupt_loads"] += "Traceback" in output or code == 3
    if code not in (0, 143, -signal.SIGKILL):
        print(output)


if __name__ == "__main__":
    sys.exit(main())
