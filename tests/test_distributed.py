"""Several processes, several replicas and micro-batches: each trains what one process does."""

import copy
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from processes import COMMAND_SECONDS, ChildProcess, babybert_command

from babybert.checkpoint.format import checkpoint_step, find_checkpoint, load_model
from babybert.config import PretrainConfig
from babybert.data.dataset import Dataset
from babybert.data.loader import Batch, Loader
from babybert.model.bert import BabyBert
from babybert.model.loss import LossSums, PretrainingModel
from babybert.training.distributed import DistributedContext
from babybert.training.setup import new_model
from babybert.training.step import forward_backward
from babybert.training.train import pretrain

Small = Callable[..., PretrainConfig]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc-per-node=2",
    "--master-port=0",
    "--rdzv-backend=c10d",
    "--rdzv-endpoint=127.0.0.1:0",
]
FLAGS = ("data", "out", "width", "heads", "layers", "feed_forward", "batch_size", "device", "log_every", "epochs", "lr")
CPU = DistributedContext("single", torch.device("cpu"), bf16=False)


def torchrun_command(config: PretrainConfig) -> list[str]:
    """`babybert pretrain` with these settings in two processes."""
    names = [*FLAGS, "accumulate", "dropout"]
    values = {name: getattr(config, name) for name in names}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]
    return [*TORCHRUN, *babybert_command("pretrain", "--preset=tiny", "--no-metrics", *flags)[1:]]


def logged_mlm_losses(run: Path) -> list[float]:
    text = (run / "metrics.jsonl").read_text()
    return [float(value) for value in re.findall(r'"mlm_loss": ([\d.]+)', text)]


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_train_what_one_does(small: Small, tmp_path: Path, accumulate: int) -> None:
    """The same global batches. The last one has a single pair, so one rank has nothing to learn from.

    There is no dropout: it differs by rank.
    """
    settings = {"batch_size": 73, "epochs": 2, "lr": 1e-3, "accumulate": accumulate, "log_every": 1}
    single = pretrain(small(out=tmp_path / "one", **settings))
    assert single is not None
    config = small(out=tmp_path / "two", **settings)
    job = subprocess.run(
        torchrun_command(config),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
    )
    assert job.returncode == 0, job.stderr
    assert "in 2 processes" in job.stderr
    assert job.stderr.count("held-out MLM") == 2  # only rank 0 logs
    newest = find_checkpoint(config.out)
    assert newest.name == single.checkpoint.name
    expected, weights = (load_model(folder)[0].state_dict() for folder in (single.checkpoint, newest))
    for name, tensor in expected.items():
        if name.endswith("in_proj_bias"):
            # The keys' bias has no influence on the loss: its gradient is rounding, which Adam scales up.
            width = len(tensor) // 3
            tensor[width : 2 * width] = weights[name][width : 2 * width]
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-5)
    assert logged_mlm_losses(tmp_path / "two") == pytest.approx(logged_mlm_losses(tmp_path / "one"), abs=1e-4)


@pytest.fixture
def bert(small: Small, demo: Dataset) -> BabyBert:
    """A small model, without dropout."""
    config = small()
    return new_model(config, config.sizes(demo.tokenizer.size), demo.token_counts())


@pytest.fixture
def batch(demo: Dataset) -> Batch:
    """Eleven pairs."""
    return next(Loader(demo.examples("train"), 11, 0).epoch(0))


def gradients(bert: BabyBert) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in bert.named_parameters() if parameter.grad is not None}


def assert_same_sums(actual: LossSums, expected: LossSums) -> None:
    for field in fields(LossSums):
        torch.testing.assert_close(getattr(actual, field.name), getattr(expected, field.name))


@pytest.mark.parametrize("micro_batches", [2, 3, 8, 100])
def test_micro_batches_have_the_gradient_of_the_whole_batch(bert: BabyBert, batch: Batch, micro_batches: int) -> None:
    """Sums are divided by the counts of the whole batch: micro-batches with few masked tokens weigh little."""
    model = PretrainingModel(bert)
    expected_sums = forward_backward(model, batch, CPU)
    expected = gradients(bert)
    bert.zero_grad()
    sums = forward_backward(model, batch, CPU, micro_batches)
    torch.testing.assert_close(gradients(bert), expected, rtol=1e-4, atol=1e-6)
    assert_same_sums(sums, expected_sums)


class TwoReplicas(torch.nn.Module):
    """What `DataParallel` does on two GPUs: scatter along the first dimension, replicate, run, gather by concatenation.

    Gradients of the replicas are added to the original's parameters, as its broadcast does in the backward pass.
    """

    def __init__(self, model: PretrainingModel) -> None:
        super().__init__()
        self.model = model
        self.replicas = [copy.deepcopy(model) for _ in range(2)]

    def forward(self, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        chunks = zip(*(tensor.chunk(2) for tensor in tensors), strict=True)
        outputs = [replica(*chunk) for replica, chunk in zip(self.replicas, chunks, strict=True)]
        return {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}

    def reduce_gradients(self) -> None:
        for parameter, *copies in zip(*(m.parameters() for m in (self.model, *self.replicas)), strict=True):
            parameter.grad = torch.stack([each.grad for each in copies if each.grad is not None]).sum(0)


def test_data_parallel_replicas_have_the_gradient_of_one_model(bert: BabyBert, batch: Batch) -> None:
    """Eleven pairs are scattered unevenly, as six and five."""
    model = PretrainingModel(bert)
    expected_sums = forward_backward(model, batch, CPU)
    expected = gradients(bert)
    bert.zero_grad()
    replicas = TwoReplicas(model)
    sums = forward_backward(replicas, batch, CPU)
    replicas.reduce_gradients()
    torch.testing.assert_close(gradients(bert), expected, rtol=1e-4, atol=1e-6)
    assert_same_sums(sums, expected_sums)


@pytest.mark.slow
def test_processes_stop_together_and_one_process_resumes(
    small: Small, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small(out=tmp_path / "run", epochs=2000)
    job = ChildProcess(torchrun_command(config), environment={"OMP_NUM_THREADS": "1"})
    try:
        job.wait_for_line("held-out MLM")
        job.send_signal(signal.SIGTERM)
        job.wait(COMMAND_SECONDS)
    finally:
        job.kill()
    assert "saving a checkpoint" in job.output
    stopped = checkpoint_step(find_checkpoint(config.out))
    resumed = pretrain(small(out=tmp_path / "run", max_steps=stopped + 3, epochs=2000, batch_size=7))
    assert resumed is not None
    assert checkpoint_step(resumed.checkpoint) == stopped + 3
    assert "batch_size changed from 8 to 7" in caplog.text
    assert "parallel changed from ddp to single, world_size changed from 2 to 1" in caplog.text


def test_every_step_and_rank_has_its_own_seed() -> None:
    def draw(seed: int, step: int, rank: int) -> tuple[float, ...]:
        DistributedContext("single", torch.device("cpu"), False, rank).seed_step(seed, step)
        return tuple(torch.rand(3).tolist())

    assert draw(0, 5, 0) == draw(0, 5, 0)
    draws = {draw(seed, step, rank) for seed in (0, 1) for step in (0, 1, 256) for rank in (0, 1)}
    assert len(draws) == 12
