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

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from babybert.config import PrepareConfig
from babybert.data.dataset import sha256
from babybert.data.prepare import prepare
from babybert.errors import DataError, UsageError, UserError
from babybert.training.checkpoint import newest_whole, read_state
from babybert.training.trainer import load_or_create, make_optimizer, pretrain

COMMAND = [sys.executable, "-m", "babybert.cli", "pretrain"]
SIZES = ["--width=8", "--heads=2", "--layers=1", "--feed-forward=16", "--batch-size=8", "--device=cpu"]


def test_it_learns_more_than_word_counts(small):
    scores = pretrain(small(epochs=12, width=32, lr=0.01, masking="dynamic")).scores
    assert scores is not None
    assert scores.mlm_loss < scores.mlm_unigram_loss - 0.1 < scores.mlm_chance_loss


def test_it_starts_where_word_counts_are(small):
    outcome = pretrain(small(max_steps=1, lr=1e-9))
    assert outcome.scores.mlm_loss == pytest.approx(outcome.scores.mlm_unigram_loss, abs=0.05)


@pytest.mark.parametrize(
    ("cuts", "settings"), [([1, 40], {}), ([33, 34], {}), ([5, 41], {"masking": "dynamic"}), ([7], {"resident": "always", "bucketing": False})]
)
def test_stopped_and_started_again_it_ends_with_the_same_bits(small, tmp_path, monkeypatch, cuts, settings):
    """With dropout, so that the random state counts; cut within epochs and across them."""
    whole = pretrain(small(out=tmp_path / "whole", dropout=0.1, **settings)).checkpoint
    from babybert.training import trainer

    report = trainer.report

    def cut_at(step):
        def stop(seen, state, *rest):
            if state.step == step:
                signal.raise_signal(signal.SIGTERM)
            return report(seen, state, *rest)

        monkeypatch.setattr(trainer, "report", stop)

    for step in cuts:
        cut_at(step)
        outcome = pretrain(small(out=tmp_path / "cut", dropout=0.1, log_every=1, **settings))
        assert outcome.stopped_by == signal.SIGTERM
        assert read_state(outcome.checkpoint)["step"] == step
    cut_at(-1)
    cut = pretrain(small(out=tmp_path / "cut", dropout=0.1, **settings)).checkpoint
    assert cut.name == whole.name
    assert sha256(cut / "model.safetensors") == sha256(whole / "model.safetensors")


def test_a_finished_run_is_left_as_it_is(small):
    first = pretrain(small())
    again = pretrain(small())
    assert again.checkpoint == first.checkpoint
    assert again.stopped_by is None


def test_each_epoch_ends_with_validation_and_a_checkpoint(small):
    config = small(epochs=4, keep_checkpoints=2)
    pretrain(config)
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["split"] == "validation"] == [1, 2, 3, 4]
    assert len(list(config.out.glob("step-*"))) == 2
    state = read_state(newest_whole(config.out))
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
    with pytest.raises(UserError, match="the loss is nan at step"):
        pretrain(small(lr=1e38, weight_decay=1e30, clip_norm=1e38))
    assert newest_whole(small().out).name == "step-00000003"


def test_biases_and_norms_do_not_decay(small, demo):
    bert, _ = load_or_create(small(), demo, demo.token_counts())
    optimizer = make_optimizer(bert, small(weight_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in bert.named_parameters()}
    for parameter in bert.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in bert.named_parameters():
        factor = 1.0 if parameter.dim() == 1 else 1 - small().lr * 0.5
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_data_on_the_device_trains_to_the_same_bits(small, tmp_path):
    """On the CPU: the arithmetic is the same, only who makes the batches differs."""
    runs = [pretrain(small(out=tmp_path / kind, resident=kind, masking="dynamic", max_steps=20)).checkpoint for kind in ("always", "never")]
    assert sha256(runs[0] / "model.safetensors") == sha256(runs[1] / "model.safetensors")


def test_pairs_longer_than_the_model_takes_are_refused(small, tmp_path, demo_folder):
    shutil.copytree(demo_folder, tmp_path / "long")
    facts = json.loads((tmp_path / "long" / "dataset.json").read_text())
    facts["validation"]["longest"] = 600
    (tmp_path / "long" / "dataset.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match="has a pair of 600 tokens; the model takes at most 512"):
        pretrain(small(data=tmp_path / "long"))


def test_sigterm_saves_a_checkpoint_and_exits_143(demo_folder, tmp_path):
    command = [*COMMAND, f"--data={demo_folder}", f"--out={tmp_path}", *SIZES, "--epochs=100000", "--metrics-port=0"]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    url = None
    for line in job.stderr:
        found = re.search(r"metrics: (http\S+)", line)
        url = found[1] if found else url
        if "step " in line:  # the first epoch is done
            break
    families = {family.name: family for family in text_string_to_metric_families(urllib.request.urlopen(url, timeout=5).read().decode())}
    samples = {(s.name, s.labels.get("objective"), s.labels.get("split")): s.value for f in families.values() for s in f.samples}
    assert samples["babybert_pretrain_pairs_total", None, None] > 0
    assert 0 < samples["babybert_pretrain_loss", "mlm", "validation"] < 6
    assert samples["babybert_checkpoint_saves_total", None, None] >= 0
    job.send_signal(signal.SIGTERM)
    threading.Thread(target=job.stderr.read, daemon=True).start()
    assert job.wait(60) == 143
    assert "the same command goes on" in job.stdout.read()
    assert newest_whole(tmp_path) is not None


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
    assert newest_whole(tmp_path).name == "step-00000002"


def test_a_port_that_is_taken_is_said_before_anything_else(demo_folder, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        job = subprocess.run([*COMMAND, f"--data={demo_folder}", f"--out={tmp_path / 'run'}", f"--metrics-port={port}"], capture_output=True, text=True)
    assert job.returncode == 2
    assert f"127.0.0.1:{port}" in job.stderr
    assert not (tmp_path / "run").exists()
