"""How long a busy neighbour makes training, serving and `prepare` wait, by how long OpenMP's threads spin.

    python benchmarks/shared_cores.py --data data/imdb        # about 25 minutes on two cores

An OpenMP thread that waits at a barrier spins before it sleeps. On a quiet machine spinning is faster than sleeping. On
shared cores it takes the time that the other threads need to reach the barrier. Each workload runs in a new process
with each setting, on a quiet machine and beside one busy loop per core. The loops run in sessions of their own, because
Linux shares cores evenly between sessions, not between processes. With even shares, a workload takes twice as long
beside them. Settings take turns, and medians are compared. Prints a table and writes JSON.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common import seconds_of, write_json

# Variables of libgomp. Without any, libgomp spins 300,000 times. The package sets GOMP_SPINCOUNT unless it is set.
SETTINGS: dict[str, dict[str, str]] = {
    "libgomp's default": {"GOMP_SPINCOUNT": "300000"},
    "100000": {"GOMP_SPINCOUNT": "100000"},
    "10000": {"GOMP_SPINCOUNT": "10000"},
    "1000": {"GOMP_SPINCOUNT": "1000"},
    "0": {"GOMP_SPINCOUNT": "0"},
}
WORKLOADS = ("baby", "mini", "serving", "prepare")
WORKLOAD_SECONDS = 4.0
DEMO_DOCUMENTS = 4000


def main() -> None:
    """Measure all settings and print how long each workload takes."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/imdb"), help="prepared data")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each setting and workload")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for shared_cores.json")
    parser.add_argument("--workload", choices=WORKLOADS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.workload:
        print(run_workload(options.workload, options.data))
        return
    medians = {}
    for neighbours in ("quiet", "shared"):
        with busy_loops() if neighbours == "shared" else contextlib.nullcontext():
            for workload in WORKLOADS:
                medians[f"{workload}, {neighbours}"] = measure(workload, options.data, options.rounds)
    print_table(medians)
    write_json(options.out / "shared_cores.json", medians)


@contextlib.contextmanager
def busy_loops() -> Iterator[None]:
    """One busy process per core, each in a session of its own."""
    command = [sys.executable, "-c", "while True: pass"]
    loops = [subprocess.Popen(command, start_new_session=True) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def measure(workload: str, data: Path, rounds: int) -> dict[str, float]:
    """The median milliseconds of a workload's unit, by setting."""
    times: dict[str, list[float]] = {name: [] for name in SETTINGS}
    command = [sys.executable, __file__, "--data", str(data), "--workload", workload]
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for _ in range(rounds):
        for name, variables in SETTINGS.items():
            done = subprocess.run(
                command, env={**inherited, **variables}, stdout=subprocess.PIPE, text=True, check=True
            )
            times[name].append(float(done.stdout.split()[-1]))
    return {name: statistics.median(values) for name, values in times.items()}


def run_workload(workload: str, data: Path) -> float:
    """Milliseconds of one training step, one batch of requests, or one `prepare` of the demo."""
    if workload == "prepare":
        return 1000 * prepare_seconds()
    seconds = []
    for step_seconds in serving_seconds(data) if workload == "serving" else training_seconds(workload, data):
        seconds.append(step_seconds)
        if sum(seconds) > WORKLOAD_SECONDS and len(seconds) > 5:
            return 1000 * statistics.median(seconds[2:])  # the first steps compile kernels
    raise AssertionError("the workloads never end")


def training_seconds(preset: str, data: Path) -> Iterator[float]:
    """The time of each training step of `preset` at batch 32, without end."""
    import torch
    from step_variants import make_step, truncated_batches

    from babybert.data.dataset import open_dataset

    dataset = open_dataset(data)
    step = make_step("ours", dataset, data, preset, torch.device("cpu"))
    for batch in truncated_batches(dataset, 32, 64):
        start = time.perf_counter()
        step(batch)
        yield time.perf_counter() - start


def serving_seconds(data: Path) -> Iterator[float]:
    """The time of each batch of eight requests to `mini`, whose attention and head use all threads, without end."""
    import torch
    from common import new_model, preset_config

    from babybert.data.dataset import open_dataset
    from babybert.serving.predictor import Predictor
    from babybert.serving.request_schema import FillMask

    dataset = open_dataset(data)
    threads = torch.get_num_threads()
    predictor = Predictor(new_model(preset_config(data, "mini"), dataset), dataset.tokenizer, True, threads)
    requests = [FillMask("one of the worst [MASK] that i have ever seen .")] * 8
    while True:
        yield seconds_of(lambda: predictor.predict(requests))


def prepare_seconds() -> float:
    """The time of `babybert prepare` of generated reviews."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--corpus=demo", f"--demo-documents={DEMO_DOCUMENTS}", f"--out={folder}/data"]
        command = [sys.executable, "-m", "babybert.cli", "prepare", *flags]
        return seconds_of(
            lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        )


def print_table(medians: dict[str, dict[str, float]]) -> None:
    """One row for each workload and kind of machine; times and their ratio to libgomp's default."""
    print(f"\nmilliseconds by GOMP_SPINCOUNT (times libgomp's default), {os.cpu_count()} cores")
    print(f"{'':20}" + "".join(f"{name:>22}" for name in SETTINGS))
    for row, times in medians.items():
        default = next(iter(times.values()))
        print(f"{row:20}" + "".join(f"{time_:>14,.1f} ({time_ / default:4.2f})" for time_ in times.values()))


if __name__ == "__main__":
    main()
