"""Pairs/s and memory of whole training steps beside three peers on the same batches, and how near the floor ours comes.

    python benchmarks/pretrain.py --data data/imdb        # three minutes on two cores; needs `pip install '.[bench]'`

Forward, backward, clipping and optimizer are in a step, and making the batch is too. Ways take turns, and medians are
compared; memory is the peak of a process that takes steps of one way only. Prints tables, writes JSON, draws a chart.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from floor import Rates, floor_seconds, measure_rates
from ways import WAYS, batches_of, make_step

from babybert.config import model_config
from babybert.data.dataset import Dataset, open_dataset

Case = dict[str, Any]
ALL: tuple[str, ...] = ("reference", "hugging face", "plain", "ours")
TWO, OURS = ALL[2:], ALL[3:]


def main() -> None:
    """Run every case, print as they end, write JSON and the chart."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/imdb"), help="prepared IMDB")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeat", type=int, default=5, help="rounds in which each way has its turn")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmarks"), help="folder for pretrain.json and pretrain.svg"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile too, wherever the plain form is measured; some minutes more",
    )
    parser.add_argument("--only", type=int, nargs="*", help="cases to run, by their number")
    parser.add_argument("--memory-of", nargs=4, metavar=("WAY", "PRESET", "BATCH", "POSITIONS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    dataset, device = open_dataset(options.data), torch.device(options.device)
    if options.memory_of:
        print(peak_gib(dataset, options, device))
        return
    rates = measure_rates(device)
    print(
        f"{describe(device)}: {2e-9 * rates.multiply_adds:,.0f} GFLOP/s, {1e-9 * rates.exponentials:.2f} G exp/s, {1e-9 * rates.bytes:.1f} GB/s"
    )
    found = []
    for number, case in enumerate(cases(device)):
        if options.only is None or number in options.only:
            if options.compile and "plain" in case["ways"]:
                case["ways"] += ("compiled",)
            found.append(measure(dataset, options, device, rates, case))
            show(number, found[-1], len(dataset.examples("train")))
    options.out.mkdir(parents=True, exist_ok=True)
    result = {"machine": describe(device), "rates": vars(rates), "cases": found}
    (options.out / "pretrain.json").write_text(json.dumps(result, indent=2) + "\n")
    growth(found)
    draw(found, options.out / "pretrain.svg")
    print(f"written: {options.out}/pretrain.json, {options.out}/pretrain.svg")


def cases(device: torch.device) -> list[Case]:
    """The case of the claims first, with all peers; then ours and the plain form by batch size, length and preset."""
    if device.type == "cuda":
        sizes = [
            *itertools.product(("baby",), (32, 512, 4096), (64,)),
            ("baby", 512, 32),
            ("baby", 512, 128),
            ("tiny", 512, 64),
            ("mini", 512, 64),
        ]
        peers = {("baby", 32, 64): ALL, ("baby", 512, 64): ALL}
    else:
        sizes = [
            ("baby", 32, 64),
            ("baby", 6, 64),
            ("baby", 8, 64),
            ("baby", 128, 64),
            ("baby", 512, 64),
            ("baby", 32, 32),
            ("baby", 32, 128),
        ]
        sizes += [("tiny", 32, 64), ("mini", 32, 64)]
        peers = {
            ("baby", 32, 64): ALL,
            ("baby", 6, 64): ALL,
            ("baby", 512, 64): OURS,
        }  # there the plain form takes 20 s a step
    return [{"preset": p, "batch": b, "positions": t, "ways": peers.get((p, b, t), TWO)} for p, b, t in sizes]


def measure(dataset: Dataset, options: argparse.Namespace, device: torch.device, rates: Rates, case: Case) -> Case:
    """Median step and rates of each way, in turns, its peak of memory, and the floor of such steps."""
    steps = {way: make_step(way, dataset, options.data, case["preset"], device) for way in case["ways"]}
    batches = batches_of(dataset, case["batch"], case["positions"])
    times: dict[str, list[float]] = {way: [] for way in steps}
    first: dict[str, float] = {}
    tokens, masked = [], []
    rounds = options.repeat if "reference" in case["ways"] else min(options.repeat, 3)
    for turn in range(rounds + 1):
        begin = time.perf_counter()
        batch = next(batches)
        making = time.perf_counter() - begin
        tokens.append(int((batch.ids_BT > 0).sum()))
        masked.append(int((batch.labels_BT > 0).sum()))
        for way, step in steps.items():
            begin = time.perf_counter()
            step(batch.to(device))
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken = making + time.perf_counter() - begin
            if turn:
                times[way].append(taken)
            else:  # what was to be compiled has been
                first[way] = taken
    token, mask = statistics.median(tokens), statistics.median(masked)
    floor = floor_seconds(model_config(case["preset"], dataset.tokenizer.size), token, mask, rates)
    found: Case = {
        **case,
        "tokens": token,
        "masked": mask,
        "floor_ms": {name: 1000 * seconds for name, seconds in floor.items()},
        "found": {},
    }
    for way, all_taken in times.items():
        seconds = statistics.median(all_taken)
        peak = (
            _peak(options, way, case) if case["batch"] >= 32 and case["positions"] == 64 and way != "compiled" else None
        )
        found["found"][way] = {
            "step_ms": 1000 * seconds,
            "pairs_per_second": case["batch"] / seconds,
            "tokens_per_second": token / seconds,
            "first_step_s": first[way],
            "peak_gib": peak,
        }
    return found


def _peak(options: argparse.Namespace, way: str, case: Case) -> float:
    what = [way, case["preset"], str(case["batch"]), str(case["positions"])]
    command = [sys.executable, __file__, f"--data={options.data}", f"--device={options.device}", "--memory-of", *what]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def peak_gib(dataset: Dataset, options: argparse.Namespace, device: torch.device) -> float:
    """The most memory that two steps took: of the device, or of this whole process."""
    way, preset, batch, positions = options.memory_of
    batches, step = (
        batches_of(dataset, int(batch), int(positions)),
        make_step(way, dataset, options.data, preset, device),
    )
    for _ in range(2):
        step(next(batches).to(device))
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20


def show(number: int, case: Case, pairs: int) -> None:
    """One case as a table."""
    floor = sum(case["floor_ms"].values())
    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in case["floor_ms"].items())
    print(
        f"\n[{number}] {case['preset']}, batch {case['batch']} x {case['positions']}: {case['tokens']:,.0f} tokens, {case['masked']:,.0f} of them masked"
    )
    ours = case["found"]["ours"]["pairs_per_second"]
    for way, own in case["found"].items():
        peak = f"peak {own['peak_gib']:.2f} GiB" if own["peak_gib"] else ""
        peak += f"   first step {own['first_step_s']:.0f} s" if way == "compiled" else ""
        rate = f"{own['step_ms']:>9,.1f} ms{own['pairs_per_second']:>10,.1f} pairs/s{own['tokens_per_second']:>11,.0f} tokens/s"
        print(f"  {way:<14}{rate}   ours has {ours / own['pairs_per_second']:6.1f} x   {peak}")
    print(
        f"  floor         {floor:>9,.1f} ms ({parts}): ours takes {case['found']['ours']['step_ms'] / floor:.1f} times as long"
    )
    print(f"  an epoch of these {pairs:,} pairs by ours: {pairs / ours:,.0f} s", flush=True)


def growth(found: list[Case]) -> None:
    """How time grows with pairs and masked tokens, and memory with the batch, of the preset that was measured by batch size."""
    ladder = sorted(
        (case for case in found if case["preset"] == "baby" and case["positions"] == 64), key=lambda case: case["batch"]
    )
    if ladder:
        print("\nours by batch size: the same time a pair and a masked token, were all of it work")
    for case in ladder:
        own = case["found"]["ours"]
        peak = (
            f"{own['peak_gib']:.2f} GiB; N x V in fp32 would be {4 * case['masked'] * 147_161 / 2**30:.2f}"
            if own["peak_gib"]
            else ""
        )
        print(
            f"  batch {case['batch']:>5}: {own['step_ms'] / case['batch']:.3f} ms a pair, {own['step_ms'] / case['masked']:.3f} a masked token   {peak}"
        )


def draw(found: list[Case], path: Path) -> None:
    """Pairs/s of each way in each case, on a logarithmic axis."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    ways = [way for way in WAYS if any(way in case["found"] for case in found)]
    wide = 0.8 / len(ways)
    for place, way in enumerate(ways):
        points = [
            (i + wide * (place - (len(ways) - 1) / 2), case["found"][way]["pairs_per_second"])
            for i, case in enumerate(found)
            if way in case["found"]
        ]
        axes.bar([x for x, _ in points], [rate for _, rate in points], wide, label=way)
    axes.set_yscale("log")
    axes.set_ylabel("pairs/s")
    axes.set_xticks(range(len(found)), [f"{case['preset']}\n{case['batch']} x {case['positions']}" for case in found])
    axes.legend()
    axes.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def describe(device: torch.device) -> str:
    """The device in words."""
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
