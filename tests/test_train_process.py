"""`babybert pretrain` as a process: signals, full disks, ports, and what it imports."""

import functools
import re
import resource
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import COMMAND_SECONDS, babybert_command, run_babybert, start_babybert
from prometheus_client.parser import text_string_to_metric_families

from babybert.checkpoint.format import find_checkpoint, newest_valid
from babybert.config import PretrainConfig
from babybert.training import metrics as metrics_module
from babybert.training.train import pretrain

SIZES = ["--width=8", "--heads=2", "--layers=1", "--feed-forward=16", "--batch-size=8", "--device=cpu"]


def flags_of(data: Path, run: Path) -> list[str]:
    """The arguments of a small run."""
    return ["pretrain", f"--data={data}", f"--out={run}", *SIZES]


@pytest.mark.slow
def test_training_does_not_import_libraries_it_does_not_need(demo_folder: Path, tmp_path: Path) -> None:
    """Each costs memory and seconds."""
    flags = ["pretrain", *flags_of(demo_folder, tmp_path / "run")[1:], "--max-steps=2", "--no-metrics"]
    libraries = ("pandas", "pyarrow", "boto3", "torch._dynamo", "ts")
    script = (
        f"import sys; from babybert.cli import main; main({flags}); "
        f"print([name for name in {libraries} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=COMMAND_SECONDS)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_exits_143(
    demo_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = start_babybert(*flags_of(demo_folder, tmp_path), "--epochs=100000", "--metrics-port=0")
    try:
        url = job.wait_for_line("metrics: http").split()[-1]
        job.wait_for_line("step ")  # the end of the first epoch
        text = urllib.request.urlopen(url, timeout=5).read().decode()
        samples = {
            (sample.name, sample.labels.get("objective"), sample.labels.get("split")): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        assert samples["babybert_pretrain_pairs_total", None, None] > 0
        assert 0 < samples["babybert_pretrain_loss", "mlm", "validation"] < 6
        assert samples["babybert_checkpoint_saves_total", None, None] >= 0
        job.send_signal(signal.SIGTERM)
        code = job.wait()
    finally:
        job.kill()
    assert code == 143, job.output
    assert "the same command continues" in capfd.readouterr().out
    assert newest_valid(tmp_path) is not None


def limit_file_size(size: int) -> Callable[[], None]:
    """A limit on the size of files, which stands in for a full disk: writing fails in the same way."""
    return functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))


def run_with_limit(flags: list[str], size: int) -> subprocess.CompletedProcess[str]:
    """Run a command whose files may not grow beyond `size` bytes."""
    command = babybert_command(*flags)
    return subprocess.run(
        command, capture_output=True, text=True, timeout=COMMAND_SECONDS, preexec_fn=limit_file_size(size)
    )


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_the_older_checkpoint(demo_folder: Path, tmp_path: Path) -> None:
    flags = [*flags_of(demo_folder, tmp_path), "--no-metrics", "--log-every=1000000"]
    assert run_babybert(*flags, "--max-steps=2").returncode == 0
    for limit in (3_000, 8_000):  # within the weights, within the optimizer's state
        job = run_with_limit([*flags, "--max-steps=4"], limit)
        assert job.returncode == 1
        last_line = job.stderr.strip().splitlines()[-1]
        assert last_line.startswith("babybert pretrain: error:"), job.stderr
        assert "step-00000004" in last_line
        assert "Traceback" not in job.stderr
        assert [path.name for path in tmp_path.glob("*step-*")] == ["step-00000002"]
    assert find_checkpoint(tmp_path).name == "step-00000002"


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run_at_its_end(demo_folder: Path, tmp_path: Path) -> None:
    job = run_with_limit([*flags_of(demo_folder, tmp_path), "--no-metrics", "--epochs=3"], 3_000)
    assert job.returncode == 1
    assert job.stderr.count("held-out MLM") == 3
    assert job.stderr.count("cannot write the checkpoint") == 3
    assert job.stderr.strip().splitlines()[-1].startswith("babybert pretrain: error:")


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port of loopback that another process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_given_port_that_is_taken_is_an_error_before_anything_else(
    demo_folder: Path, tmp_path: Path, taken_port: int
) -> None:
    job = run_babybert(*flags_of(demo_folder, tmp_path / "run"), f"--metrics-port={taken_port}")
    assert job.returncode == 2
    assert f"127.0.0.1:{taken_port}" in job.stderr
    assert not (tmp_path / "run").exists()


def test_without_a_given_port_a_free_one_is_used(
    small: Callable[..., PretrainConfig],
    taken_port: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two runs on one machine do not disturb each other."""
    monkeypatch.setattr(metrics_module, "DEFAULT_PORT", taken_port)
    assert pretrain(small(max_steps=1, metrics=True)) is not None
    port = re.search(r"metrics: http://127\.0\.0\.1:(\d+)/metrics", caplog.text)
    assert port is not None and int(port[1]) != taken_port
    assert f"port {taken_port} is taken" in caplog.text
