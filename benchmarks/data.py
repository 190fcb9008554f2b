"""Speed of data preparation and loading, compared with the reference and Hugging Face on the same reviews in one run.

    python benchmarks/data.py aclImdb_v1.tar.gz      # three to five minutes on two cores; needs '.[bench]'

Preparation: from the archive to sharded CSV, compared with tokenization alone (`tokenizers`, all cores, text in
memory, known vocabulary) and with the reference's loop, which runs on a sample of the reviews because all of them
would take hours. Memory and time by corpus size are measured on JSON Lines of 5,000 to 100,000 documents (50,000
reviews, each at most twice). Loading: pairs/s of batches of 256 pairs of at most 64 positions in the second epoch,
compared with the reference's `Dataset`, `datasets` with `DataCollatorForLanguageModeling`, and the rate at which
training steps consume pairs.

Figures are medians of `--repeat` runs in which peers and ours take turns. Each size runs once, because the result is
the line through all sizes.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import TrainingStep, new_model, preset_config, seconds_of, write_json
from data_peers import hugging_face_loader, reference_loader, reference_prepare

from babybert.config import PrepareConfig
from babybert.corpus.documents import open_corpus
from babybert.corpus.files import BadRows
from babybert.data.dataset import Dataset, open_dataset
from babybert.data.loader import DynamicMasking, Loader
from babybert.data.tokenizer import Tokenizer

BATCH_SIZE, POSITIONS = 256, 64
CORPUS_SIZES = (5_000, 10_000, 20_000, 50_000, 100_000)
TOKENIZE_AT_ONCE = 1000  # documents in one call


def main() -> None:
    """Run all measurements, print tables, write JSON."""
    parser = argparse.ArgumentParser(description="Measure data preparation and loading.")
    parser.add_argument("archive", help="the IMDB archive")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each measurement; medians are reported")
    parser.add_argument("--sample", type=int, default=150, help="reviews on which the reference's preparation is timed")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/data.json"), help="path of the JSON file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        texts = read_texts(options.archive, work)
        figures = {
            "machine": {"cores": os.cpu_count(), "torch": torch.__version__, "reviews": len(texts)},
            "preparing": measure_preparing(options.archive, texts, work, options.repeat, options.sample),
            "sizes": measure_sizes(texts, work),
            "loading": measure_loading(options.archive, work, options.repeat),
        }
    print(f"\nwritten: {write_json(options.json, figures)}")


def read_texts(archive: str, work: Path) -> list[str]:
    """All reviews, in memory."""
    config = PrepareConfig(corpus="imdb", source=(archive,))
    return [document.text for document in open_corpus(config, work, BadRows()).documents("read")]


# The process reads its own peak of memory, because the parent's view of a child includes the parent's pages.
PREPARE = """
import sys
from babybert.cli import main
code = main(["prepare", *sys.argv[1:], "--overwrite"])
print("peak kB:", open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
sys.exit(code)
"""


def run_prepare(*arguments: str) -> tuple[float, float]:
    """Seconds and peak memory (GiB) of one `babybert prepare`, including the start of Python."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", PREPARE, *arguments], capture_output=True, text=True, check=True)
    return time.perf_counter() - start, int(done.stdout.split("peak kB:")[1]) / 2**20


def measure_preparing(archive: str, texts: list[str], work: Path, repeat: int, sample_size: int) -> dict[str, float]:
    """Ours from the archive, tokenization alone, and the reference's loop on a sample."""
    ours, peaks, tokenizing, reference = [], [], [], []
    sample = random.Random(0).sample(texts, sample_size)
    for _ in range(repeat):
        seconds, peak = run_prepare("--corpus=imdb", f"--source={archive}", f"--out={work / 'imdb'}")
        ours.append(seconds)
        peaks.append(peak)
        tokenizing.append(seconds_to_tokenize(Tokenizer.load(work / "imdb" / "tokenizer.json"), texts))
        reference.append(seconds_of(lambda: reference_prepare(sample, work / "reference.csv")))
    ours_seconds, tokenizing_seconds = statistics.median(ours), statistics.median(tokenizing)
    ours_rate, reference_rate = len(texts) / ours_seconds, sample_size / statistics.median(reference)
    figures = {
        "ours_seconds": ours_seconds,
        "ours_reviews_per_second": ours_rate,
        "ours_peak_gib": max(peaks),
        "tokenizing_alone_seconds": tokenizing_seconds,
        "reference_reviews_per_second": reference_rate,
        "times_tokenizing_alone": ours_seconds / tokenizing_seconds,
        "times_reference_rate": ours_rate / reference_rate,
    }
    print(f"\nPreparing, {len(texts):,} reviews, archive to sharded CSV (medians of {repeat})")
    print(f"  ours                 {ours_seconds:8.1f} s {ours_rate:10,.0f} reviews/s   peak {max(peaks):.2f} GiB")
    print(
        f"  tokenization alone   {tokenizing_seconds:8.1f} s   "
        f"ours takes {figures['times_tokenizing_alone']:.2f} times as long"
    )
    print(
        f"  the reference's loop            {reference_rate:10,.1f} reviews/s   "
        f"ours is {figures['times_reference_rate']:,.0f} times as fast"
    )
    return figures


def seconds_to_tokenize(tokenizer: Tokenizer, texts: list[str]) -> float:
    """Seconds to tokenize all texts."""

    def tokenize() -> None:
        # The ids are kept until the end, as a preparation without our files of tokens would.
        _ = [
            tokenizer.encode_documents(texts[start : start + TOKENIZE_AT_ONCE])
            for start in range(0, len(texts), TOKENIZE_AT_ONCE)
        ]

    return seconds_of(tokenize)


def measure_sizes(texts: list[str], work: Path) -> list[dict[str, float]]:
    """JSON Lines of each size to CSV. The largest contains every review twice, the second time with one more word."""
    shuffled = random.Random(0).sample(texts, len(texts))
    documents = [*shuffled, *(f"{text} again" for text in shuffled)]
    for size in CORPUS_SIZES:
        with (work / f"{size}.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in documents[:size])
    runs = []
    print("\nBy size, JSON Lines to CSV")
    for size in CORPUS_SIZES:
        seconds, peak = run_prepare("--corpus=jsonl", f"--source={work / f'{size}.jsonl'}", f"--out={work / 'sized'}")
        runs.append({"documents": size, "seconds": seconds, "peak_gib": peak})
        print(f"  {size:>7,} documents {seconds:7.1f} s {size / seconds:8,.0f} documents/s   peak {peak:.2f} GiB")
    growth = fit_growth(runs)
    print(
        f"  time grows as size to the power of {growth['exponent']:.2f} (5,000 to 50,000): "
        f"{growth['fixed_seconds']:.1f} s to start and {growth['seconds_a_document'] * 1000:.3f} ms a document"
    )
    print(f"  twice the corpus takes {growth['memory_of_twice_the_corpus']:.2f} times the memory")
    return [*runs, growth]


def fit_growth(runs: list[dict[str, float]]) -> dict[str, float]:
    """How time and memory grow with the size of the corpus."""
    single = [run for run in runs if run["documents"] <= 50_000]
    log_documents = [math.log(run["documents"]) for run in single]
    exponent = np.polyfit(log_documents, [math.log(run["seconds"]) for run in single], 1)[0]
    slope, intercept = np.polyfit([run["documents"] for run in runs], [run["seconds"] for run in runs], 1)
    return {
        "exponent": float(exponent),
        "fixed_seconds": float(intercept),
        "seconds_a_document": float(slope),
        "memory_of_twice_the_corpus": runs[-1]["peak_gib"] / runs[-2]["peak_gib"],
    }


def measure_loading(archive: str, work: Path, repeat: int) -> dict[str, float]:
    """Pairs/s of each loader, and of training."""
    prepared = work / "short"
    flags = (f"--max-positions={POSITIONS}", "--shard-mb=1000")
    run_prepare("--corpus=imdb", f"--source={archive}", f"--out={prepared}", *flags)
    dataset = open_dataset(prepared)
    train = dataset.examples("train")
    static = Loader(train, BATCH_SIZE, 0)
    dynamic = Loader(train, BATCH_SIZE, 0, masking=DynamicMasking(dataset.tokenizer.size, 0))
    loaders: dict[str, tuple[Callable[[], Iterator[Any]], int]] = {  # and the number of batches to time
        "ours, static masks": (lambda: static.epoch(1), 400),
        "ours, dynamic masks": (lambda: dynamic.epoch(1), 400),
        "reference": (reference_loader(dataset, BATCH_SIZE, POSITIONS), 4),
        "datasets + collator": (hugging_face_loader(dataset, BATCH_SIZE), 8),
    }
    training_steps = {"baby": 3, "tiny": 6}
    rates: dict[str, list[float]] = {name: [] for name in (*loaders, "train baby", "train tiny")}
    for _ in range(repeat):
        for name, (make_iterator, batches) in loaders.items():
            rates[name].append(loading_rate(make_iterator(), batches))
        for preset, steps in training_steps.items():
            rates[f"train {preset}"].append(training_rate(dataset, preset, steps))
    figures = {name: statistics.median(values) for name, values in rates.items()}
    dynamic_rate = figures["ours, dynamic masks"]
    print(f"\nLoading, batches of {BATCH_SIZE} pairs of at most {POSITIONS} positions, second epoch")
    for name, rate in figures.items():
        print(f"  {name:<22}{rate:>12,.0f} pairs/s   ours (dynamic) is {dynamic_rate / rate:8.1f} times as fast")
    ours = min(figures["ours, static masks"], dynamic_rate)
    figures["times_reference"] = ours / figures["reference"]
    figures["times_training"] = ours / max(figures["train baby"], figures["train tiny"])
    return figures


def loading_rate(iterator: Iterator[Any], batches: int) -> float:
    """Pairs/s of an iterator over batches. The first batch is not timed: it opens files and shuffles the epoch."""
    next(iterator)
    return batches * BATCH_SIZE / seconds_of(lambda: [None for _ in islice(iterator, batches)])


def training_rate(dataset: Dataset, preset: str, steps: int) -> float:
    """Pairs/s of whole training steps, batches included."""
    config = preset_config(dataset.folder, preset, batch_size=BATCH_SIZE, device="cpu")
    training_step = TrainingStep.of(new_model(config, dataset), config)
    batches = Loader(dataset.examples("train"), BATCH_SIZE, 0).epoch(0)

    def run_steps(steps: int) -> None:
        for batch in islice(batches, steps):
            training_step(batch)

    run_steps(1)
    return steps * BATCH_SIZE / seconds_of(lambda: run_steps(steps))


if __name__ == "__main__":
    main()
