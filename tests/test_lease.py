"""The lease on an S3 prefix, against a real S3 server: one owner at a time, and only the owner changes anything."""

import contextlib
import json
import threading
import time
from pathlib import Path

import pytest
from conftest import S3
from faulty_proxy import S3Proxy, access_denied, deny
from prometheus_client import CollectorRegistry
from test_checkpoint_storage import Save, keys, save, store

from babybert.checkpoint.checkpoint_metrics import CheckpointMetrics
from babybert.checkpoint.format import checkpoint_problem
from babybert.checkpoint.storage import LEASE, S3Store
from babybert.checkpoint.uploader import Uploader
from babybert.errors import StorageError, UsageError, UserError
from babybert.s3_lease import Lease, LeaseLost

__all__ = ["save", "store"]  # fixtures
OTHER_OWNER = {"owner": "x", "host": "elsewhere", "process": 1, "seconds": 60.0}


def put_lease(s3: S3, store: S3Store, content: bytes) -> None:
    s3.client.put_object(Bucket=s3.bucket, Key=store.key(LEASE), Body=content)


@pytest.mark.slow
def test_a_second_job_is_refused_while_the_first_runs(store: S3Store, s3: S3) -> None:
    with store.lease(6.0) as first:
        with pytest.raises(UserError, match=r"process \d+ on .* is writing there"), store.lease(6.0):
            pass
        assert not first.is_lost
    assert keys(s3) == []
    with store.lease(6.0):
        pass


@pytest.mark.slow
def test_of_many_jobs_exactly_one_gets_the_lease(store: S3Store) -> None:
    results: list[str] = []
    everyone_tried = threading.Barrier(8)

    def take() -> None:
        try:
            with S3Store(store.address).lease(6.0):
                results.append("taken")
                everyone_tried.wait(60)
        except UserError:
            results.append("refused")
            everyone_tried.wait(60)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(results) == ["refused"] * 7 + ["taken"]


@pytest.mark.slow
def test_the_lease_of_a_dead_job_expires(store: S3Store, s3: S3) -> None:
    """Its clock is wrong, which must not matter."""
    content = {**OTHER_OWNER, "seconds": 1.5, "renewed": time.time() + 10_000}
    put_lease(s3, store, json.dumps(content).encode())
    start = time.monotonic()
    with store.lease(5.0):
        assert 1.4 < time.monotonic() - start < 10
    put_lease(s3, store, b"{garbage")
    with store.lease(0.5):
        pass


def test_an_owner_notices_that_its_lease_is_lost(store: S3Store, s3: S3) -> None:
    with store.lease(0.3) as lease:
        put_lease(s3, store, json.dumps(OTHER_OWNER).encode())
        deadline = time.monotonic() + 10
        while not lease.is_lost:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(LeaseLost, match="process 1 on elsewhere has taken over"):
            lease.raise_if_lost()
    assert LEASE in keys(s3)[0]  # it is not ours to release


def test_a_job_without_the_lease_changes_nothing(store: S3Store, save: Save, s3: S3, tmp_path: Path) -> None:
    """It has not noticed that another job took over: its thread renews once in 20 minutes."""
    for step in (1, 2, 3):
        store.upload(save(step))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    upload = s3.client.create_multipart_upload(Bucket=s3.bucket, Key=store.key("step-00000004", "0" * 32, "x"))
    with store.lease(3600.0):
        store.upload(save(4))
        put_lease(s3, store, json.dumps(OTHER_OWNER).encode())
        before = keys(s3)
        for change in (
            lambda: store.upload(save(5)),
            lambda: store.upload_metrics(tmp_path / "metrics.jsonl"),
            lambda: store.prune(1),
            lambda: store.delete_objects([store.key("step-00000001", "manifest.json")]),
            lambda: store.abort_uploads(),
        ):
            with pytest.raises(LeaseLost):
                change()
        assert keys(s3) == before
        uploads = s3.client.list_multipart_uploads(Bucket=s3.bucket)["Uploads"]
        assert upload["UploadId"] in [each["UploadId"] for each in uploads]


@pytest.mark.slow
def test_two_owners_and_one_that_was_suspended(store: S3Store, save: Save, tmp_path: Path) -> None:
    """The second owner takes over while the first one's thread sleeps. The first one's uploader must stop for good."""
    first_store, second_store = S3Store(store.address), S3Store(store.address)
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Lease, "_renew_until_stopped", lambda lease: None)  # as if the process were suspended
            first = stack.enter_context(first_store.lease(1.0))
        first_store.upload(save(1))
        uploader = Uploader(first_store, 1, CheckpointMetrics(CollectorRegistry()), tmp_path / "metrics.jsonl")
        with second_store.lease(1.0):  # waits until the first one's lease has expired
            second_store.upload(save(3))
            uploader.submit(save(2))
            with pytest.raises(LeaseLost, match="has taken over"):
                uploader.finish(30)
            assert second_store.steps() == [3, 1]
            second_store.prune(9)
            assert checkpoint_problem(second_store.download(3, tmp_path)) is None
        assert first.is_lost


def test_a_lease_that_may_not_be_deleted_expires(
    store: S3Store, s3_proxy: S3Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    s3_proxy.rule = deny("s3:DeleteObject")
    with store.lease(0.5):
        pass
    assert "the lease could not be released and expires in 0 s" in caplog.text
    assert "the credentials need the right s3:DeleteObject" in caplog.text
    with store.lease(5.0):
        pass


def test_a_renewal_that_is_refused_does_not_lose_the_lease(store: S3Store, s3_proxy: S3Proxy) -> None:
    with store.lease(0.3) as lease:
        s3_proxy.rule = lambda request: access_denied(request) if request.method == "PUT" else None
        while not any(request.method == "PUT" for request in s3_proxy.requests[-2:]):
            time.sleep(0.05)
        lease.require_held()
        assert not lease.is_lost


@pytest.mark.parametrize("right", ["s3:PutObject", "s3:GetObject"])
def test_a_lease_that_cannot_be_taken_names_the_right(store: S3Store, s3: S3, s3_proxy: S3Proxy, right: str) -> None:
    put_lease(s3, store, json.dumps(OTHER_OWNER).encode())
    s3_proxy.rule = deny(right)
    message = f"cannot take the lease: access denied .* need the right {right}"
    with pytest.raises(UsageError, match=message), store.lease(0.5):
        pass


def test_a_missing_lease_is_waited_for_and_renewed(store: S3Store, save: Save, s3: S3) -> None:
    with store.lease(0.6):
        s3.client.delete_object(Bucket=s3.bucket, Key=store.key(LEASE))
        with pytest.raises(StorageError, match="is missing"):
            store.upload(save(1))
        deadline = time.monotonic() + 10
        while LEASE not in "".join(keys(s3)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        store.upload(save(1))
