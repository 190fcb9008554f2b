"""What a checkpoint costs: saving, loading, uploading beside training, and the time from start to first step.

    python benchmarks/checkpoint.py --data data/imdb      # five minutes on two cores; starts an S3 server of its own

All with the preset `baby` (3.2 million parameters; a checkpoint of weights, two Adam moments and tokenizer) and a local
SeaweedFS. Steps with and without an upload beside them take turns; medians and ratios are printed, and written as JSON.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from learn import settings

from babybert.checkpoint.format import TrainState, load_model, restore, save_checkpoint
from babybert.checkpoint.storage import S3Store
from babybert.checkpoint.uploader import Uploader
from babybert.data.dataset import open_dataset
from babybert.data.loader import Loader
from babybert.model.loss import PretrainingModel
from babybert.training.distributed import DistributedContext, backward
from babybert.training.metrics import RunMetrics
from babybert.training.train import load_or_create, make_optimizer

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


def main() -> None:
    """Run everything, print it, write JSON."""
    parser = argparse.ArgumentParser(description="Measure checkpoints.")
    parser.add_argument("--data", type=Path, default=Path("data/imdb"), help="prepared IMDB")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each measurement; medians are reported")
    parser.add_argument(
        "--json", type=Path, default=Path("runs/benchmarks/checkpoint.json"), help="where the figures go"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        stop = start_s3(work)
        try:
            found = measure(options.data, work, options.repeat)
        finally:
            stop()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=2) + "\n")
    for key, value in found.items():
        print(f"{key:<44}{value:>12,.3f}")


def start_s3(work: Path) -> Callable[[], None]:
    """The tests' server, with the AWS variables set; returns what stops it."""
    import conftest

    class Folders:
        def mktemp(self, name: str) -> Path:
            (work / name).mkdir()
            return work / name

    own = os.nice(0)
    os.setpriority(os.PRIO_PROCESS, 0, 19)  # a server elsewhere would take nothing from these cores
    server: Any = conftest.serve_s3(Folders())
    os.environ.update(conftest.aws_variables(next(server)))
    os.setpriority(os.PRIO_PROCESS, 0, own)
    S3Store("s3://bench/run").client.create_bucket(Bucket="bench")
    return server.close


def measure(data: Path, work: Path, repeat: int) -> dict[str, float]:
    """All figures; seconds unless the name says otherwise."""
    dataset, store = open_dataset(data), S3Store("s3://bench/run")
    config = settings(data, out=work / "run", preset="baby")  # of `resume` below, which must be the same
    bert = load_or_create(config, dataset, dataset.token_counts(), None)
    model, optimizer, parallel = (
        PretrainingModel(bert),
        make_optimizer(bert, config),
        DistributedContext("single", torch.device("cpu"), bf16=False),
    )
    batches = Loader(dataset.examples("train"), config.batch_size, 0).epoch(0)

    def steps(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            backward(model, next(batches), parallel)
            torch.nn.utils.clip_grad_norm_(bert.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return (time.perf_counter() - begin) / count

    steps(2)
    facts = {"settings": config.as_json(), "data_digest": dataset.digest}
    saves, uploads, downloads, loads, alone, beside = [], [], [], [], [], []
    config.out.mkdir()
    for number in range(1, repeat + 1):
        saves.append(
            timed(
                lambda number=number: save_checkpoint(
                    config.out, TrainState(number), bert, dataset.tokenizer, optimizer, facts
                )
            )
        )  # type: ignore[misc]
        folder = config.out / f"step-{number:08d}"
        uploads.append(timed(lambda folder=folder: store.upload(folder)))  # type: ignore[misc]
        downloads.append(timed(lambda number=number: store.download(number, work / "fetched")))  # type: ignore[misc]
        loads.append(timed(lambda folder=folder: (load_model(folder), restore(folder, optimizer))))  # type: ignore[misc]
        alone.append(steps(5))
        ended = threading.Event()
        thread = threading.Thread(target=upload_until, args=(store, folder, ended))
        thread.start()
        beside.append(steps(5))
        ended.set()
        thread.join()
        store.prune(1)
    a, b = statistics.median(alone), statistics.median(beside)
    return {
        "checkpoint_mb": sum(path.stat().st_size for path in folder.iterdir()) / 1e6,
        "save_local": statistics.median(saves),
        "upload": statistics.median(uploads),
        "download_and_verify": statistics.median(downloads),
        "load_into_model_and_optimizer": statistics.median(loads),
        "step": a,
        "step_beside_an_endless_upload": b,
        "upload_adds_percent_to_the_steps_beside_it": 100 * (b / a - 1),
        "start_to_first_step_of_a_resume": statistics.median(
            resume(data, folder, work / f"resumed-{number}") for number in range(3)
        ),
    }


def upload_until(store: S3Store, folder: Path, ended: threading.Event) -> None:
    """Again and again, by the uploader of a run, so that every measured step has an upload beside it."""
    uploader = Uploader(store, 1, RunMetrics(), folder / "no-curve")
    while not ended.is_set():
        uploader.submit(folder)
        while uploader.in_use:
            time.sleep(0.01)
    uploader.finish(60)


def resume(data: Path, checkpoint: Path, out: Path) -> float:
    """Seconds from the start of the process to the end of its first step, from a checkpoint."""
    flags = [
        f"--data={data}",
        f"--out={out}",
        "--preset=baby",
        f"--resume={checkpoint}",
        "--no-metrics",
        "--device=cpu",
        "--log-every=1",
    ]
    begin = time.perf_counter()
    job = subprocess.Popen(
        [sys.executable, "-m", "babybert.cli", "pretrain", *flags], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        while not (out / "metrics.jsonl").exists() or not re.search('"train"', (out / "metrics.jsonl").read_text()):
            assert job.poll() is None
            time.sleep(0.02)
        return time.perf_counter() - begin
    finally:
        job.kill()
        job.wait()


def timed(action: Callable[[], Any]) -> float:
    """Seconds that it supports."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
