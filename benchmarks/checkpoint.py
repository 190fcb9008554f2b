"""The cost of a checkpoint: saving, loading, uploading during training, and the time from start to first step.

    python benchmarks/checkpoint.py --data data/imdb      # five minutes on two cores; starts a local S3 server

All measurements use the preset `baby` (3.2 million parameters; a checkpoint contains weights, two Adam moments and
the tokenizer) and a local SeaweedFS. Steps with and without a concurrent upload take turns. Prints medians and
ratios, and writes them as JSON.
"""

import argparse
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
from functools import partial
from pathlib import Path
from typing import Any

from common import TrainingStep, new_model, recipe_config, seconds_of, write_json
from prometheus_client import CollectorRegistry

from babybert.checkpoint.checkpoint_metrics import CheckpointMetrics
from babybert.checkpoint.format import CheckpointState, checkpoint_name, load_model, load_optimizer, save_checkpoint
from babybert.checkpoint.storage import S3Store
from babybert.checkpoint.uploader import Uploader
from babybert.data.dataset import open_dataset
from babybert.data.loader import Loader

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


def main() -> None:
    """Run all measurements, print them, write JSON."""
    parser = argparse.ArgumentParser(description="Measure checkpoints.")
    parser.add_argument("--data", type=Path, default=Path("data/imdb"), help="prepared IMDB")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each measurement; medians are reported")
    parser.add_argument(
        "--json", type=Path, default=Path("runs/benchmarks/checkpoint.json"), help="path of the JSON file"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        stop_server = start_s3(work)
        try:
            figures = measure(options.data, work, options.repeat)
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


def measure(data: Path, work: Path, repeat: int) -> dict[str, float]:
    """All figures: seconds unless the name says otherwise."""
    dataset, store = open_dataset(data), S3Store("s3://bench/run")
    config = recipe_config(data, out=work / "run", preset="baby")  # `seconds_to_resume` must use the same settings
    bert = new_model(config, dataset)
    training_step = TrainingStep.of(bert, config)
    optimizer = training_step.optimizer
    batches = Loader(dataset.examples("train"), config.batch_size, 0).epoch(0)

    def run_steps(steps: int) -> None:
        for _ in range(steps):
            training_step(next(batches))

    def seconds_a_step() -> float:
        return seconds_of(lambda: run_steps(5)) / 5

    run_steps(2)
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
        times["step alone"].append(seconds_a_step())
        times["step during upload"].append(seconds_during_uploads(store, folder, seconds_a_step))
        store.prune(1)
    last = config.out / checkpoint_name(repeat)
    times["resume"] = [seconds_to_resume(data, last, work / f"resumed-{run}") for run in range(3)]
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "checkpoint_mb": sum(path.stat().st_size for path in last.iterdir()) / 1e6,
        "save_local": medians["save"],
        "upload": medians["upload"],
        "download_and_verify": medians["download"],
        "load_into_model_and_optimizer": medians["load"],
        "step": medians["step alone"],
        "step_during_an_upload": medians["step during upload"],
        "upload_adds_percent_to_concurrent_steps": 100 * (medians["step during upload"] / medians["step alone"] - 1),
        "start_to_first_step_of_a_resume": medians["resume"],
    }


def seconds_during_uploads(store: S3Store, folder: Path, measure_steps: Callable[[], float]) -> float:
    """The result of `measure_steps` while a checkpoint is uploaded again and again."""
    stop = threading.Event()
    thread = threading.Thread(target=_upload_repeatedly, args=(store, folder, stop))
    thread.start()
    seconds = measure_steps()
    stop.set()
    thread.join()
    return seconds


def _upload_repeatedly(store: S3Store, folder: Path, stop: threading.Event) -> None:
    """Upload with a run's uploader, so that every measured step has a concurrent upload."""
    uploader = Uploader(store, 1, CheckpointMetrics(CollectorRegistry()), folder / "no-curve")
    while not stop.is_set():
        uploader.submit(folder)
        while uploader.in_use:
            time.sleep(0.01)
    uploader.finish(60)


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
