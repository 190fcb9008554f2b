"""Check and measure the GPU code of this project in one go: what no machine without a GPU can tell.

    make bench-gpu                       # under ten minutes on one NVIDIA GPU; generated data
    make bench-gpu DATA=data/imdb        # the same with a share of an epoch of prepared data

It checks the Triton kernels against float64, measures whole training steps by preset with each choice of `--kernels`
and through `torch.compile`, and says which of them `--kernels auto` should pick. Each case is a process of its own, so
that a kernel that breaks the GPU's context ends its own case only. Cases that the time budget leaves no room for are
skipped and named. Writes `gpu.json` and `gpu.md`.

Exit codes: 0 if all checks passed, 1 if one failed or did not run, 2 without a GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import write_json
from gpu_report import format_report

from babybert.config import PRESETS
from babybert.model.triton_policy import WIDEST_AUTO

Row = dict[str, Any]
BUDGET_SECONDS = 570.0
SHORTEST_CASE = 10.0  # with less time left, a case is not started


@dataclass(frozen=True)
class Case:
    """A process: the words of `--case`, and the most seconds that it may take."""

    words: tuple[str, ...]
    seconds: float

    @property
    def name(self) -> str:
        """The words as one."""
        return " ".join(self.words)


def cases(rehearse: bool) -> list[Case]:
    """All cases, the most important ones first."""
    if rehearse:
        words = (
            "checks head",
            "checks feed-forward",
            "checks model",
            "steps baby plain",
            "kernels head",
            "epoch baby plain",
        )
        return [Case(tuple(line.split()), 120) for line in words]
    plan = [("checks " + name, 90) for name in ("head", "feed-forward", "model")]
    plan += [(f"kernels {name}", 90) for name in ("head", "feed-forward")]
    for kernels in ("auto", "plain", "triton"):
        plan += [(f"steps {preset} {kernels}", 60) for preset in PRESETS if kernels != "triton" or _adds_triton(preset)]
    plan += [("epoch baby auto", 60), ("epoch baby plain", 60), ("epoch small auto", 60)]
    plan += [(f"steps {preset} compiled", 120) for preset in ("baby", "small", "medium", "mini", "tiny")]
    return [Case(tuple(line.split()), seconds) for line, seconds in plan]


def _adds_triton(preset: str) -> bool:
    """Whether the Triton kernels support the width of a preset, and "auto" does not use them."""
    return WIDEST_AUTO < int(PRESETS[preset]["width"]) <= 64


def main() -> int:
    """Run all cases, write the report, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="prepared data; without it, generated data")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder for gpu.json and gpu.md")
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="seconds after which cases are skipped")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="run a few small cases on the CPU, with Triton's interpreter: shows that this script works, measures "
        "nothing",
    )
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        for row in rows_of_case(options.case, options):
            print(json.dumps(row), flush=True)
        return 0
    if not options.rehearse and not torch.cuda.is_available():
        print("gpu.py: no GPU is visible to PyTorch; --rehearse runs small cases on the CPU", file=sys.stderr)
        return 2
    result = {"machine": describe_machine(), "rehearsal": options.rehearse, **run_all(options)}
    json_path = write_json(options.out / "gpu.json", result)
    report = format_report(result)
    (options.out / "gpu.md").write_text(report)
    print(f"\n{report}\nwritten: {json_path}, {options.out / 'gpu.md'}")
    checks = [row for row in result["rows"] if row["part"] == "checks"]
    return int(not checks or not all(row["passed"] for row in checks) or any("checks" in s for s in result["skipped"]))


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """The rows of all cases, and what was skipped."""
    start = time.monotonic()
    rows: list[Row] = []
    skipped: list[str] = []
    for case in cases(options.rehearse):
        left = options.budget - (time.monotonic() - start)
        if left < SHORTEST_CASE:
            skipped.append(case.name)
            print(f"{case.name}: skipped, the time budget of {options.budget:.0f} s is spent", flush=True)
            continue
        begin = time.monotonic()
        new_rows = list(run_case(case, min(left, case.seconds), options))
        rows += new_rows
        problems = [row["problem"] for row in new_rows if "problem" in row]
        print(
            f"{case.name}: {len(new_rows)} rows in {time.monotonic() - begin:.0f} s", *problems, sep="\n  ", flush=True
        )
    return {"rows": rows, "skipped": skipped, "seconds": time.monotonic() - start}


def run_case(case: Case, seconds: float, options: argparse.Namespace) -> Iterator[Row]:
    """The rows that the process of a case printed, and one more if it did not come to its end."""
    flags = [f"--data={options.data}"] if options.data else []
    flags += ["--rehearse"] if options.rehearse else []
    command = [sys.executable, __file__, *flags, "--case", *case.words]
    environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if options.rehearse else {})}
    problem = ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
        output = done.stdout
        if done.returncode:
            problem = f"exit code {done.returncode}: {' '.join(done.stderr.strip().splitlines()[-2:])}"[:500]
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout.decode() if isinstance(expired.stdout, bytes) else expired.stdout or ""
        problem = f"not done after {seconds:.0f} s"
    for line in output.splitlines():
        if line.startswith("{") and line.endswith("}"):
            yield json.loads(line)
    if problem:
        failed = {"passed": False, "kernel": case.words[1], "shape": "", "precision": ""}
        yield {
            "part": case.words[0],
            "case": case.name,
            "problem": problem,
            **(failed if case.words[0] == "checks" else {}),
        }


def rows_of_case(words: list[str], options: argparse.Namespace) -> Iterator[Row]:
    """The rows of one case, computed in this process."""
    import gpu_cases
    import gpu_checks

    device = torch.device("cpu" if options.rehearse else "cuda")
    part, name, *variant = words
    if part == "checks":
        return gpu_checks.checks(name, device, options.rehearse)
    if part == "kernels":
        return gpu_cases.kernels(name, device, options.rehearse)
    kernels: Any = "plain" if variant[0] == "compiled" else variant[0]
    if part == "steps":
        return gpu_cases.steps(name, kernels, variant[0] == "compiled", device, options.rehearse)
    return gpu_cases.epoch(name, kernels, options.data, device, options.rehearse)


def describe_machine() -> str:
    """The GPU and the versions that decide its speed."""
    versions = f"torch {torch.__version__}"
    if not torch.cuda.is_available():
        return f"no GPU, {versions}"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {versions}"


if __name__ == "__main__":
    sys.exit(main())
