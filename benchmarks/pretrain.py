"""Speed and memory of whole training steps, compared with three peers on the same batches and with the roofline.

    python benchmarks/pretrain.py --data data/imdb        # three minutes on two cores; needs `pip install '.[bench]'`
    python benchmarks/pretrain.py --data data/imdb-wordpiece --wide        # mini, small and medium, also in bf16

A step is making the batch, forward, backward, clipping and optimizer. The variants take turns, and medians are
compared. Memory is the peak of a separate process that runs steps of one variant only. Prints tables, writes JSON and
a figure.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import seconds_of, write_json
from roofline import Rates, flops_of_step, measure_rates, roofline_seconds
from step_variants import VARIANTS, Step, make_step, truncated_batches

from babybert.config import model_config
from babybert.data.dataset import Dataset, open_dataset
from babybert.data.loader import Batch

Case = dict[str, Any]
ALL_VARIANTS: tuple[str, ...] = ("reference", "hugging face", "plain", "ours")
PLAIN_AND_OURS, OURS = ALL_VARIANTS[2:], ALL_VARIANTS[3:]
WARM_UP_STEPS = 25  # of ours in bf16: oneDNN compiles a product for each shape, and a run soon knows them all
WIDE_VARIANTS = ("hugging face", "hugging face bf16", "plain", "plain bf16", "ours")


def main() -> None:
    """Run every case and print it, write JSON and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/imdb"), help="prepared IMDB")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeat", type=int, default=5, help="rounds in which each variant runs one step")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmarks"), help="folder for pretrain.json and pretrain.svg"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="measure torch.compile too, where plain PyTorch is measured; takes some minutes more",
    )
    parser.add_argument(
        "--wide", action="store_true", help="measure the wide presets, also in bf16; for data of WordPiece tokens"
    )
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the cases to run")
    parser.add_argument(
        "--memory-of", nargs=4, metavar=("VARIANT", "PRESET", "BATCH", "POSITIONS"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    dataset, device = open_dataset(options.data), torch.device(options.device)
    if options.memory_of:
        print(peak_gib(dataset, options, device))
        return
    rates = measure_rates(device)
    print(
        f"{describe(device)}: {2e-9 * rates.multiply_adds:,.0f} GFLOP/s, "
        f"{1e-9 * rates.exponentials:.2f} G exp/s, {1e-9 * rates.bytes:.1f} GB/s"
    )
    measured = []
    for case_number, case in enumerate(wide_cases() if options.wide else cases(device)):
        if options.only is None or case_number in options.only:
            if options.compile and "plain" in case["variants"]:
                case["variants"] += ("compiled",)
            measured.append(measure(dataset, options, device, rates, case))
            print_case(case_number, measured[-1], len(dataset.examples("train")))
    result = {"machine": describe(device), "rates": vars(rates), "cases": measured}
    name = "pretrain-wide" if options.wide else "pretrain"
    json_path = write_json(options.out / f"{name}.json", result)
    print_growth(measured)
    draw(measured, options.out / f"{name}.svg")
    print(f"written: {json_path}, {options.out}/{name}.svg")


def cases(device: torch.device) -> list[Case]:
    """The main case with all peers first; then ours and plain PyTorch by batch size, length and preset."""
    if device.type == "cuda":
        sizes = [
            *itertools.product(("baby",), (32, 512, 4096), (64,)),
            ("baby", 512, 32),
            ("baby", 512, 128),
            ("tiny", 512, 64),
            ("mini", 512, 64),
        ]
        variants = {("baby", 32, 64): ALL_VARIANTS, ("baby", 512, 64): ALL_VARIANTS}
    else:
        sizes = [
            *itertools.product(("baby",), (32, 6, 8, 128, 512), (64,)),
            ("baby", 32, 32),
            ("baby", 32, 128),
            ("tiny", 32, 64),
            ("mini", 32, 64),
        ]
        variants = {
            ("baby", 32, 64): ALL_VARIANTS,
            ("baby", 6, 64): ALL_VARIANTS,
            ("baby", 512, 64): OURS,  # a step of plain PyTorch takes 20 s there
        }
    return [
        {
            "preset": preset,
            "batch": batch,
            "positions": positions,
            "variants": variants.get((preset, batch, positions), PLAIN_AND_OURS),
        }
        for preset, batch, positions in sizes
    ]


def wide_cases() -> list[Case]:
    """The presets that are wide enough for bf16 on a CPU, at the sizes of their recipes."""
    return [
        {"preset": preset, "batch": 64, "positions": 64, "variants": WIDE_VARIANTS}
        for preset in ("mini", "small", "medium")
    ]


def measure(dataset: Dataset, options: argparse.Namespace, device: torch.device, rates: Rates, case: Case) -> Case:
    """Median time of a step of each variant, the peak of its memory, and the roofline."""
    steps = {name: make_step(name, dataset, options.data, case["preset"], device) for name in case["variants"]}
    batches = truncated_batches(dataset, case["batch"], case["positions"])
    times: dict[str, list[float]] = {name: [] for name in steps}
    tokens, masked = [], []
    has_peers = not {"reference", "hugging face"}.isdisjoint(case["variants"])
    rounds = options.repeat if has_peers else min(options.repeat, 3)
    for _ in range(WARM_UP_STEPS if "plain bf16" in steps else 0):
        steps["ours"](next(batches).to(device))
    for _ in range(rounds + 1):
        start = time.perf_counter()
        batch = next(batches)
        batch_seconds = time.perf_counter() - start
        tokens.append(int((batch.ids_BT > 0).sum()))
        masked.append(int((batch.labels_BT > 0).sum()))
        for name, step in steps.items():
            times[name].append(batch_seconds + _step_seconds(step, batch, device))
    median_tokens, median_masked = statistics.median(tokens), statistics.median(masked)
    sizes = model_config(case["preset"], dataset.tokenizer.size)
    roofline = roofline_seconds(sizes, median_tokens, median_masked, rates)
    flops = flops_of_step(sizes, median_tokens, median_masked, case["positions"])
    results = {}
    for name, (first_seconds, *later_seconds) in times.items():  # the first step compiles kernels
        seconds = statistics.median(later_seconds)
        with_memory = case["batch"] >= 32 and case["positions"] == 64 and name != "compiled"
        results[name] = {
            "step_ms": 1000 * seconds,
            "pairs_per_second": case["batch"] / seconds,
            "tokens_per_second": median_tokens / seconds,
            "gflops": 1e-9 * flops / seconds,
            "first_step_s": first_seconds,
            "peak_gib": _peak_of_process(options, name, case) if with_memory else None,
        }
    return {
        **case,
        "tokens": median_tokens,
        "masked": median_masked,
        "roofline_ms": {kind: 1000 * seconds for kind, seconds in roofline.items()},
        "results": results,
    }


def _step_seconds(step: Step, batch: Batch, device: torch.device) -> float:
    def finished_step() -> None:
        step(batch.to(device))
        if device.type == "cuda":
            torch.cuda.synchronize()

    return seconds_of(finished_step)


def _peak_of_process(options: argparse.Namespace, variant: str, case: Case) -> float:
    memory_of = [variant, case["preset"], str(case["batch"]), str(case["positions"])]
    flags = [f"--data={options.data}", f"--device={options.device}", "--memory-of", *memory_of]
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def peak_gib(dataset: Dataset, options: argparse.Namespace, device: torch.device) -> float:
    """Peak memory of two steps: of the GPU, or of this whole process."""
    variant, preset, batch_size, positions = options.memory_of
    batches = truncated_batches(dataset, int(batch_size), int(positions))
    step = make_step(variant, dataset, options.data, preset, device)
    for _ in range(2):
        step(next(batches).to(device))
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20


def print_case(case_number: int, case: Case, pairs: int) -> None:
    """One case as a table."""
    print(
        f"\n[{case_number}] {case['preset']}, batch {case['batch']} x {case['positions']}: "
        f"{case['tokens']:,.0f} tokens, {case['masked']:,.0f} of them masked"
    )
    ours = case["results"]["ours"]
    for name, result in case["results"].items():
        notes = [f"peak {result['peak_gib']:.2f} GiB"] if result["peak_gib"] else []
        if name == "compiled":
            notes.append(f"first step {result['first_step_s']:.0f} s")
        print(
            f"  {name:<14}{result['step_ms']:>9,.1f} ms{result['pairs_per_second']:>10,.1f} pairs/s"
            f"{result['tokens_per_second']:>11,.0f} tokens/s{result['gflops']:>7,.0f} GFLOP/s   "
            f"ours is {ours['pairs_per_second'] / result['pairs_per_second']:6.1f} x as fast   {'   '.join(notes)}"
        )
    roofline_ms = sum(case["roofline_ms"].values())
    kinds = ", ".join(f"{kind} {ms:.1f}" for kind, ms in case["roofline_ms"].items())
    ratio = ours["step_ms"] / roofline_ms
    print(f"  roofline      {roofline_ms:>9,.1f} ms ({kinds}): ours takes {ratio:.1f} times as long")
    print(f"  an epoch of these {pairs:,} pairs by ours: {pairs / ours['pairs_per_second']:,.0f} s", flush=True)


def print_growth(measured: list[Case]) -> None:
    """Time for each pair and masked token, and memory, by batch size."""
    by_batch_size = [case for case in measured if case["preset"] == "baby" and case["positions"] == 64]
    by_batch_size.sort(key=lambda case: case["batch"])
    if by_batch_size:
        print("\nours by batch size, time of a step divided by its pairs and masked tokens")
    for case in by_batch_size:
        ours = case["results"]["ours"]
        memory = ""
        if ours["peak_gib"]:
            logits_gib = 4 * case["masked"] * 147_161 / 2**30
            memory = f"{ours['peak_gib']:.2f} GiB; N x V in fp32 would be {logits_gib:.2f}"
        print(
            f"  batch {case['batch']:>5}: {ours['step_ms'] / case['batch']:.3f} ms a pair, "
            f"{ours['step_ms'] / case['masked']:.3f} a masked token   {memory}"
        )


def draw(measured: list[Case], path: Path) -> None:
    """Plot the pairs/s of each variant in each case, on a logarithmic axis."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    names = [name for name in VARIANTS if any(name in case["results"] for case in measured)]
    bar_width = 0.8 / len(names)
    for index, name in enumerate(names):
        offset = bar_width * (index - (len(names) - 1) / 2)
        in_cases = [(x, case["results"][name]) for x, case in enumerate(measured) if name in case["results"]]
        rates = [result["pairs_per_second"] for _, result in in_cases]
        axes.bar([x + offset for x, _ in in_cases], rates, bar_width, label=name)
    axes.set_yscale("log")
    axes.set_ylabel("pairs/s")
    labels = [f"{case['preset']}\n{case['batch']} x {case['positions']}" for case in measured]
    axes.set_xticks(range(len(measured)), labels)
    axes.legend()
    axes.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def describe(device: torch.device) -> str:
    """The device in words."""
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
