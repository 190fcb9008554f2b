import argparse
import json
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from dataclasses import replace

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from babybert.checkpoint.format import TrainState, list_checkpoints, load_model, newest_valid, read_state, restore
from babybert.checkpoint.metrics_log import MetricsLog, read_metrics
from babybert.config import PrepareConfig, PretrainConfig
from babybert.data.dataset import sha256
from babybert.data.prepare import prepare
from babybert.errors import DataError, StorageError, UsageError, UserError
from babybert.evaluation.scores import evaluate
from babybert.settings import add_flags, fill
from babybert.training import train as trainer
from babybert.training.distributed import DistributedContext
from babybert.training.lr_schedule import learning_rate
from babybert.training.metrics import RunMetrics
from babybert.training.reporter import Reporter
from babybert.training.train import EagerAdam, load_or_create, make_optimizer, pretrain

COMMAND = [sys.executable, "-m", "babybert.cli", "pretrain"]
SIZES = ["--width=8", "--heads=2", "--layers=1", "--feed-forward=16", "--batch-size=8", "--device=cpu"]


@pytest.mark.slow
def test_it_learns_more_than_word_counts(small):
    scores = pretrain(small(epochs=12, width=32, lr=0.01, masking="dynamic")).scores
    assert scores is not None
    assert scores.mlm_loss < scores.mlm_unigram_loss - 0.1 < scores.mlm_chance_loss


def test_it_starts_where_word_counts_are(small):
    outcome = pretrain(small(max_steps=1, lr=1e-9))
    assert outcome.scores.mlm_loss == pytest.approx(outcome.scores.mlm_unigram_loss, abs=0.05)


def curve(run):
    """What was logged, but for times."""
    return [
        {name: value for name, value in line.items() if name not in ("seconds", "pairs_per_second")}
        for line in read_metrics(run / "metrics.jsonl")
        if line["split"] != "resume"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cuts", "settings"),
    [
        ([1, 40], {}),
        ([33, 34], {}),
        ([5, 41], {"masking": "static"}),
        ([7], {"resident": "always", "bucketing": False, "accumulate": 3}),
    ],
)
def test_stopped_and_started_again_it_ends_with_the_same_bits(small, tmp_path, monkeypatch, cuts, settings):
    """With dropout, so that what is random counts; cut within epochs and across them."""
    settings = {**settings, "dropout": 0.1, "log_every": 1}
    whole = pretrain(small(out=tmp_path / "whole", **settings)).checkpoint
    rate_of = trainer.learning_rate
    for cut in (*cuts, -1):

        def rate_and_stop(step, *rest, cut=cut):
            if step + 1 == cut:
                signal.raise_signal(signal.SIGTERM)
            return rate_of(step, *rest)

        monkeypatch.setattr(trainer, "learning_rate", rate_and_stop)
        outcome = pretrain(small(out=tmp_path / "cut", **settings))
        if cut > 0:
            assert outcome.stopped_by == signal.SIGTERM
            assert read_state(outcome.checkpoint)["step"] == cut
    assert outcome.checkpoint.name == whole.name
    assert sha256(outcome.checkpoint / "model.safetensors") == sha256(whole / "model.safetensors")
    assert sha256(outcome.checkpoint / "training.pt") == sha256(whole / "training.pt")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert read_state(outcome.checkpoint)["restarts"] == len(cuts)


def test_a_signal_in_validation_is_heeded_there(small, monkeypatch):
    asked = []

    def evaluate_and_stop(*arguments):
        asked.append(len(asked))
        signal.raise_signal(signal.SIGINT)
        return evaluate(*arguments)

    monkeypatch.setattr(trainer, "evaluate", evaluate_and_stop)
    outcome = pretrain(small())
    assert outcome.stopped_by == signal.SIGINT
    assert len(asked) == 1
    assert outcome.scores is None
    assert read_state(outcome.checkpoint)["epoch"] == 1


@pytest.mark.slow
def test_it_saves_every_so_many_steps_or_minutes(small, tmp_path):
    config = small(checkpoint_every="10", keep_checkpoints=99)
    pretrain(config)
    steps = [int(path.name[5:]) for path in list_checkpoints(config.out)]
    assert steps == [56, 48, 38, 28, 20, 10]
    config = small(out=tmp_path / "minutes", checkpoint_every="0.000001m", keep_checkpoints=99, epochs=1)
    pretrain(config)
    assert len(list_checkpoints(config.out)) == 28


@pytest.mark.slow
def test_the_best_is_kept_beside_the_newest(small, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.6])
    original = trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda *rest: replace(original(*rest), mlm_loss=next(losses)))
    config = small(epochs=5, keep_checkpoints=2)
    pretrain(config)
    assert [int(path.name[5:]) for path in list_checkpoints(config.out)] == [28 * 5, 28 * 4, 28 * 2]


def test_time_can_be_limited_across_processes(small):
    first = pretrain(small(epochs=100_000, max_minutes=0.02))
    state = read_state(first.checkpoint)
    assert 1 < state["seconds"] < 20
    summary = json.loads((small().out / "summary.json").read_text())
    assert summary["ended_by"] == "max_minutes"
    assert summary["step"] == state["step"]
    again = pretrain(small(epochs=100_000, max_minutes=0.02))
    assert (
        read_state(again.checkpoint)["step"] == state["step"] + 1
    )  # there is no time left but for the step that finds it


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_other_schedules(small, schedule):
    config = small(schedule=schedule, log_every=1)
    pretrain(config)
    rates = [line["lr"] for line in read_metrics(config.out / "metrics.jsonl") if line["split"] == "train"]
    assert rates == [learning_rate(step, 56, config.lr, config.warmup_fraction, schedule) for step in range(56)]


def test_the_reference_is_a_recipe():
    parser = argparse.ArgumentParser()
    add_flags(parser, PretrainConfig)
    config = fill(PretrainConfig, "pretrain", parser.parse_args(["--recipe", "reference", "--lr", "1e-4"]), {})
    assert (config.preset, config.batch_size, config.optimizer, config.lr, config.epochs) == (
        "baby",
        6,
        "adam",
        1e-4,
        100,
    )
    assert config.decay_vectors
    assert not config.init_decoder_bias


@pytest.mark.slow
def test_bf16_is_near(small, tmp_path):
    losses = [
        pretrain(small(out=tmp_path / kind, precision=kind, max_steps=30)).scores.mlm_loss for kind in ("fp32", "bf16")
    ]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_data_parallel_on_one_gpu_is_the_plain_run(small, tmp_path):
    runs = [
        pretrain(small(out=tmp_path / kind, parallel=kind, device="cuda", precision="fp32", max_steps=30))
        for kind in ("single", "dp")
    ]
    one, other = (load_model(run.checkpoint)[0].state_dict() for run in runs)
    assert all(not name.startswith("module.") for name in other)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4)


def test_tensorboard_gets_the_curves_or_says_what_is_missing(small):
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(UsageError, match=r"pip install 'babybert-pretrain\[tensorboard\]'"):
            pretrain(small(tensorboard=True))
        return
    pretrain(small(tensorboard=True))
    assert list((small().out / "tensorboard").glob("events.*"))


def test_what_parallel_cannot_be_is_refused(small):
    with pytest.raises(UsageError, match="torchrun"):
        pretrain(small(parallel="ddp"))
    with pytest.raises(UsageError, match="DataParallel is of GPUs"):
        pretrain(small(parallel="dp"))


def test_a_finished_run_is_left_as_it_is(small):
    first = pretrain(small())
    again = pretrain(small())
    assert again.checkpoint == first.checkpoint
    assert again.stopped_by is None


@pytest.mark.slow
def test_each_epoch_ends_with_validation_and_a_checkpoint(small):
    config = small(epochs=4, keep_checkpoints=2)
    pretrain(config)
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["split"] == "validation"] == [1, 2, 3, 4]
    assert len(list(config.out.glob("step-*"))) == 2
    state = read_state(newest_valid(config.out))
    assert state["scores"]["mlm_loss"] == lines[-1]["mlm_loss"]
    assert state["settings"]["lr"] == config.lr


def test_another_vocabulary_or_other_sizes_are_refused(small, tmp_path):
    pretrain(small(max_steps=2))
    prepare(PrepareConfig(out=tmp_path / "other", demo_documents=40, validation_fraction=0.2, min_frequency=3))
    with pytest.raises(DataError, match="another vocabulary"):
        pretrain(small(data=tmp_path / "other"))
    with pytest.raises(UsageError, match="has sizes"):
        pretrain(small(width=16))
    with pytest.raises(UsageError, match="--resume never"):
        pretrain(small(resume="never"))


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_checkpoint(small):
    pretrain(small(max_steps=3))
    with pytest.raises(UserError, match=r"no number at step \d+ \(rows (\d+, ){7}\d+ of the training table"):
        pretrain(small(lr=1e38, weight_decay=1e30, clip_norm=1e38))
    assert newest_valid(small().out).name == "step-00000003"
    ((bad,), metrics) = MetricsLog(small().out).bad_steps(beyond=3), RunMetrics()
    assert bad > 3
    state = TrainState(step=3)
    reporter = Reporter(
        small(log_every=1000), DistributedContext("single", torch.device("cpu"), False), metrics, state, 1000
    )
    for state.step in range(4, bad + 1):  # the process that goes on tells of it, until it has come past
        assert metrics.registry.get_sample_value("babybert_pretrain_nonfinite_ends") == 1
        reporter.step(None, state, 0.0, torch.zeros(()), None)
    assert metrics.registry.get_sample_value("babybert_pretrain_nonfinite_ends") == 0


def test_biases_and_norms_do_not_decay(small, demo):
    bert = load_or_create(small(), demo, demo.token_counts(), None)
    optimizer = make_optimizer(bert, small(weight_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in bert.named_parameters()}
    for parameter in bert.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in bert.named_parameters():
        factor = 1.0 if parameter.dim() == 1 else 1 - small().lr * 0.5
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_the_decoder_has_its_own_rate_and_epsilon_and_noise_does_not_move_it(small, demo):
    config = small(lr=1e-3, decoder_lr_factor=10.0, decoder_epsilon=1e-3, weight_decay=0.0)
    bert, plain = (load_or_create(config, demo, demo.token_counts(), None) for _ in range(2))
    plain.load_state_dict(bert.state_dict())
    decoder = plain.mlm_decoder
    oracles = [
        torch.optim.AdamW([decoder.weight], lr=1e-2, eps=1e-3, weight_decay=0.0),
        torch.optim.AdamW([decoder.bias], lr=1e-3, eps=1e-3, weight_decay=0.0),
        torch.optim.AdamW(set(plain.parameters()) - set(decoder.parameters()), lr=1e-3, eps=1e-8, weight_decay=0.0),
    ]
    optimizer, before = make_optimizer(bert, config), bert.mlm_decoder.weight.detach().clone()
    for step in range(3):
        for parameter, other in zip(bert.parameters(), plain.parameters(), strict=True):
            parameter.grad = torch.full_like(parameter, 0.01 * (step + 1))
            parameter.grad[-1] = 1e-7  # a rare word's
            other.grad = parameter.grad.clone()
        for each in (optimizer, *oracles):
            each.step()
    for (name, parameter), other in zip(bert.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, msg=name)
    moved = (bert.mlm_decoder.weight.detach() - before).abs()
    assert moved[-1].max() < 1e-3 * moved[0].min()


def test_each_group_has_its_factor_of_the_rate(small):
    config = small(
        lr=1e-3, decoder_lr_factor=10.0, embedding_lr_factor=5.0, max_steps=3, schedule="constant", warmup_fraction=0.0
    )
    saved = torch.load(pretrain(config).checkpoint / "training.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [(group["lr"], group["factor"]) for group in saved] == [
        (1e-2, 10.0),
        (1e-3, 1.0),
        (5e-3, 5.0),
        (1e-3, 1.0),
        (1e-3, 1.0),
    ]


def test_an_optimizer_with_other_groups_is_refused(small, demo):
    folder = pretrain(small(max_steps=1)).checkpoint
    other = torch.optim.AdamW(load_or_create(small(), demo, demo.token_counts(), None).parameters())
    with pytest.raises(UsageError, match="another version of babybert"):
        restore(folder, other)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_the_optimizer_is_pytorchs_to_the_bit_also_after_a_resume(name):
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(3, 5), torch.nn.Linear(3, 5)
    theirs.load_state_dict(ours.state_dict())
    settings = {"lr": 0.1, "weight_decay": 0.2, "fused": True}
    one = EagerAdam(ours.parameters(), decoupled_weight_decay=name == "AdamW", **settings)
    other = getattr(torch.optim, name)(theirs.parameters(), **settings)
    for step in range(4):
        for model, optimizer in ((ours, one), (theirs, other)):
            model(torch.full((2, 3), step + 1.0)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if step == 1:
            state = one.state_dict()
            one = EagerAdam(ours.parameters(), decoupled_weight_decay=name == "AdamW", **settings)
            one.load_state_dict(state)
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)


@pytest.mark.slow
def test_training_loads_no_library_that_it_does_not_use(demo_folder, tmp_path):
    """Each would take memory and seconds."""
    flags = (
        f"['pretrain', '--data={demo_folder}', '--out={tmp_path / 'run'}', '--max-steps=2', '--no-metrics', *{SIZES}]"
    )
    script = f"import sys; from babybert.cli import main; main({flags}); print([n for n in ('pandas', 'pyarrow', 'boto3', 'torch._dynamo', 'ts') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr


def test_data_on_the_device_trains_to_the_same_bits(small, tmp_path):
    """On the CPU: the arithmetic is the same, only who makes the batches differs."""
    runs = [
        pretrain(small(out=tmp_path / kind, resident=kind, masking="dynamic", max_steps=20)).checkpoint
        for kind in ("always", "never")
    ]
    assert sha256(runs[0] / "model.safetensors") == sha256(runs[1] / "model.safetensors")


def test_pairs_longer_than_the_model_takes_are_refused(small, tmp_path, demo_folder):
    shutil.copytree(demo_folder, tmp_path / "long")
    facts = json.loads((tmp_path / "long" / "dataset.json").read_text())
    facts["validation"]["longest"] = 600
    (tmp_path / "long" / "dataset.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match="has a pair of 600 tokens; the model takes at most 512"):
        pretrain(small(data=tmp_path / "long"))


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_exits_143(demo_folder, tmp_path):
    command = [*COMMAND, f"--data={demo_folder}", f"--out={tmp_path}", *SIZES, "--epochs=100000", "--metrics-port=0"]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    url = None
    for line in job.stderr:
        found = re.search(r"metrics: (http\S+)", line)
        url = found[1] if found else url
        if "step " in line:  # the first epoch is done
            break
    families = {
        family.name: family
        for family in text_string_to_metric_families(urllib.request.urlopen(url, timeout=5).read().decode())
    }
    samples = {
        (s.name, s.labels.get("objective"), s.labels.get("split")): s.value
        for f in families.values()
        for s in f.samples
    }
    assert samples["babybert_pretrain_pairs_total", None, None] > 0
    assert 0 < samples["babybert_pretrain_loss", "mlm", "validation"] < 6
    assert samples["babybert_checkpoint_saves_total", None, None] >= 0
    job.send_signal(signal.SIGTERM)
    threading.Thread(target=job.stderr.read, daemon=True).start()
    assert job.wait(60) == 143
    assert "the same command goes on" in job.stdout.read()
    assert newest_valid(tmp_path) is not None


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_the_older_checkpoint(demo_folder, tmp_path):
    """A limit on the size of files stands in for the full disk: writing fails in the same place, in the same way."""
    command = [*COMMAND, f"--data={demo_folder}", f"--out={tmp_path}", *SIZES, "--no-metrics", "--log-every=1000000"]
    subprocess.run([*command, "--max-steps=2"], check=True, capture_output=True)
    for limit in (3_000, 8_000):  # within the weights, within the optimizer's state
        full = subprocess.run(
            [*command, "--max-steps=4"],
            capture_output=True,
            text=True,
            preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
        assert full.returncode == 1
        last = full.stderr.strip().splitlines()[-1]
        assert last.startswith("babybert pretrain: error:"), full.stderr
        assert "step-00000004" in last
        assert "Traceback" not in full.stderr
        assert [path.name for path in tmp_path.glob("*step-*")] == ["step-00000002"]
    assert newest_valid(tmp_path).name == "step-00000002"


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_does_not_end_the_run(small, monkeypatch, capsys):
    from babybert.checkpoint import manager as keeper

    original, full = keeper.save_checkpoint, iter([True, True, False, False])

    def save(*arguments):
        if next(full):
            raise StorageError("no space left")
        return original(*arguments)

    monkeypatch.setattr(keeper, "save_checkpoint", save)
    outcome = pretrain(small(epochs=4))
    assert capsys.readouterr().err.count("warning: no space left") == 2
    assert [int(path.name[5:]) for path in list_checkpoints(small().out)] == [112, 84]
    assert outcome.checkpoint.name == "step-00000112"


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run_at_its_end(demo_folder, tmp_path):
    command = [*COMMAND, f"--data={demo_folder}", f"--out={tmp_path}", *SIZES, "--no-metrics", "--epochs=3"]
    full = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, 3_000)),
    )
    assert full.returncode == 1
    assert full.stderr.count("held-out MLM") == 3
    assert full.stderr.count("cannot write the checkpoint") == 3
    assert full.stderr.strip().splitlines()[-1].startswith("babybert pretrain: error:")


def test_a_position_in_another_order_is_refused(small, tmp_path, demo_folder):
    pretrain(small(max_steps=2))
    for settings in ({"batch_size": 4}, {"seed": 5}, {"bucketing": False}):
        with pytest.raises(UsageError, match=f"was trained with {next(iter(settings))}"):
            pretrain(small(**settings))
    shutil.copytree(demo_folder, tmp_path / "other")
    prepare(
        PrepareConfig(out=tmp_path / "other", demo_documents=80, validation_fraction=0.2, duplicates=2, overwrite=True)
    )
    with pytest.raises(UsageError, match="on other data"):
        pretrain(small(data=tmp_path / "other"))


@pytest.mark.slow
def test_a_port_that_is_taken_is_said_before_anything_else(demo_folder, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        job = subprocess.run(
            [*COMMAND, f"--data={demo_folder}", f"--out={tmp_path / 'run'}", f"--metrics-port={port}"],
            capture_output=True,
            text=True,
        )
    assert job.returncode == 2
    assert f"127.0.0.1:{port}" in job.stderr
    assert not (tmp_path / "run").exists()
