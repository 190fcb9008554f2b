"""Against a real S3 server."""

import json
import threading
import time

import pytest

from babybert.checkpoint.format import MANIFEST, TrainState, checkpoint_problem, save_checkpoint
from babybert.checkpoint.lease import Lease
from babybert.checkpoint.storage import S3Store
from babybert.checkpoint.uploader import Uploader
from babybert.data.dataset import sha256
from babybert.errors import DataError, StorageError, UsageError, UserError
from babybert.s3 import list_keys
from babybert.training.metrics import RunMetrics
from babybert.training.train import load_or_create, make_optimizer


@pytest.fixture
def store(s3):
    return S3Store(f"s3://{s3.bucket}/runs/one")


@pytest.fixture
def saved(small, demo):
    """A function that writes the local checkpoint of a step."""
    config = small()
    bert = load_or_create(config, demo, demo.token_counts(), None)
    optimizer = make_optimizer(bert, config)
    config.out.mkdir()

    def save(step, loss=None):
        scores = {"mlm_loss": loss, "nsp_loss": 0.0} if loss is not None else None
        return save_checkpoint(config.out, TrainState(step), bert, demo.tokenizer, optimizer, {"scores": scores})

    return save


def keys(s3):
    return [key for key, _ in list_keys(s3.client, s3.bucket, "")]


def test_what_is_uploaded_is_downloaded(store, saved, tmp_path):
    folder = saved(7)
    size = store.upload(folder)
    assert size == sum(path.stat().st_size for path in folder.iterdir() if path.name != MANIFEST)
    assert store.steps() == [7]
    fetched = store.download(7, tmp_path)
    assert checkpoint_problem(fetched) is None
    for path in folder.iterdir():
        assert sha256(path) == sha256(fetched / path.name)


def test_a_second_upload_takes_the_place_of_the_first(store, saved, s3, tmp_path):
    folder = saved(7)
    store.upload(folder)
    first = set(keys(s3))
    store.upload(folder)
    store.prune(1)
    assert len(keys(s3)) == len(first)
    assert len(set(keys(s3)) & first) == 1  # the manifest
    assert checkpoint_problem(store.download(7, tmp_path)) is None


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "manifest", "format"])
def test_what_is_broken_there_is_refused_and_leaves_nothing_here(store, saved, s3, tmp_path, harm):
    store.upload(saved(7))
    (weights,) = [key for key in keys(s3) if key.endswith("model.safetensors")]
    manifest = store.key("step-00000007", MANIFEST)
    content = bytearray(s3.client.get_object(Bucket=s3.bucket, Key=weights)["Body"].read())
    if harm == "flip":
        content[len(content) // 2] ^= 1
        s3.client.put_object(Bucket=s3.bucket, Key=weights, Body=bytes(content))
    elif harm == "truncate":
        s3.client.put_object(Bucket=s3.bucket, Key=weights, Body=bytes(content[:-5]))
    elif harm == "remove":
        s3.client.delete_object(Bucket=s3.bucket, Key=weights)
    elif harm == "manifest":
        s3.client.put_object(Bucket=s3.bucket, Key=manifest, Body=b"{garbage")
    else:
        s3.client.put_object(
            Bucket=s3.bucket, Key=manifest, Body=json.dumps({**store.manifest(7), "format": 99}).encode()
        )
    with pytest.raises(DataError, match="step-00000007"):
        store.download(7, tmp_path)
    assert list(tmp_path.iterdir()) == [] or not [
        path for path in tmp_path.iterdir() if "step-" in path.name and path.name != "run"
    ]


def test_the_newest_and_the_best_are_kept_and_orphans_are_swept(store, saved, s3):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)):
        store.upload(saved(step, loss))
    for orphan in ("step-00000003/" + "0" * 32 + "/x", "step-00000009/" + "a" * 32 + "/x"):
        s3.client.put_object(Bucket=s3.bucket, Key=store.key(*orphan.split("/")), Body=b"x")
    s3.client.put_object(Bucket=s3.bucket, Key=store.key("notes.txt"), Body=b"not ours")
    store.prune(2)
    assert store.steps() == [5, 4, 2]
    steps = {key.split("/")[2] for key in keys(s3)}
    assert steps == {"step-00000002", "step-00000004", "step-00000005", "notes.txt"}
    assert not [key for key in keys(s3) if "0" * 32 in key or "a" * 32 in key]
    store.download(2, saved(5).parent)


def test_parts_of_a_killed_upload_are_aborted(store, saved, s3):
    for key in (store.key("step-00000003", "0" * 32, "model.safetensors"), "elsewhere"):
        upload = s3.client.create_multipart_upload(Bucket=s3.bucket, Key=key)
        s3.client.upload_part(
            Bucket=s3.bucket, Key=key, UploadId=upload["UploadId"], PartNumber=1, Body=b"x" * 6_000_000
        )
    store.upload(saved(4))
    store.prune(2)
    left = [upload["Key"] for upload in s3.client.list_multipart_uploads(Bucket=s3.bucket).get("Uploads", [])]
    assert left == ["elsewhere"]


def test_refusals_say_which(store, s3, monkeypatch):
    store.check()
    assert keys(s3) == []
    with pytest.raises(DataError, match="no-such-bucket/x: cannot list there: no such object or bucket"):
        S3Store("s3://no-such-bucket/x").check()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "read-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "read-secret")
    with pytest.raises(UsageError, match="cannot write there: access refused"):
        S3Store(store.address).check()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UsageError, match="cannot list there: access refused"):
        S3Store(store.address).check()


@pytest.mark.slow
def test_a_second_job_is_refused_while_the_first_lives(store, s3):
    with Lease(store, seconds=6.0) as first:
        with pytest.raises(UserError, match=r"process \d+ on .* is training there"), Lease(store, seconds=6.0):
            pass
        assert first.lost is None
    assert keys(s3) == []
    with Lease(store, seconds=6.0):
        pass


@pytest.mark.slow
def test_of_many_at_once_one_gets_it(store):
    got, refused = [], []
    everyone_tried = threading.Barrier(8)

    def take():
        try:
            with Lease(store, seconds=6.0):
                got.append(1)
                everyone_tried.wait(60)
        except UserError:
            refused.append(1)
            everyone_tried.wait(60)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 7)


@pytest.mark.slow
def test_a_dead_jobs_lease_ends_by_itself(store, s3):
    content = {
        "owner": "x",
        "host": "elsewhere",
        "process": 1,
        "seconds": 1.5,
        "renewed": time.time() + 10_000,
    }  # its clock is wrong
    s3.client.put_object(Bucket=s3.bucket, Key=store.key("lease.json"), Body=json.dumps(content).encode())
    start = time.monotonic()
    with Lease(store, seconds=5.0):
        assert 1.4 < time.monotonic() - start < 10
    s3.client.put_object(Bucket=s3.bucket, Key=store.key("lease.json"), Body=b"{garbage")
    with Lease(store, seconds=0.5):
        pass


def test_one_that_lost_its_lease_knows(store, s3):
    with Lease(store, seconds=0.3) as lease:
        content = {"owner": "x", "host": "elsewhere", "process": 1}
        s3.client.put_object(Bucket=s3.bucket, Key=store.key("lease.json"), Body=json.dumps(content).encode())
        deadline = time.monotonic() + 10
        while lease.lost is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert "process 1 on elsewhere has taken over" in lease.lost
    assert "lease.json" in keys(s3)[0]  # it is not ours to give back


def test_uploads_are_one_at_a_time_and_the_newest_wins(store, saved, monkeypatch, tmp_path):
    metrics, seen, free = RunMetrics(), [], threading.Event()
    original = S3Store.upload

    def slow(self, folder):
        seen.append(folder.name)
        free.wait(30)
        return original(self, folder)

    monkeypatch.setattr(S3Store, "upload", slow)
    uploader = Uploader(store, 9, metrics, tmp_path / "metrics.jsonl")
    folders = [saved(step) for step in (1, 2, 3)]
    uploader.submit(folders[0])
    while not seen:
        time.sleep(0.01)
    for folder in folders[1:]:
        uploader.submit(folder)
    assert uploader.in_use == {folders[0], folders[2]}
    free.set()
    uploader.finish(30)
    assert seen == ["step-00000001", "step-00000003"]
    assert store.steps() == [3, 1]
    assert metrics.registry.get_sample_value("babybert_checkpoint_uploads_total") == 2


def test_what_fails_is_tried_again_and_in_the_end_said(store, saved, monkeypatch, tmp_path):
    monkeypatch.setattr("babybert.checkpoint.uploader.FIRST_PAUSE", 0.05)
    metrics, fails = RunMetrics(), iter([True, True, False])
    original = S3Store.upload

    def unsteady(self, folder):
        if next(fails):
            raise StorageError("the server is away")
        return original(self, folder)

    monkeypatch.setattr(S3Store, "upload", unsteady)
    uploader = Uploader(store, 9, metrics, tmp_path / "metrics.jsonl")
    uploader.submit(saved(1))
    uploader.finish(30)
    assert store.steps() == [1]
    assert metrics.registry.get_sample_value("babybert_checkpoint_upload_failures_total") == 2
    monkeypatch.setattr(
        S3Store, "upload", lambda self, folder: (_ for _ in ()).throw(StorageError("the server is away"))
    )
    uploader = Uploader(store, 9, metrics, tmp_path / "metrics.jsonl")
    folder = saved(2)
    uploader.submit(folder)
    with pytest.raises(StorageError, match=r"step-00000002 is whole, but could not be uploaded \(the server is away"):
        uploader.finish(0.5)
    assert checkpoint_problem(folder) is None
