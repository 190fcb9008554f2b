import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from babybert.jit import compile_kernels

pytestmark = pytest.mark.serial

PLAIN_MACHINE = """
import torch
from numba.core.config import CPU_NAME
from babybert.config import ModelConfig
from babybert.model.bert import BabyBert
from babybert.model.loss import PretrainingModel
torch.manual_seed(0)
model = PretrainingModel(BabyBert(ModelConfig(vocab_size=5000, dropout=0.0, feed_forward=64)))
ids = torch.randint(5, 5000, (2, 9))
for kernels in ("auto", "plain"):
    model.bert.set_kernels(kernels)
    print(CPU_NAME, float(model(ids, ids * (ids % 3 == 0), torch.ones_like(ids), torch.tensor([0, 1]))["mlm_sum"]))
"""


@pytest.mark.slow
def test_kernels_run_on_a_machine_without_avx_and_are_compiled_once(tmp_path: Path) -> None:
    """numba compiles for a processor that is named; this one has SSE2 only."""
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    job = subprocess.run([sys.executable, "-c", PLAIN_MACHINE], env=environment, capture_output=True, text=True)
    assert job.returncode == 0, job.stderr
    (name, ours), (_, plain) = (line.split() for line in job.stdout.splitlines())
    assert name == "generic"
    assert float(ours) == pytest.approx(float(plain), rel=1e-5)
    compiled = sorted(path.name for path in tmp_path.rglob("*.nbc"))
    assert compiled
    subprocess.run([sys.executable, "-c", PLAIN_MACHINE], env=environment, check=True, capture_output=True)
    assert sorted(path.name for path in tmp_path.rglob("*.nbc")) == compiled  # the second process compiles nothing


MANY_THREADS = """
import torch
from babybert.config import ModelConfig
from babybert.model.bert import BabyBert
from babybert.model.kernels.cpu_math import threads_for
from babybert.model.loss import PretrainingModel
for threads in (1, 64):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = PretrainingModel(BabyBert(ModelConfig(vocab_size=300_000)))
    ids = torch.randint(5, 5000, (70, 20))
    sums = model(ids, ids * (ids % 7 == 0), torch.ones_like(ids), torch.arange(70) % 2)
    (sums["mlm_sum"] + sums["nsp_sum"]).sum().backward()
    gradients = [float(parameter.grad.norm()) for parameter in model.parameters()]
    print(torch.get_num_threads(), threads_for(1400, 16), float(sums["mlm_sum"]), *gradients)
"""


@pytest.mark.slow
def test_sixty_four_threads_compute_what_one_does() -> None:
    """There are fewer cores here, but the shares, sums over threads and dropout masks are those of a large machine."""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "64"}
    job = subprocess.run([sys.executable, "-c", MANY_THREADS], env=environment, capture_output=True, text=True)
    assert job.returncode == 0, job.stderr
    alone, together = ([float(word) for word in line.split()] for line in job.stdout.splitlines())
    assert (alone[:2], together[:2]) == ([1, 1], [64, 64])  # PyTorch's number of threads is as it was set
    assert together[2:] == pytest.approx(alone[2:], rel=1e-4, abs=1e-6)


WIDE = """
import numba
from numba.core.codegen import get_host_cpu_features
import babybert.jit
expected = None
if "+avx512f" in get_host_cpu_features().split(","):
    expected = get_host_cpu_features() + ",-prefer-256-bit"
assert numba.config.CPU_FEATURES == expected, numba.config.CPU_FEATURES
"""


def test_vectors_are_as_wide_as_the_processor_has_them_unless_set() -> None:
    unset = {name: value for name, value in os.environ.items() if name != "NUMBA_CPU_FEATURES"}
    subprocess.run([sys.executable, "-c", WIDE], env=unset, check=True)
    features_kept = "import numba, babybert.jit; assert numba.config.CPU_FEATURES == '+avx2'"
    subprocess.run([sys.executable, "-c", features_kept], env={**unset, "NUMBA_CPU_FEATURES": "+avx2"}, check=True)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
)
@pytest.mark.slow
def test_waiting_threads_spin_for_a_short_time_unless_set(variables: dict[str, str], expected: str) -> None:
    unset = {name: value for name, value in os.environ.items() if name not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}}
    job = subprocess.run(
        [sys.executable, "-c", "import babybert, torch"],
        env={**unset, **variables, "OMP_DISPLAY_ENV": "verbose"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert f"GOMP_SPINCOUNT = '{expected}'" in job.stderr


class Kernel:
    """A kernel that numba cannot write to its cache at the first call, or at no call at all."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.calls: list[int] = []

    def __call__(self, argument: int) -> None:
        self.calls.append(argument)
        if len(self.calls) <= self.failures:
            raise OSError("No space left on device")


def test_kernels_are_made_once_for_each_width_and_without_a_cache_where_there_is_no_folder() -> None:
    made = []

    def make(width: int, cache: bool) -> tuple[Any]:
        made.append((width, cache))
        if cache and width == 7:
            raise RuntimeError("cannot cache function: no locator available")
        return (Kernel(0),)

    kernels_for = compile_kernels(make)
    for width in (3, 7, 3, 7):
        kernels_for(width)
    assert made == [(3, True), (7, True), (7, False)]


def maker(kernel: Kernel) -> Callable[[int, bool], tuple[Any]]:
    return lambda width, cache: (kernel,)


def test_a_full_disk_is_ignored_and_other_errors_are_not() -> None:
    for failures in (0, 1):
        kernel = Kernel(failures)
        compile_kernels(maker(kernel))(0)[0](5)
        assert kernel.calls == [5] * (failures + 1)
    with pytest.raises(OSError, match="No space left"):
        compile_kernels(maker(Kernel(2)))(0)[0](5)
