"""The background uploads, against a real S3 server."""

import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
from faulty_proxy import Refusal, S3Proxy, deny, pass_all
from prometheus_client import CollectorRegistry
from test_checkpoint_storage import Save, save, store

from babybert.checkpoint.checkpoint_metrics import CheckpointMetrics
from babybert.checkpoint.format import checkpoint_problem
from babybert.checkpoint.storage import S3Store
from babybert.checkpoint.uploader import Uploader
from babybert.errors import EXIT_CRASH, StorageError, UsageError

__all__ = ["save", "store"]  # fixtures


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> CheckpointMetrics:
    return CheckpointMetrics(registry)


@pytest.mark.slow
def test_uploads_are_one_at_a_time_and_the_newest_replaces_the_waiting_one(
    store: S3Store,
    save: Save,
    metrics: CheckpointMetrics,
    registry: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    uploaded: list[str] = []
    may_continue = threading.Event()
    original = S3Store.upload

    def slow_upload(self: S3Store, folder: Path) -> int:
        uploaded.append(folder.name)
        may_continue.wait(30)
        return original(self, folder)

    monkeypatch.setattr(S3Store, "upload", slow_upload)
    uploader = Uploader(store, 9, metrics, tmp_path / "metrics.jsonl")
    folders = [save(step) for step in (1, 2, 3)]
    uploader.submit(folders[0])
    while not uploaded:
        time.sleep(0.01)
    for folder in folders[1:]:
        uploader.submit(folder)
    assert uploader.in_use == {folders[0], folders[2]}
    may_continue.set()
    uploader.finish(30)
    assert uploaded == ["step-00000001", "step-00000003"]
    assert store.steps() == [3, 1]
    assert registry.get_sample_value("babybert_checkpoint_uploads_total") == 2


@pytest.mark.slow
def test_a_failed_upload_is_retried_and_reported_in_the_end(
    store: S3Store,
    save: Save,
    metrics: CheckpointMetrics,
    registry: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("babybert.checkpoint.uploader.FIRST_PAUSE", 0.05)
    fails = iter([True, True, False])
    original = S3Store.upload

    def unreliable_upload(self: S3Store, folder: Path) -> int:
        if next(fails):
            raise StorageError("the server is away")
        return original(self, folder)

    monkeypatch.setattr(S3Store, "upload", unreliable_upload)
    uploader = Uploader(store, 9, metrics, tmp_path / "metrics.jsonl")
    uploader.submit(save(1))
    uploader.finish(30)
    assert store.steps() == [1]
    assert registry.get_sample_value("babybert_checkpoint_upload_failures_total") == 2

    def failing_upload(self: Any, folder: Path) -> NoReturn:
        raise StorageError("the server is away")

    monkeypatch.setattr(S3Store, "upload", failing_upload)
    uploader = Uploader(store, 9, metrics, tmp_path / "metrics.jsonl")
    folder = save(2)
    uploader.submit(folder)
    with pytest.raises(StorageError, match=r"step-00000002 is valid but could not be uploaded \(the server is away"):
        uploader.finish(0.5)
    assert checkpoint_problem(folder) is None


def test_what_follows_an_upload_does_not_make_it_fail(
    store: S3Store,
    save: Save,
    metrics: CheckpointMetrics,
    registry: CollectorRegistry,
    s3_proxy: S3Proxy,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """Each refusal is a warning that is logged once, however many uploads there are."""
    curve = tmp_path / "metrics.jsonl"
    curve.write_text("{}\n")
    refuse_cleanup = deny("s3:DeleteObject", "s3:ListBucketMultipartUploads")
    s3_proxy.rule = lambda request: (
        Refusal(403, "AccessDenied") if request.path.endswith(curve.name) else refuse_cleanup(request)
    )
    uploader = Uploader(store, 1, metrics, curve)
    for step in (1, 2, 3):
        uploader.submit(save(step))
        while uploader.in_use:
            time.sleep(0.01)
    uploader.finish(30)
    assert store.steps() == [3, 2, 1]
    assert registry.get_sample_value("babybert_checkpoint_uploads_total") == 3
    assert registry.get_sample_value("babybert_checkpoint_upload_failures_total") == 0
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 3
    for problem, right in (
        ("the metrics are not uploaded", "s3:PutObject"),
        ("old checkpoints are not deleted", "s3:DeleteObject"),
        ("interrupted uploads are not aborted", "s3:ListBucketMultipartUploads"),
    ):
        assert any(problem in warning and right in warning for warning in warnings)


def test_metrics_that_could_not_be_uploaded_are_retried_without_the_checkpoint(
    store: S3Store,
    save: Save,
    metrics: CheckpointMetrics,
    registry: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("babybert.checkpoint.uploader.FIRST_PAUSE", 0.05)
    curve = tmp_path / "metrics.jsonl"
    curve.write_text("{}\n")
    fails = iter([True, True, False])
    original = S3Store.upload_metrics

    def unreliable_upload(self: S3Store, path: Path) -> None:
        if next(fails):
            raise StorageError("the server is away")
        original(self, path)

    monkeypatch.setattr(S3Store, "upload_metrics", unreliable_upload)
    uploader = Uploader(store, 1, metrics, curve)
    uploader.submit(save(1))
    uploader.finish(30)
    store.download_metrics(tmp_path / "downloaded.jsonl")
    assert (tmp_path / "downloaded.jsonl").read_text() == "{}\n"
    assert registry.get_sample_value("babybert_checkpoint_uploads_total") == 1
    assert registry.get_sample_value("babybert_checkpoint_upload_failures_total") == 0


def test_a_slow_clean_up_at_the_end_does_not_make_the_run_fail(
    store: S3Store, save: Save, metrics: CheckpointMetrics, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    may_continue = threading.Event()
    monkeypatch.setattr(S3Store, "prune", lambda self, keep: may_continue.wait(30))
    uploader = Uploader(store, 1, metrics, tmp_path / "metrics.jsonl")
    uploader.submit(save(1))
    while not store.steps():
        time.sleep(0.01)
    uploader.finish(0.2)
    may_continue.set()


def test_keys_that_expire_during_a_run_are_retried_until_its_end(
    store: S3Store,
    save: Save,
    metrics: CheckpointMetrics,
    s3_proxy: S3Proxy,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A restart may get new keys, so the exit code is 1. If it does not, the check of the access ends it with 2."""
    monkeypatch.setattr("babybert.checkpoint.uploader.FIRST_PAUSE", 0.05)
    uploader = Uploader(store, 1, metrics, tmp_path / "metrics.jsonl")
    expired = Refusal(400, "ExpiredToken", "The provided token has expired.")
    s3_proxy.rule = lambda request: expired
    uploader.submit(save(1))
    while len(s3_proxy.requests) < 3:
        time.sleep(0.01)
    s3_proxy.rule = pass_all  # a role's keys are renewed
    while not store.steps():
        time.sleep(0.01)
    s3_proxy.rule = lambda request: expired
    uploader.submit(save(2))
    with pytest.raises(StorageError, match=r"step-00000002 is valid but could not be .* have expired") as caught:
        uploader.finish(5)
    assert caught.value.exit_code == EXIT_CRASH
    with pytest.raises(UsageError, match=r"the AWS credentials have expired .*; get new ones"):
        store.check_access()
