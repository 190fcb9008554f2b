"""The checkpoints of a run, local and in a real S3 store: found, downloaded, skipped, and intact after any kill."""

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlparse

import pytest
from conftest import S3, Seaweed, aws_variables
from faulty_proxy import FaultyProxy, Refusal, S3Proxy, S3Request, allow
from processes import COMMAND_SECONDS, ChildProcess, run_babybert, run_until_killed, start_babybert

from babybert import s3_lease
from babybert.checkpoint.format import checkpoint_problem, find_checkpoint, list_checkpoints, read_manifest, read_state
from babybert.checkpoint.manager import CheckpointManager
from babybert.checkpoint.metrics_log import read_metrics
from babybert.checkpoint.storage import LEASE, S3Store
from babybert.cli import main
from babybert.config import PrepareConfig, PretrainConfig
from babybert.data.digest import sha256
from babybert.data.prepare import prepare
from babybert.errors import DataError, StorageError, UsageError, UserError
from babybert.playground.run_history import RunHistory
from babybert.s3 import list_keys
from babybert.training.metrics import RunMetrics
from babybert.training.train import TrainingResult, pretrain

FLAGS = [
    "pretrain",
    "--no-metrics",
    "--device=cpu",
    "--log-every=1",
    "--preset=tiny",
    "--width=8",
    "--heads=2",
    "--layers=1",
    "--feed-forward=16",
    "--dropout=0.1",
    "--batch-size=8",
]
Small = Callable[..., PretrainConfig]


def result_of(config: PretrainConfig) -> TrainingResult:
    """Train, as rank 0."""
    result = pretrain(config)
    assert result is not None
    return result


def flags_of(small: Small, folder: Path, address: str) -> list[str]:
    """The flags of a small run in `folder` that uploads to `address`."""
    return [*FLAGS, f"--data={small().data}", f"--out={folder / 'run'}", f"--store={address}"]


def start(small: Small, folder: Path, address: str, *flags: str) -> ChildProcess:
    """Start such a run in another process."""
    return start_babybert(*flags_of(small, folder, address), *flags)


@pytest.fixture
def address(s3: S3) -> str:
    """The address of an empty store."""
    return f"s3://{s3.bucket}/runs/one"


@pytest.mark.slow
def test_a_new_machine_resumes_from_the_store(small: Small, address: str, tmp_path: Path) -> None:
    complete = result_of(small(out=tmp_path / "complete", dropout=0.1)).checkpoint
    first = result_of(small(out=tmp_path / "a", dropout=0.1, store=address, max_steps=28, lr=small().lr))
    assert S3Store(address).steps() == [28]
    shutil.rmtree(tmp_path / "a")
    resumed = result_of(small(out=tmp_path / "b", dropout=0.1, store=address))
    assert first.checkpoint.name == "step-00000028"
    assert resumed.checkpoint.name == complete.name
    lines = read_metrics(tmp_path / "b" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["split"] == "validation"] == [28, 56]  # the curve was downloaded too
    assert S3Store(address).steps() == [56, 28]


@pytest.mark.slow
def test_a_corrupt_local_checkpoint_is_downloaded_and_a_corrupt_remote_one_skipped(
    small: Small, address: str, s3: S3, caplog: pytest.LogCaptureFixture
) -> None:
    config = small(store=address, epochs=3, keep_checkpoints=9)
    pretrain(config)
    weights = config.out / "step-00000084" / "model.safetensors"
    digest = sha256(weights)
    weights.write_bytes(b"broken")
    assert result_of(config).checkpoint.name == "step-00000084"
    assert sha256(weights) == digest
    weights.write_bytes(b"broken")
    (remote_key,) = [
        key
        for key, _ in list_keys(s3.client, s3.bucket, "runs/one/step-00000084/")
        if key.endswith("model.safetensors")
    ]
    s3.client.put_object(Bucket=s3.bucket, Key=remote_key, Body=b"broken")
    caplog.clear()
    resumed = result_of(small(store=address, epochs=3, max_steps=57, keep_checkpoints=9))
    assert read_state(resumed.checkpoint).step == 57  # from 56
    assert caplog.text.count("skipping") == 2


def test_a_step_can_be_chosen_and_newer_ones_are_set_aside(small: Small) -> None:
    pretrain(small(epochs=3, keep_checkpoints=9))
    resumed = result_of(small(resume="28", max_steps=30, keep_checkpoints=9))
    assert resumed.checkpoint.name == "step-00000030"
    assert len(list(small().out.glob("aside-*-step-*"))) == 2


@pytest.mark.slow
def test_a_step_that_cannot_be_resumed_changes_nothing(small: Small, address: str, tmp_path: Path) -> None:
    """A typo, a corrupt step, other sizes, other data, newer steps in the store: nothing is renamed."""
    pretrain(small(epochs=3, keep_checkpoints=9))
    run = small().out
    before = sorted(path.name for path in run.glob("*step-*"))
    prepare(PrepareConfig(out=tmp_path / "other", demo_documents=40, validation_fraction=0.2, min_frequency=3))
    with pytest.raises(DataError, match="has no checkpoint of step 29; it has 84, 56, 28"):
        pretrain(small(resume="29"))
    with pytest.raises(UsageError, match="has sizes"):
        pretrain(small(resume="28", width=16))
    with pytest.raises(UsageError, match="was trained with seed 0, the settings say 4"):
        pretrain(small(resume="28", seed=4))
    with pytest.raises(DataError, match="another vocabulary"):
        pretrain(small(resume="28", data=tmp_path / "other"))
    S3Store(address).upload(run / "step-00000084")
    with pytest.raises(UsageError, match=r"has newer checkpoints \(84\)"):
        pretrain(small(resume="56", store=address))
    (run / "step-00000056" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="the checkpoint of step 56 is corrupt; other steps: 84, 28"):
        pretrain(small(resume="56"))
    assert sorted(path.name for path in run.glob("*step-*")) == before
    resumed = result_of(small(epochs=3, keep_checkpoints=9))
    assert resumed.checkpoint.name == "step-00000084"


@pytest.mark.slow
def test_a_run_can_start_from_another_runs_checkpoint(small: Small, address: str, tmp_path: Path) -> None:
    pretrain(small(out=tmp_path / "a", store=address, epochs=1))
    for source in (str(tmp_path / "a"), str(tmp_path / "a" / "step-00000028"), address, f"{address}/step-00000028"):
        resumed = result_of(small(out=tmp_path / re.sub(r"\W", "_", source), resume=source, max_steps=30))
        assert read_state(resumed.checkpoint).step == 30
        assert read_state(resumed.checkpoint).restarts == 1
    with pytest.raises(DataError, match="no valid checkpoint"):
        pretrain(small(out=tmp_path / "x", resume=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match="no valid checkpoint there"):
        pretrain(small(out=tmp_path / "y", resume=address + "-nothing"))


@pytest.mark.slow
def test_resume_never_refuses_existing_checkpoints(small: Small, address: str, tmp_path: Path) -> None:
    pretrain(small(out=tmp_path / "a", store=address, epochs=1))
    with pytest.raises(UsageError, match="--resume never"):
        pretrain(small(out=tmp_path / "b", store=address, resume="never"))


@pytest.mark.slow
def test_two_jobs_do_not_share_a_folder_or_a_prefix(
    small: Small, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_lease, "_is_dead_process_of_this_host", lambda content: False)
    job = start(small, tmp_path, address, "--epochs=100000")
    try:
        job.wait_for_line("held-out")
        with pytest.raises(UserError, match="another process writes there"):
            pretrain(small())
        with pytest.raises(
            UserError, match=rf"process {job.process.pid} on .* is writing there; stop it, or choose another --store"
        ):
            pretrain(small(out=tmp_path / "other", store=address))
    finally:
        job.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "store", "message", "code"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, None, "cannot list there: access denied", 2),
        (
            {"AWS_ACCESS_KEY_ID": "read-key", "AWS_SECRET_ACCESS_KEY": "read-secret"},
            None,
            "cannot write there: access denied",
            2,
        ),
        ({}, "s3://no-such-bucket/x", "cannot list there: no such object or bucket", 3),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, None, "cannot list there", 1),
    ],
)
def test_a_store_that_denies_access_is_reported_before_the_first_step(
    small: Small, address: str, tmp_path: Path, variables: dict[str, str], store: str | None, message: str, code: int
) -> None:
    job = run_babybert(*flags_of(small, tmp_path, store or address), environment=variables)
    assert job.returncode == code, job.stderr
    assert message in job.stderr.splitlines()[-1]
    assert "Traceback" not in job.stderr
    assert not list_checkpoints(tmp_path / "run")


NO_CONDITIONS = Refusal(501, "NotImplemented", "A header you provided implies functionality that is not implemented")


@pytest.mark.parametrize(
    ("refusal", "says"),
    [
        (Refusal(400, "ExpiredToken", "The provided token has expired."), "have expired"),
        (Refusal(403, "RequestTimeTooSkewed"), "the clock of this machine"),
        (Refusal(400, "AuthorizationHeaderMalformed", "expecting 'eu-west-1'"), "set AWS_DEFAULT_REGION"),
        (Refusal(301, "PermanentRedirect"), "set AWS_DEFAULT_REGION"),
        (NO_CONDITIONS, "use a server with conditional writes"),
    ],
)
def test_a_store_that_no_retry_can_use_ends_the_job_with_2(
    small: Small, address: str, s3_proxy: S3Proxy, tmp_path: Path, capsys: Any, refusal: Refusal, says: str
) -> None:
    def refuse(request: S3Request) -> Refusal | None:
        return None if refusal is NO_CONDITIONS and not request.conditions else refusal

    s3_proxy.rule = refuse
    assert main(flags_of(small, tmp_path, address)) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not list_checkpoints(tmp_path / "run")


@pytest.mark.slow
def test_the_policy_for_pretraining_allows_a_run(
    small: Small, s3: S3, s3_proxy: S3Proxy, tmp_path: Path, capsys: Any
) -> None:
    policy = actions_of("pretrain-policy.json")
    rights = policy["arn:aws:s3:::my-bucket"] | policy["arn:aws:s3:::my-bucket/run/*"]
    address = f"s3://{s3.bucket}/run"
    s3_proxy.rule = allow(*rights)
    assert main([*flags_of(small, tmp_path, address), "--epochs=1"]) == 0
    assert "warning:" not in capsys.readouterr().err
    assert S3Store(address).steps() == [28]
    assert {request.right for request in s3_proxy.requests} == rights

    # The only right that a run can do without: interrupted uploads stay.
    s3_proxy.rule = allow(*rights - {"s3:ListBucketMultipartUploads"})
    assert main([*flags_of(small, tmp_path, address), "--epochs=2"]) == 0
    output = capsys.readouterr()
    (warning,) = [line for line in output.err.splitlines() if line.startswith("warning:")]
    assert "need the right s3:ListBucketMultipartUploads" in warning
    assert "held out" in output.out
    assert S3Store(address).steps()[0] == 56

    s3_proxy.rule = allow(*policy["arn:aws:s3:::my-bucket/corpus/*"], "s3:ListBucket")
    for name in "abcdefgh":
        body = f"One sentence of {name}. Another one.\n".encode() * 20
        s3.client.put_object(Bucket=s3.bucket, Key=f"corpus/{name}.txt", Body=body)
    flags = ["--corpus=text", f"--source=s3://{s3.bucket}/corpus/*.txt", f"--out={tmp_path / 'data'}"]
    assert main(["prepare", *flags, "--min-frequency=1", "--validation-fraction=0.5"]) == 0


@pytest.mark.slow
def test_the_policy_for_serving_allows_to_read_a_run(
    small: Small, s3: S3, s3_proxy: S3Proxy, tmp_path: Path, capsys: Any
) -> None:
    address = f"s3://{s3.bucket}/run"
    assert main([*flags_of(small, tmp_path, address), "--epochs=1"]) == 0
    s3_proxy.rule = allow(*set().union(*actions_of("serve-policy.json").values()))
    assert main(["archive", address, f"--out={tmp_path}"]) == 0
    history = RunHistory(address)
    assert history.curves()["steps"] == [28]
    assert history.query_checkpoints(b'{"text": "[MASK]"}', "application/json").status == 200
    assert main([*flags_of(small, tmp_path / "other", f"{address}-2"), f"--resume={address}"]) == 2
    assert "cannot write there: access denied" in capsys.readouterr().err


def actions_of(policy: str) -> dict[str, set[str]]:
    """The actions that a policy of the overlay for Amazon allows, by resource."""
    path = Path(__file__).parents[1] / "k8s" / "overlays" / "aws" / policy
    return {part["Resource"]: set(part["Action"]) for part in json.loads(path.read_text())["Statement"]}


KILLED_RUN = ["--epochs=2", "--checkpoint-every=12", "--keep-checkpoints=1"]


@pytest.fixture(scope="module")
def uninterrupted(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of the same run when nothing kills it."""
    out = tmp_path_factory.mktemp("uninterrupted")
    job = run_babybert(*FLAGS, *KILLED_RUN, f"--data={demo_folder}", f"--out={out}")
    assert job.returncode == 0, job.stderr
    return find_checkpoint(out)


# Public functions of the standard library and of the store, each at a call that lies in the named phase.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "calls", "phase"),
    [
        ("os:fsync", 3, "while the first checkpoint is flushed"),
        ("os:fsync", 14, "just before the second checkpoint is renamed"),
        ("pathlib:Path.rename", 2, "at the rename itself"),
        ("shutil:rmtree", 4, "while old checkpoints are deleted"),
        ("babybert.checkpoint.storage:S3Store.upload", 1, "before an upload"),
        ("babybert.checkpoint.storage:S3Store.key", 9, "during an upload"),
        ("babybert.checkpoint.storage:S3Store.upload_metrics", 1, "after the manifest is uploaded"),
        ("babybert.checkpoint.storage:S3Store.prune", 1, "before old checkpoints are deleted in the store"),
        ("babybert.checkpoint.storage:S3Store.delete_objects", 2, "while they are deleted"),
    ],
)
def test_a_run_killed_at_any_point_ends_with_the_same_bits(
    small: Small, uninterrupted: Path, address: str, tmp_path: Path, function: str, calls: int, phase: str
) -> None:
    flags = [*flags_of(small, tmp_path, address), *KILLED_RUN]
    run_until_killed(function, calls, *flags)
    if calls % 2:  # half the time the machine and its disk are gone
        shutil.rmtree(tmp_path / "run")
    resumed = run_babybert(*flags)
    assert resumed.returncode == 0, resumed.stderr
    newest = find_checkpoint(tmp_path / "run")
    assert newest.name == uninterrupted.name
    for file in ("model.safetensors", "training.pt"):
        assert sha256(newest / file) == sha256(uninterrupted / file), phase
    downloaded = S3Store(address).download(56, tmp_path)
    assert checkpoint_problem(downloaded) is None
    assert sha256(downloaded / "model.safetensors") == sha256(uninterrupted / "model.safetensors")


@pytest.fixture
def proxy(s3: S3, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy in front of the S3 server, which the AWS variables point to."""
    target = urlparse(s3_endpoint)
    assert target.hostname is not None and target.port is not None
    proxy = FaultyProxy((target.hostname, target.port))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.close()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["refuse", "error", "reset", "hang"])
def test_training_continues_while_the_server_fails_and_the_newest_checkpoint_is_uploaded(
    small: Small, address: str, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setenv("BABYBERT_S3_TIMEOUT", "1")
    job = start(small, tmp_path, address, "--epochs=12", "--checkpoint-every=20", "--metrics", "--metrics-port=0")
    job.wait_for_line("step 28:")
    proxy.mode = fault
    job.wait_for_line("not uploaded yet")  # a checkpoint, or the metrics
    proxy.mode = "pass"
    code = job.wait(COMMAND_SECONDS)
    assert code == 0, job.output
    newest = find_checkpoint(tmp_path / "run")
    assert S3Store(address).steps()[0] == int(newest.name[5:]) == 12 * 28
    assert S3Store(address).manifest(12 * 28).files == read_manifest(newest).files


@pytest.mark.slow
def test_a_server_that_is_killed_and_restarted_gets_the_newest_checkpoint(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "seaweed").mkdir()
    server = Seaweed(tmp_path / "seaweed")
    server.start()
    try:
        for name, value in {**aws_variables(server.url), "BABYBERT_S3_TIMEOUT": "2"}.items():
            monkeypatch.setenv(name, value)
        store = S3Store("s3://bucket/run")
        store.client.create_bucket(Bucket="bucket")
        job = start(small, tmp_path, store.address, "--epochs=15")
        job.wait_for_line("step 56:")
        server.kill()
        job.wait_for_line("is not uploaded yet")
        server.start()
        code = job.wait(COMMAND_SECONDS)
        assert code == 0, job.output
        assert store.steps()[0] == 15 * 28
        assert checkpoint_problem(store.download(15 * 28, tmp_path)) is None
    finally:
        server.kill()


@pytest.mark.slow
def test_a_server_that_stays_away_is_reported_and_the_local_copy_is_valid(
    small: Small, address: str, proxy: FaultyProxy, tmp_path: Path
) -> None:
    flags = ["--epochs=12", "--upload-minutes=0.05"]
    job = start(small, tmp_path, address, *flags)
    job.wait_for_line("step 28:")
    proxy.mode = "refuse"
    code = job.wait(COMMAND_SECONDS)
    assert code == 1, job.output
    assert re.search(
        r"error: .*step-00000336 is valid but could not be uploaded \(.+\); start again to continue from it",
        job.output.strip().splitlines()[-1],
    )
    assert checkpoint_problem(tmp_path / "run" / "step-00000336") is None
    proxy.mode = "pass"
    resumed = run_babybert(*flags_of(small, tmp_path, address), *flags)
    assert resumed.returncode == 0, resumed.stderr
    assert S3Store(address).steps()[0] == 336


@pytest.mark.slow
def test_a_job_that_lost_its_lease_stops_and_leaves_the_store_alone(small: Small, address: str, tmp_path: Path) -> None:
    store = S3Store(address)
    job = start(small, tmp_path, address, "--epochs=100000", "--checkpoint-every=20")
    try:
        deadline = time.monotonic() + COMMAND_SECONDS
        while not store.steps():
            assert time.monotonic() < deadline, job.output
            time.sleep(0.1)
        content = {"owner": "x", "host": "elsewhere", "process": 1, "seconds": 60.0}
        store.client.put_object(Bucket=store.bucket, Key=store.key(LEASE), Body=json.dumps(content).encode())
        code = job.wait(COMMAND_SECONDS)
    finally:
        job.kill()
    assert code == 1, job.output
    assert "process 1 on elsewhere has taken over" in job.output.splitlines()[-1]
    assert "Traceback" not in job.output
    assert store.steps(), "the other job's store is as it was"


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.EACCES, UsageError), (errno.EROFS, UsageError), (errno.ENOSPC, StorageError)]
)
def test_a_folder_without_access_is_a_usage_error_and_a_full_disk_a_storage_error(
    small: Small, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[UserError]
) -> None:
    def refuse(path: Path, *arguments: Any, **named: Any) -> NoReturn:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(kind, match="run: cannot be written: "),
        CheckpointManager(small(), RunMetrics().checkpoints),
    ):
        pass
    with pytest.raises(kind, match="data: cannot be written: "):
        prepare(PrepareConfig(out=small().out / "data"))
