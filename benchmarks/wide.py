"""Training steps of wide models on a CPU: ours, plain PyTorch and Hugging Face's model, in fp32 and bf16.

    make bench-wide                          # 25 minutes on two cores; needs `pip install '.[bench]'`
    python benchmarks/wide.py --minutes 5    # the most important cases only
    python benchmarks/wide.py --only 0 1     # cases by number

Batches are generated. In each case the variants take turns, and medians are compared. The roofline is what a step must
do, at rates that are measured in the same run: products in bf16, exponentials, and passes over the parameters. On a
processor without bf16, where it is many times slower than fp32, everything is in fp32. Cases that the time leaves no
room for are named. Prints tables, and writes `wide.json`, `wide.md` and `wide.svg`.
"""

import argparse
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import CPU, TrainingStep, preset_config, seconds_of, write_json
from generated_batches import generated_batch
from roofline import ADAM_PASSES, OTHER_PASSES, Rates, flops_of_step, measure_rates
from step_variants import Step, hugging_face_model_of, hugging_face_step

from babybert.config import ModelConfig, PretrainConfig
from babybert.model.bert import BabyBert
from babybert.model.device import has_fast_bf16

Row = dict[str, Any]
FP32_VARIANTS = ("hugging face", "plain", "ours")
BF16_VARIANTS = ("hugging face", "hugging face bf16", "plain", "plain bf16", "ours")
MODELS = ("mini", "small", "medium", "512 x 8")
SHAPES, VOCABULARIES = ((64, 64), (32, 128)), (8192, 30_522)
BATCHES = 3  # different batches, which take turns; oneDNN has compiled their products after the first turn
SHORTEST_CASE = 20.0  # seconds; with less time left, a case is not started


@dataclass(frozen=True)
class Case:
    """One model with one vocabulary, and the shape of its batches."""

    model: str
    vocabulary: int
    pairs: int
    positions: int

    @property
    def name(self) -> str:
        """The case in words."""
        return f"{self.model}, {self.pairs} x {self.positions}, {self.vocabulary:,} tokens"

    def config(self, kernels: str, precision: str) -> PretrainConfig:
        """The configuration of a run."""
        settings: dict[str, Any] = {"device": "cpu", "kernels": kernels, "precision": precision}
        preset = "medium" if self.model == "512 x 8" else self.model
        if preset != self.model:
            settings |= {"width": 512, "layers": 8, "heads": 8, "feed_forward": 2048}
        return preset_config(Path("generated"), preset, batch_size=self.pairs, **settings)

    def step(self, variant: str) -> Step:
        """A function that runs one training step of a variant."""
        precision = "auto" if variant == "ours" else "bf16" if variant.endswith("bf16") else "fp32"
        config = self.config("auto" if variant == "ours" else "plain", precision)
        sizes = config.sizes(self.vocabulary)
        torch.manual_seed(0)
        if variant.startswith("hugging face"):
            return hugging_face_step(hugging_face_model_of(sizes), CPU, precision == "bf16")
        return TrainingStep.of(BabyBert(sizes).set_kernels(config.kernels), config)


def cases() -> list[Case]:
    """All cases, the most important ones first."""
    return [
        Case(model, vocabulary, pairs, positions)
        for vocabulary in VOCABULARIES
        for pairs, positions in SHAPES
        for model in MODELS
    ]


def main() -> None:
    """Run the cases that the time has room for, print them, and write the files."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=25.0, help="no case starts after this time")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the cases to run")
    parser.add_argument("--rounds", type=int, default=3, help="turns that count, of each variant")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for wide.json, .md and .svg")
    parser.add_argument("--memory-of", nargs=2, metavar=("VARIANT", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(peak_gib(options.memory_of[0], cases()[int(options.memory_of[1])]))
        return
    start = time.monotonic()
    rates = measure_rates(CPU)
    fp32_products, in_bf16 = rates.multiply_adds, ""
    if has_fast_bf16(CPU):
        rates = replace(rates, multiply_adds=measure_bf16_products())
        in_bf16 = f"{2e-9 * rates.multiply_adds:,.0f} GFLOP/s in bf16, "
    machine = (
        f"{torch.get_num_threads()} threads; products: {in_bf16}{2e-9 * fp32_products:,.0f} GFLOP/s in fp32; "
        f"{1e-9 * rates.exponentials:.2f} G exp/s; {1e-9 * rates.bytes:.1f} GB/s"
    )
    print(machine)
    rows: list[Row] = []
    skipped: list[str] = []
    for number, case in enumerate(cases()):
        if options.only is not None and number not in options.only:
            continue
        left = 60 * options.minutes - (time.monotonic() - start)
        if left < max(
            SHORTEST_CASE, 1.5 * max((row["seconds"] for row in rows if row["model"] == case.model), default=0)
        ):
            skipped.append(case.name)
            continue
        rows.append(measure(number, case, options.rounds, rates))
        print_row(rows[-1])
    for name in skipped:
        print(f"skipped, no time left: {name}")
    if not rows:
        raise SystemExit("no case was measured; give more --minutes")
    write_json(options.out / "wide.json", {"machine": machine, "cases": rows, "skipped": skipped})
    (options.out / "wide.md").write_text(f"{machine}\n\n{format_table(rows)}\n")
    draw(rows, options.out / "wide.svg")
    print(f"written: {options.out}/wide.json, wide.md and wide.svg")


def measure_bf16_products() -> float:
    """Multiply-adds of a large product in bf16 in a second, the median of five."""
    size = 2048
    a, b = torch.randn(size, size).bfloat16(), torch.randn(size, size).bfloat16()
    times = [seconds_of(lambda: a @ b) for _ in range(6)]
    return size**3 / statistics.median(times[1:])


def measure(number: int, case: Case, rounds: int, rates: Rates) -> Row:
    """Speed of each variant, its share of the roofline, and its peak memory in the first cases."""
    start = time.monotonic()
    batches = [generated_batch(case.pairs, case.positions, case.vocabulary, CPU, seed) for seed in range(BATCHES)]
    tokens = statistics.fmean(int((batch.ids_BT > 0).sum()) for batch in batches)
    masked = statistics.fmean(int((batch.labels_BT > 0).sum()) for batch in batches)
    sizes = case.config("auto", "auto").sizes(case.vocabulary)
    parameters = sum(parameter.numel() for parameter in BabyBert(sizes).parameters())
    variants = BF16_VARIANTS if has_fast_bf16(CPU) else FP32_VARIANTS
    steps = {variant: case.step(variant) for variant in variants}
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for batch in batches:
        steps["ours"](batch)
    for turn in range(rounds + 1):
        for variant, step in steps.items():
            batch = batches[turn % BATCHES]
            times[variant].append(seconds_of(lambda s=step, b=batch: s(b)))  # type: ignore[misc]
    flops = flops_of_step(sizes, tokens, masked, case.positions)
    roofline = roofline_of_step(sizes, tokens, masked, case.positions, parameters, rates)
    results = {}
    for variant, of_turns in times.items():
        seconds = statistics.median(of_turns[1:])
        results[variant] = {
            "step_ms": 1000 * seconds,
            "tokens_per_second": tokens / seconds,
            "gflops": 1e-9 * flops / seconds,
            "roofline_share": sum(roofline.values()) / seconds,
            "peak_gib": _peak_of_process(variant, number) if number < len(MODELS) else None,
        }
    return {
        **vars(case),
        "number": number,
        "name": case.name,
        "tokens": tokens,
        "masked": masked,
        "roofline_ms": {kind: 1000 * seconds for kind, seconds in roofline.items()},
        "results": results,
        "seconds": time.monotonic() - start,
    }


def roofline_of_step(
    sizes: ModelConfig, tokens: float, masked: float, positions: int, parameters: int, rates: Rates
) -> dict[str, float]:
    """Seconds of a step by kind of work: what the plain model computes, once, one kind after the other."""
    exponentials = masked * sizes.vocab_size + tokens * positions * sizes.heads * sizes.layers
    return {
        "products": flops_of_step(sizes, tokens, masked, positions) / 2 / rates.multiply_adds,
        "exponentials": exponentials / rates.exponentials,
        "bytes": 4 * parameters * (ADAM_PASSES + OTHER_PASSES) / rates.bytes,
    }


def _peak_of_process(variant: str, number: int) -> float:
    command = [sys.executable, __file__, "--memory-of", variant, str(number)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def peak_gib(variant: str, case: Case) -> float:
    """Peak memory of two steps, of this whole process."""
    step = case.step(variant)
    for seed in range(2):
        step(generated_batch(case.pairs, case.positions, case.vocabulary, CPU, seed))
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20


def print_row(row: Row) -> None:
    """One case as a table."""
    roofline_ms = sum(row["roofline_ms"].values())
    kinds = ", ".join(f"{kind} {ms:.1f}" for kind, ms in row["roofline_ms"].items())
    print(f"\n[{row['number']}] {row['name']}: {row['tokens']:,.0f} tokens; roofline {roofline_ms:.0f} ms ({kinds})")
    ours = row["results"]["ours"]
    for variant, result in row["results"].items():
        memory = f"   peak {result['peak_gib']:.2f} GiB" if result["peak_gib"] else ""
        print(
            f"  {variant:<18}{result['step_ms']:>9,.0f} ms{result['tokens_per_second']:>9,.0f} tokens/s"
            f"{result['gflops']:>7,.0f} GFLOP/s{result['roofline_share']:>6.0%} of the roofline   "
            f"ours is {result['step_ms'] / ours['step_ms']:.1f} x as fast{memory}",
            flush=True,
        )


def format_table(rows: list[Row]) -> str:
    """All cases as one Markdown table, in tokens/s."""
    variants = list(rows[0]["results"])
    plain = [variant for variant in variants if variant.startswith("plain")]
    headers = ["model, batch, vocabulary", *variants, "ours / better plain", "ours, GFLOP/s", "of the roofline"]
    headers += [f"peak of {plain[-1]} and ours, GiB"]
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)]]
    for row in rows:
        results, ours = row["results"], row["results"]["ours"]
        best_plain = max(results[name]["tokens_per_second"] for name in plain)
        peaks = (results[plain[-1]]["peak_gib"], ours["peak_gib"])
        lines.append(
            [
                row["name"],
                *(f"{results[variant]['tokens_per_second']:,.0f}" for variant in variants),
                f"{ours['tokens_per_second'] / best_plain:.1f}",
                f"{ours['gflops']:,.0f}",
                f"{ours['roofline_share']:.0%}",
                " / ".join(f"{peak:.2f}" for peak in peaks if peak),
            ]
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def draw(rows: list[Row], path: Path) -> None:
    """Plot the tokens/s of each variant in each case, on a logarithmic axis."""
    from matplotlib import pyplot

    variants = list(rows[0]["results"])
    figure, axes = pyplot.subplots(figsize=(max(6, 1.1 * len(rows)), 4.5))
    bar_width = 0.8 / len(variants)
    for index, variant in enumerate(variants):
        offset = bar_width * (index - (len(variants) - 1) / 2)
        rates = [row["results"][variant]["tokens_per_second"] for row in rows]
        axes.bar([x + offset for x in range(len(rows))], rates, bar_width, label=variant)
    axes.set_yscale("log")
    axes.set_ylabel("tokens/s")
    labels = [f"{row['model']}\n{row['pairs']} x {row['positions']}\n{row['vocabulary']:,}" for row in rows]
    axes.set_xticks(range(len(rows)), labels, fontsize=8)
    axes.legend()
    axes.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
