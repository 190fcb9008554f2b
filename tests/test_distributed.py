import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from babybert.checkpoint.format import load_model, newest_valid
from babybert.data.loader import Loader
from babybert.model.loss import PretrainingModel
from babybert.training.distributed import DistributedContext, backward
from babybert.training.train import load_or_create, pretrain

TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc-per-node=2",
    "--master-port=0",
    "--rdzv-backend=c10d",
    "--rdzv-endpoint=127.0.0.1:0",
]


def flags(config):
    names = (
        "data",
        "out",
        "width",
        "heads",
        "layers",
        "feed_forward",
        "batch_size",
        "device",
        "log_every",
        "epochs",
        "lr",
        "accumulate",
        "dropout",
    )
    given = [
        f"--{name.replace('_', '-')}={getattr(config, name)}" for name in names if getattr(config, name) is not None
    ]
    return ["-m", "babybert.cli", "pretrain", "--preset=tiny", "--no-metrics", *given]


def torchrun(config):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*TORCHRUN, *flags(config)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_train_what_one_does(small, tmp_path, accumulate):
    """The same global batches, the last with one pair only: one process has nothing in it. No dropout: it differs by process."""
    settings = {"batch_size": 73, "epochs": 2, "lr": 1e-3, "accumulate": accumulate, "log_every": 1}
    alone = pretrain(small(out=tmp_path / "one", **settings))
    config = small(out=tmp_path / "two", **settings)
    job = torchrun(config)
    output, _ = job.communicate(timeout=180)
    assert job.returncode == 0, output
    assert "in 2 processes" in output
    assert output.count("held-out MLM") == 2  # one process speaks for both
    one, other = load_model(alone.checkpoint)[0].state_dict(), load_model(newest_valid(config.out))[0].state_dict()
    assert newest_valid(config.out).name == alone.checkpoint.name
    for name, tensor in one.items():
        if name.endswith(
            "in_proj_bias"
        ):  # the keys' bias has no influence: its gradient is rounding, which Adam scales up
            width = len(tensor) // 3
            tensor[width : 2 * width] = other[name][width : 2 * width]
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-5)
    said = [
        re.findall(r'"mlm_loss": ([\d.]+)', (tmp_path / run / "metrics.jsonl").read_text()) for run in ("one", "two")
    ]
    assert [float(x) for x in said[1]] == pytest.approx([float(x) for x in said[0]], abs=1e-4)


@pytest.mark.parametrize("parts", [2, 3, 8, 100])
def test_parts_of_a_step_have_the_gradient_of_the_whole(small, demo, parts):
    """Sums over the counts of the whole: parts with few chosen words weigh little."""
    bert = load_or_create(small(), demo, demo.token_counts(), None)
    model, parallel = PretrainingModel(bert), DistributedContext("single", torch.device("cpu"), bf16=False)
    batch = next(Loader(demo.examples("train"), 11, 0).epoch(0))
    whole = backward(model, batch, parallel)
    expected = {name: parameter.grad.clone() for name, parameter in bert.named_parameters()}
    bert.zero_grad()
    totals = backward(model, batch, parallel, parts)
    for name, parameter in bert.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
    for name, value in vars(whole).items():
        torch.testing.assert_close(getattr(totals, name), value)


@pytest.mark.slow
def test_processes_stop_together_and_one_goes_on_from_there(small, tmp_path):
    config = small(out=tmp_path / "run", epochs=2000)
    job = torchrun(config)
    deadline = time.monotonic() + 120
    while newest_whole_quietly(config.out) is None:
        assert time.monotonic() < deadline
        assert job.poll() is None, job.stdout.read()
        time.sleep(0.2)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=120)
    assert "saving a checkpoint" in output
    stopped = newest_valid(config.out)
    again = pretrain(small(out=tmp_path / "run", max_steps=int(stopped.name[5:]) + 3, epochs=2000))
    assert int(again.checkpoint.name[5:]) == int(stopped.name[5:]) + 3


def newest_whole_quietly(run):
    return next(iter(run.glob("step-*/manifest.json")), None)


def test_steps_have_seeds_of_their_own():
    def drawn(seed, step, rank):
        DistributedContext("single", torch.device("cpu"), False, rank).seed_step(seed, step)
        return torch.rand(3).tolist()

    assert drawn(0, 5, 0) == drawn(0, 5, 0)
    assert len({tuple(drawn(seed, step, rank)) for seed in (0, 1) for step in (0, 1, 256) for rank in (0, 1)}) == 12
