"""The background uploads, against a real S3 server."""

import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
from prometheus_client import CollectorRegistry
from test_checkpoint_storage import Save, save, store

from babybert.checkpoint.checkpoint_metrics import CheckpointMetrics
from babybert.checkpoint.format import checkpoint_problem
from babybert.checkpoint.storage import S3Store
from babybert.checkpoint.uploader import Uploader
from babybert.errors import StorageError

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
