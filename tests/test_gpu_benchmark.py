"""`benchmarks/gpu.py`: a machine with a GPU is rare, so that the script has to work the first time."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = run_script()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "no GPU" in done.stderr


@pytest.mark.slow
@pytest.mark.system
def test_a_rehearsal_runs_each_part_and_passes_all_checks(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = run_script("--rehearse", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    parts = [row["part"] for row in result["rows"]]
    assert {name: parts.count(name) for name in parts} == {"checks": 10, "steps": 2, "kernels": 2, "epoch": 1}
    assert not any("problem" in row for row in result["rows"])
    assert result["skipped"] == []
    report = (tmp_path / "gpu.md").read_text()
    assert "10 of 10 checks passed" in report
    assert "What `--kernels auto` should pick" in report


def test_a_case_that_breaks_is_a_failed_check_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu
    import gpu_report

    broken = [gpu.Case(("checks", "head"), 0.01), gpu.Case(("steps", "baby", "auto"), 0.01)]
    monkeypatch.setattr(gpu, "cases", lambda rehearse: [*broken, gpu.Case(("epoch", "baby", "auto"), 60)])
    monkeypatch.setattr(gpu, "SHORTEST_CASE", 1000.0)
    options = Namespace(rehearse=True, data=None, budget=100.0)
    assert gpu.run_all(options)["skipped"] == [case.name for case in gpu.cases(True)]
    rows = [row for case in broken for row in gpu.run_case(case, case.seconds, options)]
    assert [row["part"] for row in rows] == ["checks", "steps"]
    assert rows[0]["passed"] is False
    assert all("not done after 0 s" in row["problem"] for row in rows)
    result = {"machine": "a GPU", "rehearsal": False, "rows": rows, "skipped": ["epoch baby auto"], "seconds": 1.0}
    report = gpu_report.format_report(result)
    assert "0 of 1 checks passed" in report
    assert "- failed: steps steps baby auto: not done" in report
    assert "- skipped, no time left: epoch baby auto" in report


def test_an_error_of_one_kernel_is_a_row_of_the_report() -> None:
    pytest.importorskip("triton")
    import gpu_checks

    def out_of_memory() -> tuple[float, float]:
        raise RuntimeError("out of shared memory")

    row = gpu_checks._guarded("head", "(1, 2, 3)", "fp32", out_of_memory)
    assert row["passed"] is False
    assert row["problem"] == "RuntimeError: out of shared memory"
    assert gpu_checks._guarded("head", "", "fp32", lambda: (1e-3, 1e-5))["passed"] is False
    assert gpu_checks._guarded("head", "", "bf16", lambda: (1e-3, 1e-5))["passed"] is True
