"""A run's checkpoints, here and in a real S3 store: found, fetched, passed over, and survived whatever happens."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlparse

import pytest
from conftest import Seaweed, aws_variables, run_until_killed
from faulty_proxy import FaultyProxy

from babybert.checkpoint import storage
from babybert.checkpoint.format import MANIFEST, checkpoint_problem, list_checkpoints, newest_valid, read_state
from babybert.checkpoint.manager import CheckpointManager
from babybert.checkpoint.metrics_log import read_metrics
from babybert.checkpoint.storage import S3Store
from babybert.config import PrepareConfig
from babybert.data.dataset import sha256
from babybert.data.prepare import prepare
from babybert.errors import DataError, StorageError, UsageError, UserError
from babybert.s3 import list_keys
from babybert.training.metrics import RunMetrics
from babybert.training.train import pretrain

COMMAND = [sys.executable, "-m", "babybert.cli", "pretrain", "--no-metrics", "--device=cpu", "--log-every=1"]
SIZES = [
    "--preset=tiny",
    "--width=8",
    "--heads=2",
    "--layers=1",
    "--feed-forward=16",
    "--dropout=0.1",
    "--batch-size=8",
]


@pytest.fixture
def address(s3):
    return f"s3://{s3.bucket}/runs/one"


@pytest.mark.slow
def test_a_new_machine_goes_on_from_the_store(small, address, tmp_path):
    whole = pretrain(small(out=tmp_path / "whole", dropout=0.1)).checkpoint
    first = pretrain(small(out=tmp_path / "a", dropout=0.1, store=address, max_steps=28, lr=small().lr))
    assert S3Store(address).steps() == [28]
    shutil.rmtree(tmp_path / "a")
    again = pretrain(small(out=tmp_path / "b", dropout=0.1, store=address))
    assert first.checkpoint.name == "step-00000028"
    assert again.checkpoint.name == whole.name
    lines = read_metrics(tmp_path / "b" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["split"] == "validation"] == [28, 56]  # the curve came along
    assert S3Store(address).steps() == [56, 28]


@pytest.mark.slow
def test_what_is_broken_here_is_fetched_and_what_is_broken_there_passed_over(small, address, s3, tmp_path, capsys):
    config = small(store=address, epochs=3, keep_checkpoints=9)
    pretrain(config)
    weights = config.out / "step-00000084" / "model.safetensors"
    good = sha256(weights)
    weights.write_bytes(b"broken")
    outcome = pretrain(small(store=address, epochs=3, keep_checkpoints=9))
    assert outcome.checkpoint.name == "step-00000084"
    assert sha256(weights) == good
    weights.write_bytes(b"broken")
    (there,) = [
        key
        for key, _ in list_keys(s3.client, s3.bucket, "runs/one/step-00000084/")
        if key.endswith("model.safetensors")
    ]
    s3.client.put_object(Bucket=s3.bucket, Key=there, Body=b"broken")
    capsys.readouterr()
    outcome = pretrain(small(store=address, epochs=3, max_steps=57, keep_checkpoints=9))
    assert read_state(outcome.checkpoint)["step"] == 57  # from 56
    assert capsys.readouterr().err.count("passing over") == 2


def test_a_step_can_be_chosen_and_the_newer_are_set_aside(small):
    pretrain(small(epochs=3, keep_checkpoints=9))
    outcome = pretrain(small(resume="28", max_steps=30, keep_checkpoints=9))
    assert outcome.checkpoint.name == "step-00000030"
    assert len(list(small().out.glob("aside-*-step-*"))) == 2
    with pytest.raises(DataError, match="has no whole checkpoint of step 29; it has 30, 28"):
        pretrain(small(resume="29"))


@pytest.mark.slow
def test_another_runs_checkpoint_can_be_gone_on_from(small, address, tmp_path):
    pretrain(small(out=tmp_path / "a", store=address, epochs=1))
    for source in (str(tmp_path / "a"), str(tmp_path / "a" / "step-00000028"), address, f"{address}/step-00000028"):
        outcome = pretrain(small(out=tmp_path / re.sub(r"\W", "_", source), resume=source, max_steps=30))
        assert read_state(outcome.checkpoint)["step"] == 30
        assert read_state(outcome.checkpoint)["restarts"] == 1
    with pytest.raises(DataError, match="no whole checkpoint"):
        pretrain(small(out=tmp_path / "x", resume=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match="no whole checkpoint there"):
        pretrain(small(out=tmp_path / "y", resume=address + "-nothing"))


def test_never_means_never(small, address, tmp_path):
    pretrain(small(out=tmp_path / "a", store=address, epochs=1))
    with pytest.raises(UsageError, match="--resume never"):
        pretrain(small(out=tmp_path / "b", store=address, resume="never"))


def test_two_jobs_do_not_share_a_folder_or_a_prefix(small, address, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_is_alive", lambda process: True)
    job = subprocess.Popen(
        [
            *COMMAND,
            *SIZES,
            f"--data={small().data}",
            f"--out={tmp_path / 'run'}",
            f"--store={address}",
            "--epochs=100000",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in job.stderr:
            if "held-out" in line:
                break
        with pytest.raises(UserError, match="another process is training there"):
            pretrain(small())
        with pytest.raises(
            UserError, match=rf"process {job.pid} on .* is training there; stop it, or choose another --store"
        ):
            pretrain(small(out=tmp_path / "other", store=address))
    finally:
        job.kill()
        job.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "store", "message", "code"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, None, "cannot list there: access refused", 2),
        (
            {"AWS_ACCESS_KEY_ID": "read-key", "AWS_SECRET_ACCESS_KEY": "read-secret"},
            None,
            "cannot write there: access refused",
            2,
        ),
        ({}, "s3://no-such-bucket/x", "cannot list there: no such object or bucket", 3),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, None, "cannot list there", 1),
    ],
)
def test_a_store_that_refuses_is_said_before_the_first_step(small, address, tmp_path, variables, store, message, code):
    command = [*COMMAND, *SIZES, f"--data={small().data}", f"--out={tmp_path / 'run'}", f"--store={store or address}"]
    job = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    assert job.returncode == code, job.stderr
    assert message in job.stderr.splitlines()[-1]
    assert "Traceback" not in job.stderr
    assert not list_checkpoints(tmp_path / "run")


KILLED_RUN = ["pretrain", *COMMAND[4:], *SIZES, "--epochs=2", "--checkpoint-every=12", "--keep-checkpoints=1"]


@pytest.fixture(scope="module")
def uninterrupted(demo_folder, tmp_path_factory):
    """The last checkpoint of the same run when nobody kills it."""
    out = tmp_path_factory.mktemp("whole")
    subprocess.run(
        [sys.executable, "-m", "babybert.cli", *KILLED_RUN, f"--data={demo_folder}", f"--out={out}"],
        check=True,
        capture_output=True,
    )
    return newest_valid(out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "calls", "what"),
    [
        ("babybert.checkpoint.format:save_model", 2, "in a local save"),
        ("babybert.checkpoint.format:_flush", 9, "before the local rename"),
        ("babybert.checkpoint.storage:S3Store.upload", 1, "before an upload"),
        ("babybert.checkpoint.storage:S3Store.key", 6, "in the middle of an upload, or before it"),
        ("babybert.checkpoint.storage:S3Store.put_metrics", 1, "after the manifest"),
        ("babybert.checkpoint.storage:S3Store.prune", 1, "before pruning there"),
        ("babybert.checkpoint.storage:S3Store._delete", 2, "while pruning there"),
        ("babybert.checkpoint.manager:prune", 2, "before pruning here"),
        ("babybert.checkpoint.format:shutil.rmtree", 4, "while pruning or saving here"),
    ],
)
def test_killed_anywhere_it_ends_with_the_same_bits(small, uninterrupted, address, tmp_path, function, calls, what):
    here = [*KILLED_RUN, f"--data={small().data}", f"--out={tmp_path / 'run'}", f"--store={address}"]
    run_until_killed(function, calls, *here)
    if calls % 2:  # half the time the machine is gone, and its disk with it
        shutil.rmtree(tmp_path / "run")
    again = subprocess.run([sys.executable, "-m", "babybert.cli", *here], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    one, other = newest_valid(tmp_path / "run"), uninterrupted
    assert one.name == other.name
    for file in ("model.safetensors", "training.pt"):
        assert sha256(one / file) == sha256(other / file), what
    fetched = S3Store(address).download(56, tmp_path)
    assert checkpoint_problem(fetched) is None
    assert sha256(fetched / "model.safetensors") == sha256(other / "model.safetensors")


@pytest.fixture
def proxy(s3, s3_endpoint, monkeypatch):
    where = urlparse(s3_endpoint)
    proxy = FaultyProxy((where.hostname, where.port))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.close()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["refuse", "error", "reset", "hang"])
def test_training_goes_on_while_the_server_is_bad_and_the_newest_gets_there(
    small, address, proxy, tmp_path, s3, monkeypatch, fault
):
    monkeypatch.setenv("BABYBERT_S3_TIMEOUT", "1")
    command = [
        *COMMAND,
        *SIZES,
        f"--data={small().data}",
        f"--out={tmp_path / 'run'}",
        f"--store={address}",
        "--epochs=60",
        "--checkpoint-every=20",
    ]
    job = subprocess.Popen([*command, "--metrics", "--metrics-port=0"], stderr=subprocess.PIPE, text=True)
    said = []
    for line in job.stderr:
        said.append(line)
        if "step 28:" in line:
            proxy.mode = fault
            break
    failed = epochs = 0
    for line in job.stderr:
        said.append(line)
        failed += "is not uploaded yet" in line
        epochs += "held-out" in line
        if (
            failed and epochs
        ):  # the order is the machine's: a fast one has trained to the end before the first failure is known
            proxy.mode = "pass"
            break
    said += job.stderr.read().splitlines(keepends=True)
    assert job.wait(120) == 0, "".join(said)
    assert failed
    newest = newest_valid(tmp_path / "run")
    assert S3Store(address).steps()[0] == int(newest.name[5:]) == 60 * 28
    manifest = S3Store(address).manifest(60 * 28)
    assert manifest["files"] == json.loads((newest / MANIFEST).read_text())["files"]


@pytest.mark.slow
def test_a_server_that_is_killed_and_started_again_has_the_newest_in_the_end(small, tmp_path, monkeypatch):
    (tmp_path / "seaweed").mkdir()
    server = Seaweed(tmp_path / "seaweed")
    server.start()
    try:
        for name, value in {**aws_variables(server.url), "BABYBERT_S3_TIMEOUT": "2"}.items():
            monkeypatch.setenv(name, value)
        store = S3Store("s3://bucket/run")
        store.client.create_bucket(Bucket="bucket")
        command = [
            *COMMAND,
            *SIZES,
            f"--data={small().data}",
            f"--out={tmp_path / 'run'}",
            f"--store={store.address}",
            "--epochs=40",
        ]
        job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for line in job.stderr:
            if "step 56:" in line:
                server.kill()
            if "is not uploaded yet" in line:
                server.start()
                break
        rest = job.stderr.read()
        assert job.wait(180) == 0, rest
        assert store.steps()[0] == 40 * 28
        assert checkpoint_problem(store.download(40 * 28, tmp_path)) is None
    finally:
        server.kill()


@pytest.mark.slow
def test_a_server_that_never_comes_back_is_said_and_the_local_copy_is_whole(small, address, proxy, tmp_path):
    command = [
        *COMMAND,
        *SIZES,
        f"--data={small().data}",
        f"--out={tmp_path / 'run'}",
        f"--store={address}",
        "--epochs=30",
        "--upload-minutes=0.05",
    ]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in job.stderr:
        if "step 28:" in line:
            proxy.mode = "refuse"
            break
    rest = job.stderr.read()
    assert job.wait(120) == 1, rest
    assert re.search(
        r"error: .*step-00000840 is whole, but could not be uploaded \(.+\); start again to go on from it",
        rest.strip().splitlines()[-1],
    )
    assert checkpoint_problem(tmp_path / "run" / "step-00000840") is None
    proxy.mode = "pass"
    time.sleep(0.1)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert S3Store(address).steps()[0] == 840


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.EACCES, UsageError), (errno.EROFS, UsageError), (errno.ENOSPC, StorageError)]
)
def test_a_folder_that_is_refused_for_good_is_not_tried_again(small, monkeypatch, code, kind):
    def refuse(path, *arguments, **named):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(kind, match="run: cannot be written: "), CheckpointManager(small(), RunMetrics()):
        pass
    with pytest.raises(kind, match="cannot write the data"):
        prepare(PrepareConfig(out=small().out / "data"))
