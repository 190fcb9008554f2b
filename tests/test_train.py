"""The training loop: what it learns, when it saves, and that a stopped run ends with the same bits."""

import json
import logging
import shutil
import signal
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load

from babybert.checkpoint import manager
from babybert.checkpoint.format import (
    TrainState,
    checkpoint_step,
    find_checkpoint,
    list_checkpoints,
    load_model,
    read_state,
    save_checkpoint,
)
from babybert.checkpoint.metrics_log import MetricsLog, read_metrics
from babybert.config import PrepareConfig, PretrainConfig
from babybert.data.dataset import Dataset
from babybert.data.digest import sha256
from babybert.data.prepare import prepare
from babybert.errors import DataError, StorageError, UsageError, UserError
from babybert.evaluation.scores import Scores, evaluate_held_out
from babybert.model.loss import LossSums
from babybert.training import pretraining
from babybert.training import train as train_module
from babybert.training.distributed import DistributedContext
from babybert.training.lr_schedule import learning_rate
from babybert.training.metrics import RunMetrics
from babybert.training.metrics_reporter import MetricsReporter
from babybert.training.nonfinite_guard import NonFiniteGuard
from babybert.training.plan import TrainingPlan
from babybert.training.train import TrainingResult, pretrain

Small = Callable[..., PretrainConfig]


def result_of(config: PretrainConfig) -> TrainingResult:
    """Train, as rank 0."""
    result = pretrain(config)
    assert result is not None
    return result


def scores_of(config: PretrainConfig) -> Scores:
    """Train to the end; the held-out scores."""
    scores = result_of(config).scores
    assert scores is not None
    return scores


@pytest.mark.slow
def test_training_beats_the_unigram_baseline(small: Small) -> None:
    scores = scores_of(small(epochs=12, width=32, lr=0.01, masking="dynamic"))
    assert scores.mlm_loss < scores.mlm_unigram_loss - 0.1 < scores.mlm_chance_loss


@pytest.mark.slow
@pytest.mark.parametrize("tie_decoder", [False, True])
def test_a_pre_norm_network_of_four_layers_learns_from_the_first_steps(small: Small, tie_decoder: bool) -> None:
    """The shape of `small` and `medium`, at a small width."""
    shape = {"norm": "pre", "activation": "gelu", "initial_weights": "normal", "dropout": 0.0, "layers": 4}
    config = small(**shape, width=32, heads=4, feed_forward=128, lr=3e-3, masking="dynamic", log_every=1,
                   tie_decoder=tie_decoder, epochs=100, max_steps=150, validation_pairs=20)  # fmt: skip
    scores = scores_of(config)
    assert scores.mlm_loss < scores.mlm_unigram_loss - 0.1
    losses = [line["mlm_loss"] for line in read_metrics(config.out / "metrics.jsonl") if line["split"] == "train"]
    assert max(losses) < scores.mlm_unigram_loss + 1


def test_training_starts_at_the_unigram_baseline(small: Small) -> None:
    scores = scores_of(small(max_steps=1, lr=1e-9))
    assert scores.mlm_loss == pytest.approx(scores.mlm_unigram_loss, abs=0.05)


def curve(run: Path) -> list[dict[str, Any]]:
    """What was logged, except for times."""
    return [
        {name: value for name, value in line.items() if name not in ("seconds", "pairs_per_second")}
        for line in read_metrics(run / "metrics.jsonl")
        if line["split"] != "resume"
    ]


@pytest.mark.parametrize(
    ("cuts", "settings"),
    [
        ([1, 40], {}),
        ([33, 34], {}),
        ([5, 41], {"masking": "static"}),
        ([7], {"resident": "always", "bucketing": False, "accumulate": 3}),
        ([21], {"precision": "bf16", "width": 128, "norm": "pre", "activation": "gelu", "accumulate": 2}),
        ([9, 40], {"optimizer": "muon", "masked_share": 0.3, "masked_share_end": 0.15, "whole_word_masking": True}),
    ],
)
@pytest.mark.slow
def test_a_stopped_and_resumed_run_ends_with_the_same_bits(
    small: Small,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cuts: list[int],
    settings: dict[str, Any],
) -> None:
    """With dropout, so that random numbers matter. The stops are within epochs and at their ends."""
    settings = {**settings, "dropout": 0.1, "log_every": 1}
    complete = result_of(small(out=tmp_path / "complete", **settings)).checkpoint
    stop_at = -1

    def learning_rate_and_stop(step: float, *rest: Any) -> float:
        if step + 1 == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return learning_rate(step, *rest)

    monkeypatch.setattr(train_module, "learning_rate", learning_rate_and_stop)
    for stop_at in cuts:
        result = result_of(small(out=tmp_path / "cut", **settings))
        assert result.stopped_by == signal.SIGTERM
        assert read_state(result.checkpoint).step == stop_at
    stop_at = -1
    result = result_of(small(out=tmp_path / "cut", **settings))
    assert result.checkpoint.name == complete.name
    assert sha256(result.checkpoint / "model.safetensors") == sha256(complete / "model.safetensors")
    assert sha256(result.checkpoint / "training.pt") == sha256(complete / "training.pt")
    assert curve(tmp_path / "cut") == curve(tmp_path / "complete")
    assert read_state(result.checkpoint).restarts == len(cuts)
    assert "not bit-identical" not in caplog.text


def test_a_signal_ends_a_validation(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def evaluate_and_stop(*arguments: Any, **keywords: Any) -> Scores:
        nonlocal calls
        calls += 1
        signal.raise_signal(signal.SIGINT)
        return evaluate_held_out(*arguments, **keywords)

    monkeypatch.setattr(pretraining, "evaluate_held_out", evaluate_and_stop)
    result = result_of(small())
    assert result.stopped_by == signal.SIGINT
    assert calls == 1
    assert result.scores is None
    assert read_state(result.checkpoint).epoch == 1


def test_checkpoint_every_counts_steps_or_minutes(small: Small, tmp_path: Path) -> None:
    config = small(checkpoint_every="10", keep_checkpoints=99)
    pretrain(config)
    steps = [checkpoint_step(path) for path in list_checkpoints(config.out)]
    assert steps == [56, 48, 38, 28, 20, 10]
    config = small(out=tmp_path / "minutes", checkpoint_every="0.000001m", keep_checkpoints=99, epochs=1)
    pretrain(config)
    assert len(list_checkpoints(config.out)) == 28


def test_the_best_is_kept_in_addition_to_the_newest(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.6])

    def evaluate_with_loss(*arguments: Any, **keywords: Any) -> Scores:
        return replace(evaluate_held_out(*arguments, **keywords), mlm_loss=next(losses))

    monkeypatch.setattr(pretraining, "evaluate_held_out", evaluate_with_loss)
    config = small(epochs=5, keep_checkpoints=2)
    pretrain(config)
    assert [checkpoint_step(path) for path in list_checkpoints(config.out)] == [28 * 5, 28 * 4, 28 * 2]


def test_time_can_be_limited_across_processes(small: Small) -> None:
    first = result_of(small(epochs=100_000, max_minutes=0.02))
    state = read_state(first.checkpoint)
    assert 1 < state.seconds < 20
    summary = json.loads((small().out / "summary.json").read_text())
    assert summary["ended_by"] == "max_minutes"
    assert summary["step"] == state.step
    again = result_of(small(epochs=100_000, max_minutes=0.02))
    assert read_state(again.checkpoint).step == state.step + 1  # the one step that notices it


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_other_schedules(small: Small, schedule: str) -> None:
    config = small(schedule=schedule, log_every=1)
    pretrain(config)
    rates = [line["lr"] for line in read_metrics(config.out / "metrics.jsonl") if line["split"] == "train"]
    assert rates == [learning_rate(step, 56, config.lr, config.warmup_fraction, schedule) for step in range(56)]


@pytest.mark.slow
def test_the_bf16_kernels_follow_the_curve_of_fp32(small: Small, tmp_path: Path) -> None:
    """The loss in bf16 is nearer to that in fp32 than the loss of another seed is."""
    shape = {"norm": "pre", "activation": "gelu", "initial_weights": "normal", "dropout": 0.0, "width": 128, "heads": 4}
    curves = []
    for precision, seed in (("fp32", 0), ("bf16", 0), ("fp32", 1)):
        config = small(
            **shape, out=tmp_path / f"{precision}-{seed}", precision=precision, seed=seed, lr=1e-3, max_steps=60,
            epochs=10, log_every=1, validation_pairs=8,
        )  # fmt: skip
        pretrain(config)
        lines = read_metrics(config.out / "metrics.jsonl")
        curves.append(np.array([line["mlm_loss"] for line in lines if line["split"] == "train"]))
    fp32, bf16, other_seed = curves
    assert len(fp32) == 60
    assert 0 < np.abs(bf16 - fp32).mean() < 0.2 * np.abs(other_seed - fp32).mean()


def test_bf16_gives_nearly_the_same_loss(small: Small, tmp_path: Path) -> None:
    losses = [scores_of(small(out=tmp_path / kind, precision=kind, max_steps=30)).mlm_loss for kind in ("fp32", "bf16")]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_data_parallel_on_one_gpu_is_the_plain_run(small: Small, tmp_path: Path) -> None:
    runs = [
        result_of(small(out=tmp_path / kind, parallel=kind, device="cuda", precision="fp32", max_steps=30))
        for kind in ("single", "dp")
    ]
    one, other = (load_model(run.checkpoint)[0].state_dict() for run in runs)
    assert all(not name.startswith("module.") for name in other)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4)


def test_tensorboard_gets_the_curves_or_says_what_is_missing(small: Small) -> None:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(UsageError, match=r"pip install 'babybert-pretrain\[tensorboard\]'"):
            pretrain(small(tensorboard=True))
        return
    pretrain(small(tensorboard=True))
    assert list((small().out / "tensorboard").glob("events.*"))


def test_strategies_that_are_not_available_are_refused(small: Small) -> None:
    with pytest.raises(UsageError, match="torchrun"):
        pretrain(small(parallel="ddp"))
    with pytest.raises(UsageError, match="DataParallel needs GPUs"):
        pretrain(small(parallel="dp"))


def test_a_finished_run_is_left_as_it_is(small: Small) -> None:
    first = result_of(small())
    again = result_of(small())
    assert again.checkpoint == first.checkpoint
    assert again.stopped_by is None


def test_each_epoch_ends_with_validation_and_a_checkpoint(small: Small) -> None:
    config = small(epochs=4, keep_checkpoints=2)
    pretrain(config)
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["split"] == "validation"] == [1, 2, 3, 4]
    assert len(list(config.out.glob("step-*"))) == 2
    state = read_state(find_checkpoint(config.out))
    assert state.scores is not None
    assert state.scores["mlm_loss"] == lines[-1]["mlm_loss"]
    assert state.settings["lr"] == config.lr


def test_another_vocabulary_or_other_sizes_are_refused(small: Small, tmp_path: Path) -> None:
    pretrain(small(max_steps=2))
    prepare(PrepareConfig(out=tmp_path / "other", demo_documents=40, validation_fraction=0.2, min_frequency=3))
    with pytest.raises(DataError, match="another vocabulary"):
        pretrain(small(data=tmp_path / "other"))
    with pytest.raises(UsageError, match="has sizes"):
        pretrain(small(width=16))
    with pytest.raises(UsageError, match="--resume never"):
        pretrain(small(resume="never"))


def test_a_non_finite_loss_ends_the_run_and_keeps_the_checkpoint(small: Small) -> None:
    pretrain(small(max_steps=3))
    with pytest.raises(
        UserError,
        match=r"non-finite loss or gradient \(NaN or infinity\) at step \d+ \(rows (\d+, ){7}\d+ of the training table",
    ):
        pretrain(small(lr=1e38, weight_decay=1e30, clip_norm=1e38))
    assert find_checkpoint(small().out).name == "step-00000003"
    (nonfinite_step,) = MetricsLog(small().out).nonfinite_steps(after=3)
    assert nonfinite_step > 3


def test_the_next_process_reports_a_non_finite_loss_until_it_has_passed_that_step(small: Small, demo: Dataset) -> None:
    config = small(log_every=1000)
    config.out.mkdir()
    MetricsLog(config.out).write("nonfinite", step=6)
    metrics = RunMetrics()
    state = TrainState(step=3)
    context = DistributedContext("single", torch.device("cpu"), False)
    guard = NonFiniteGuard(context.device, lambda step: np.arange(8), lambda step: None)
    plan = TrainingPlan(len(demo.examples("train")), 8, config.epochs, None, start=replace(state))
    reporter = MetricsReporter(config, context, metrics, state, plan, with_nsp=True)
    sums = LossSums(*(torch.zeros(()) for _ in fields(LossSums)))
    for state.step in range(4, 7):
        assert metrics.registry.get_sample_value("babybert_pretrain_nonfinite_ends") == 1
        reporter.record_step(sums, state, 0.0, torch.zeros(()), guard)
    assert metrics.registry.get_sample_value("babybert_pretrain_nonfinite_ends") == 0


def test_data_on_the_device_trains_to_the_same_bits(small: Small, tmp_path: Path) -> None:
    """On the CPU: the arithmetic is the same, only the loader differs."""
    runs = [
        result_of(small(out=tmp_path / kind, resident=kind, masking="dynamic", max_steps=20)).checkpoint
        for kind in ("always", "never")
    ]
    assert sha256(runs[0] / "model.safetensors") == sha256(runs[1] / "model.safetensors")


def test_pairs_longer_than_the_model_takes_are_refused(small: Small, tmp_path: Path, demo_folder: Path) -> None:
    shutil.copytree(demo_folder, tmp_path / "long")
    facts = json.loads((tmp_path / "long" / "dataset.json").read_text())
    facts["validation"]["longest"] = 600
    (tmp_path / "long" / "dataset.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match="has a pair of 600 tokens; the model supports at most 512"):
        pretrain(small(data=tmp_path / "long"))


def test_a_disk_that_is_full_for_a_while_does_not_end_the_run(
    small: Small, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fails = iter([True, True, False, False])

    def save_or_fail(*arguments: Any) -> Path:
        if next(fails):
            raise StorageError("no space left")
        return save_checkpoint(*arguments)

    monkeypatch.setattr(manager, "save_checkpoint", save_or_fail)
    result = result_of(small(epochs=4))
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["no space left", "no space left"]
    assert [checkpoint_step(path) for path in list_checkpoints(small().out)] == [112, 84]
    assert result.checkpoint.name == "step-00000112"


def test_another_seed_and_other_data_are_refused(small: Small, tmp_path: Path, demo_folder: Path) -> None:
    pretrain(small(max_steps=2))
    with pytest.raises(UsageError, match="was trained with seed 0, the settings say 5"):
        pretrain(small(seed=5))
    shutil.copytree(demo_folder, tmp_path / "other")
    prepare(
        PrepareConfig(out=tmp_path / "other", demo_documents=80, validation_fraction=0.2, duplicates=2, overwrite=True)
    )
    with pytest.raises(UsageError, match="on other data"):
        pretrain(small(data=tmp_path / "other"))


def test_a_run_starts_with_the_weights_of_another_one(
    small: Small, tmp_path: Path, demo: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    first = result_of(small(out=tmp_path / "first", max_steps=5))
    caplog.set_level(logging.INFO)
    task_of = {"init_from": str(tmp_path / "first"), "out": tmp_path / "second", "seed": 3, "dropout": 0.2}
    config = small(**task_of, max_steps=4, lr=1e-30, weight_decay=0.0)
    second = result_of(config)
    assert "starting with the weights of" in caplog.text
    weights = [load((result.checkpoint / "model.safetensors").read_bytes()) for result in (first, second)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert read_state(second.checkpoint).step == 4  # counted from its own start
    caplog.clear()
    third = result_of(small(**task_of, max_steps=6))  # resumes the run itself
    assert "starting with the weights of" not in caplog.text
    assert read_state(third.checkpoint).step == 6


def test_weights_of_other_sizes_are_refused(small: Small, tmp_path: Path) -> None:
    result_of(small(out=tmp_path / "first", max_steps=1))
    with pytest.raises(UsageError, match="choose another --init-from"):
        pretrain(small(out=tmp_path / "second", init_from=str(tmp_path / "first"), width=16))
    assert not list((tmp_path / "second").glob("step-*"))


def test_weights_of_another_vocabulary_are_refused(small: Small, tmp_path: Path) -> None:
    result_of(small(out=tmp_path / "first", max_steps=1))
    prepare(PrepareConfig(out=tmp_path / "data", corpus="demo", demo_documents=60, tokenizer_kind="wordpiece"))
    with pytest.raises(DataError, match="another vocabulary"):
        pretrain(small(out=tmp_path / "second", init_from=str(tmp_path / "first"), data=tmp_path / "data"))
