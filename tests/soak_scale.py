"""`make soak-scale`: `prepare` whose workers and driver are killed 100 times writes the same bytes each time.

A command prepares generated reviews, in turn with the local engine and on Ray, and one time in eight with the local
engine into a local S3 server. After a random time, a random worker or the command itself is killed with SIGKILL. If the
command was killed, the same command goes on; in S3, it waits until the lease of the killed one has run out. When it has
ended, the SHA-256 of each file is compared with that of a command in one process, and the next one begins.
"""

import argparse
import collections
import contextlib
import itertools
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped, unused-ignore]
from engine_corpus import digests
from processes import ChildProcess, babybert_command
from soak import s3_store

from babybert.checkpoint.storage import S3Store
from babybert.config import PrepareConfig
from babybert.corpus.demo import generate_reviews
from babybert.data.prepare import prepare
from babybert.s3 import list_keys

REVIEWS = 60_000  # 27 MB: seven batches and three blocks
PLACES = ("local", "ray", "local", "ray", "local", "ray", "local", "s3")
LATEST_KILL = 4.5  # seconds after the first worker is seen; shards are finished from about three seconds on
DRIVER_SHARE = 0.4  # of the kills
SECONDS = 240.0  # for one command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as name, s3_store(Path(name)) as store:
        work = Path(name)
        source, expected = write_corpus(work)
        start = time.monotonic()
        for number, place in enumerate(itertools.cycle(PLACES)):
            kills = counts["driver_kills"] + counts["worker_kills"]
            if kills >= options.kills:
                break
            out = f"s3://{store.bucket}/data-{number}" if place == "s3" else str(work / "data")
            engine = "ray" if place == "ray" else "local"
            flags = ["prepare", "--corpus=jsonl", f"--source={source}", f"--out={out}", f"--engine={engine}"]
            run_with_kills(babybert_command(*flags, "--workers=2"), engine, rng, counts)
            if place == "s3":
                download(store, f"data-{number}/", work / "data")
            equal = digests(work / "data") == expected
            counts["datasets"] += 1
            counts["equal_datasets"] += equal
            print(f"{time.monotonic() - start:6.0f} s  {place:<5}  {dict(counts)}", flush=True)
            shutil.rmtree(work / "data")
    print(json.dumps(counts, indent=2))
    return 0 if counts["datasets"] == counts["equal_datasets"] and not counts["tracebacks"] else 1


def download(store: S3Store, prefix: str, folder: Path) -> None:
    """Download all objects below a prefix."""
    folder.mkdir()
    for key, _ in list_keys(store.client, store.bucket, prefix):
        store.client.download_file(store.bucket, key, str(folder / key.removeprefix(prefix)))


def write_corpus(work: Path) -> tuple[Path, dict[str, str]]:
    """Write the reviews. Return their file, and the digests of what one process makes of them."""
    source = work / "reviews.jsonl"
    with source.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in generate_reviews(REVIEWS, seed=0))
    prepare(PrepareConfig(corpus="jsonl", source=(str(source),), out=work / "expected", workers=1))
    return source, digests(work / "expected")


def run_with_kills(command: list[str], engine: str, rng: random.Random, counts: collections.Counter[str]) -> None:
    """Run a command until it succeeds. Kill it or its workers once or more, at random times."""
    for attempt in range(5):
        job = ChildProcess(["sh", "-c", 'exec "$@" > /dev/null', "sh", *command])
        kill_driver = attempt < 2 and rng.random() < DRIVER_SHARE
        for _ in range(1 if kill_driver else rng.randint(1, 2)):
            worker = wait_for_worker(job, engine, rng)
            time.sleep(rng.random() * LATEST_KILL)
            if kill_driver and job.is_running:
                job.send_signal(signal.SIGKILL)
                counts["driver_kills"] += 1
            elif worker is not None and worker.is_running():
                worker.kill()
                counts["worker_kills"] += 1
        exit_code = job.wait(SECONDS)
        counts["tracebacks"] += "Traceback" in job.output
        counts["resumed"] += "were finished by an earlier command" in job.output
        was_complete = attempt > 0 and "has prepared data already" in job.output  # killed at the very end
        if exit_code == 0 or was_complete:
            counts["killed_when_complete"] += was_complete
            return
        if exit_code != -signal.SIGKILL:
            counts[f"exit_{exit_code}"] += 1
            print(job.output, file=sys.stderr)
    raise SystemExit("the command did not succeed in five attempts")


def wait_for_worker(job: ChildProcess, engine: str, rng: random.Random) -> psutil.Process | None:
    """A random worker process of a command, as soon as there is one. None if the command has ended."""
    while job.is_running:
        workers = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(job.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if is_worker(process, job.process.pid, engine):
                        workers.append(process)
        if workers:
            return rng.choice(workers)
        time.sleep(0.02)
    return None


def is_worker(process: psutil.Process, driver: int, engine: str) -> bool:
    """Whether a process below the driver runs jobs. Those of the local engine are children of the fork server."""
    if engine == "ray":
        return bool(process.name().startswith(("ray::_run", "ray::IDLE")))
    return bool(process.ppid() != driver)


if __name__ == "__main__":
    sys.exit(main())
