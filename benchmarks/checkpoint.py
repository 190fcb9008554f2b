"""The cost of a checkpoint: saving, loading, uploading during training, and the time from start to first step.

    python benchmarks/checkpoint.py --data data/imdb      # three minutes on two cores; starts a local S3 server

All measurements use the preset `baby` (3.2 million parameters; a checkpoint contains weights, two Adam moments and
the tokenizer) and a local SeaweedFS, which has the lowest priority and needs the same cores. Prints medians, and what
uploads add to the steps beside them in each of several runs, and writes them as JSON.
"""

import argparse
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from common import TrainingStep, new_model, recipe_config, seconds_of, write_json

from babybert.checkpoint.format import (
    TRAINING,
    CheckpointState,
    checkpoint_name,
    load_model,
    load_optimizer,
    save_checkpoint,
)
from babybert.checkpoint.storage import S3Store
from babybert.data.dataset import open_dataset
from babybert.data.loader import Loader
from babybert.s3_upload_process import UploadProcess

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

BATCHES = 20
ROUNDS = 4  # in each run: the machine's speed drifts within seconds, so short measurements take turns


def main() -> None:
    """Run all measurements, print them, write JSON."""
    parser = argparse.ArgumentParser(description="Measure checkpoints.")
    parser.add_argument("--data", type=Path, default=Path("data/imdb"), help="prepared IMDB")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each measurement; medians are reported")
    parser.add_argument("--runs", type=int, default=3, help="comparisons of steps alone and beside uploads")
    parser.add_argument(
        "--json", type=Path, default=Path("runs/benchmarks/checkpoint.json"), help="path of the JSON file"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        stop_server = start_s3(work)
        try:
            figures = measure(options.data, work, options.repeat, options.runs)
        finally:
            stop_server()
    write_json(options.json, figures)
    for key, value in figures.items():
        print(f"{key:<44}{value:>12,.3f}")


def start_s3(work: Path) -> Callable[[], None]:
    """Start the tests' S3 server and set the AWS variables; return the function that stops it."""
    import conftest

    class TemporaryFolders:
        """The part of pytest's `tmp_path_factory` that the fixture uses."""

        def mktemp(self, name: str) -> Path:
            (work / name).mkdir()
            return work / name

    # A real S3 server runs on another machine, so this one gets the lowest priority on these cores.
    priority = os.nice(0)
    os.setpriority(os.PRIO_PROCESS, 0, 19)
    server: Any = conftest.serve_s3(TemporaryFolders())
    os.environ.update(conftest.aws_variables(next(server)))
    os.setpriority(os.PRIO_PROCESS, 0, priority)
    S3Store("s3://bench/run").client.create_bucket(Bucket="bench")
    stop: Callable[[], None] = server.close
    return stop


def measure(data: Path, work: Path, repeat: int, runs: int) -> dict[str, float]:
    """All figures: seconds unless the name says otherwise."""
    dataset, store = open_dataset(data), S3Store("s3://bench/run")
    config = recipe_config(data, out=work / "run", preset="baby")  # `seconds_to_resume` must use the same settings
    bert = new_model(config, dataset)
    training_step = TrainingStep.of(bert, config)
    optimizer = training_step.optimizer
    # Batches of long pairs take five times as long as those of short ones, so all measurements use the same batches.
    batches = list(itertools.islice(Loader(dataset.examples("train"), config.batch_size, 0).epoch(0), BATCHES))

    def seconds_of_steps() -> list[float]:
        return [seconds_of(partial(training_step, batch)) for batch in batches]

    seconds_of_steps()
    times: defaultdict[str, list[float]] = defaultdict(list)
    config.out.mkdir()
    for step in range(1, repeat + 1):
        folder = config.out / checkpoint_name(step)
        state = CheckpointState(
            step, 0, 0, 0.0, 0, dataset.tokenizer.digest, config.as_json(), dataset.digest, scores=None
        )
        save = partial(save_checkpoint, config.out, state, bert, dataset.tokenizer, optimizer)
        times["save"].append(seconds_of(save))
        times["upload"].append(seconds_of(partial(store.upload, folder)))
        times["download"].append(seconds_of(partial(store.download, step, work / "fetched")))
        times["load"].append(
            seconds_of(partial(load_model, folder)) + seconds_of(partial(load_optimizer, folder, optimizer))
        )
        store.prune(1)
    last = config.out / checkpoint_name(repeat)
    times["resume"] = [seconds_to_resume(data, last, work / f"resumed-{run}") for run in range(3)]
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(seconds_of, partial(store.upload, last))
        while not upload.done():
            training_step(batches[0])
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "checkpoint_mb": sum(path.stat().st_size for path in last.iterdir()) / 1e6,
        "save_local": medians["save"],
        "upload": medians["upload"],
        "upload_while_training_needs_all_cores": upload.result(),
        "download_and_verify": medians["download"],
        "load_into_model_and_optimizer": medians["load"],
        "start_to_first_step_of_a_resume": medians["resume"],
        **measure_concurrent_steps(store, last / TRAINING, seconds_of_steps, runs),
    }


def measure_concurrent_steps(
    store: S3Store, file: Path, seconds_of_steps: Callable[[], list[float]], runs: int
) -> dict[str, float]:
    """What endless uploads add to the steps beside them, in percent: by a process, and by a thread (the peer).

    A run compares the sums over all batches of the median over all rounds. "Nothing" shows how much the machine itself
    varies between two measurements: its other threads only sleep.
    """
    added: defaultdict[str, list[float]] = defaultdict(list)
    with UploadProcess() as process:
        ways: dict[str, Callable[[], None]] = {
            "nothing": partial(time.sleep, 0.01),
            "process": partial(process.upload, file, store.bucket, store.key("by-process")),
            "thread": partial(_upload_by_thread, store, file),
        }
        process.upload(Path(__file__), store.bucket, store.key("first"))  # so that it has started
        for _, (way, upload) in itertools.product(range(runs), ways.items()):
            beside, alone = [], []
            for _ in range(ROUNDS):
                beside.append(during_uploads(upload, seconds_of_steps))
                alone.append(seconds_of_steps())
            added[way].append(100 * (_sum_of_medians(beside) / _sum_of_medians(alone) - 1))
    for way, percents in added.items():
        print(f"uploads by {way}, percent added in each run:", *(f"{percent:.1f}" for percent in sorted(percents)))
    return {f"percent_added_with_uploads_by_{way}": statistics.median(percents) for way, percents in added.items()}


def _sum_of_medians(rounds: list[list[float]]) -> float:
    return sum(float(statistics.median(seconds)) for seconds in zip(*rounds, strict=True))


def during_uploads(upload: Callable[[], None], action: Callable[[], list[float]]) -> list[float]:
    """The result of the action while another thread calls `upload` again and again."""
    stop = threading.Event()

    def upload_repeatedly() -> None:
        while not stop.is_set():
            upload()

    with ThreadPoolExecutor(1) as pool:
        uploads = pool.submit(upload_repeatedly)
        try:
            result = action()
        finally:
            stop.set()
        uploads.result()  # raises what the thread has raised
    return result


def _upload_by_thread(store: S3Store, file: Path) -> None:
    """Upload by this thread. On Linux each thread has its own priority, and boto3's threads inherit this one's."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)
    store.client.upload_file(str(file), store.bucket, store.key("by-thread"))


def seconds_to_resume(data: Path, checkpoint: Path, out: Path) -> float:
    """Seconds from the start of a process that resumes from `checkpoint` to the end of its first step."""
    flags = [
        f"--data={data}",
        f"--out={out}",
        "--preset=baby",
        f"--resume={checkpoint}",
        "--no-metrics",
        "--device=cpu",
        "--log-every=1",
    ]
    command = [sys.executable, "-m", "babybert.cli", "pretrain", *flags]
    metrics = out / "metrics.jsonl"
    start = time.perf_counter()
    job = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        while not metrics.exists() or not re.search('"train"', metrics.read_text()):
            assert job.poll() is None
            time.sleep(0.02)
        return time.perf_counter() - start
    finally:
        job.kill()
        job.wait()


if __name__ == "__main__":
    main()
