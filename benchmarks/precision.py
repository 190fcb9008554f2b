"""What bf16 costs in quality: held-out loss of runs in bf16 and fp32, next to that of runs with other seeds.

    python benchmarks/precision.py --data data/imdb-wordpiece               # `small`, 500 steps, two seeds each
    python benchmarks/precision.py --data data/imdb-wordpiece --steps 40    # a trial
    python benchmarks/precision.py --data data/imdb-wordpiece --batch-size 8 --jobs 2    # two cores without bf16

Each run is `babybert pretrain` with the preset's recipe and a schedule of so many steps, and one scoring of held-out
pairs in fp32 at its end. A run in bf16 sees the same batches, masks and initial weights as the one in fp32 with its
seed. Dropout differs where the preset has it. The difference that bf16 makes should be well below that of a seed.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import CPU, write_json

from babybert.checkpoint.format import find_checkpoint, load_model
from babybert.data.dataset import open_dataset
from babybert.evaluation.scores import evaluate_held_out
from babybert.model.device import has_fast_bf16

PRECISIONS = ("fp32", "bf16")
MEASURES = ("mlm_loss", "nsp_loss", "mlm_top1", "nsp_accuracy")
Scores = dict[str, float]


def main() -> None:
    """Train, score, print the differences, and write JSON."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/imdb-wordpiece"), help="prepared data")
    parser.add_argument("--preset", default="small", choices=("mini", "small", "medium"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, help="pairs in a batch [default: the recipe's]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="at least two")
    parser.add_argument("--pairs", type=int, default=4096, help="held-out pairs to score")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the threads")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for precision.json")
    options = parser.parse_args()
    if len(options.seeds) < 2:
        parser.error("--seeds: give at least two, so that there is a difference to compare with")
    if not has_fast_bf16(CPU):
        print("this processor has neither AMX nor AVX512-BF16: bf16 will be slow", file=sys.stderr)
    torch.set_num_threads(max(1, torch.get_num_threads() // options.jobs))
    print(f"{options.preset}, {options.steps} steps, {options.jobs} x {torch.get_num_threads()} threads", flush=True)
    runs = list(itertools.product(PRECISIONS, options.seeds))
    scores: dict[str, Scores] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda run: train_and_score(options, *run), runs)
        for (precision, seed), run_scores in zip(runs, results, strict=True):
            scores[f"{precision}, seed {seed}"] = run_scores
            line = ", ".join(f"{name} {value:.4f}" for name, value in run_scores.items())
            print(f"  {precision}, seed {seed}: {line}", flush=True)
    differences = {name: compare(scores, options.seeds, name) for name in MEASURES}
    print("\nmean differences        bf16 and fp32, one seed    two seeds, one precision    ratio")
    for name, (of_precision, of_seed) in differences.items():
        ratio = f"{of_precision / of_seed:.3f}" if of_seed else ""
        print(f"  {name:<22}{of_precision:>23.5f}{of_seed:>28.5f}{ratio:>9}")
    path = write_json(options.out / "precision.json", {"scores": scores, "differences": differences})
    print(f"written: {path}")


def train_and_score(options: argparse.Namespace, precision: str, seed: int) -> Scores:
    """Held-out scores of a run, computed in fp32, and the seconds that its training took."""
    with tempfile.TemporaryDirectory() as folder:
        flags: dict[str, Any] = {
            "data": options.data,
            "out": Path(folder) / "run",
            "preset": options.preset,
            "max-steps": options.steps,
            "seed": seed,
            "precision": precision,
            "validation-pairs": 64,
            "device": "cpu",
        }
        if options.batch_size:
            flags["batch-size"] = options.batch_size
        command = [sys.executable, "-m", "babybert.cli", "pretrain", "--no-metrics"]
        start = time.perf_counter()
        command += [f"--{name}={value}" for name, value in flags.items()]
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(command, capture_output=True, env=environment)
        if done.returncode:
            raise SystemExit(done.stderr.decode())
        seconds = time.perf_counter() - start
        dataset = open_dataset(options.data)
        bert, _ = load_model(find_checkpoint(Path(folder) / "run"))
        examples = dataset.examples("validation").first(options.pairs)
        held_out = evaluate_held_out(bert, examples, dataset.token_counts(), 64, CPU).as_dict()
    return {**{name: held_out[name] or 0.0 for name in MEASURES}, "seconds": seconds}


def compare(scores: dict[str, Scores], seeds: list[int], measure: str) -> tuple[float, float]:
    """Mean differences of one score: between the precisions with one seed, and between seeds in one precision."""

    def value(precision: str, seed: int) -> float:
        return scores[f"{precision}, seed {seed}"][measure]

    of_precision = [abs(value("bf16", seed) - value("fp32", seed)) for seed in seeds]
    of_seed = [
        abs(value(precision, one) - value(precision, other))
        for precision in PRECISIONS
        for one, other in itertools.combinations(seeds, 2)
    ]
    return statistics.fmean(of_precision), statistics.fmean(of_seed)


if __name__ == "__main__":
    main()
