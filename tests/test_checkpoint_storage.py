"""Checkpoints in a real S3 server: complete or absent, pruned, and refused with a clear message."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import S3

from babybert.checkpoint.format import MANIFEST, CheckpointState, checkpoint_problem, save_checkpoint
from babybert.checkpoint.storage import S3Store
from babybert.config import PretrainConfig
from babybert.data.dataset import Dataset
from babybert.data.digest import sha256
from babybert.errors import DataError, UsageError
from babybert.s3 import list_keys
from babybert.training.optimizer import make_optimizer
from babybert.training.setup import new_model

Save = Callable[..., Path]


@pytest.fixture
def store(s3: S3) -> S3Store:
    """An empty store."""
    return S3Store(f"s3://{s3.bucket}/runs/one")


@pytest.fixture
def save(small: Callable[..., PretrainConfig], demo: Dataset) -> Save:
    """A function that writes a local checkpoint of a step, with a held-out loss if one is given."""
    config = small()
    bert = new_model(config, config.sizes(demo.tokenizer.size), demo.token_counts())
    optimizer = make_optimizer(bert, config)
    config.out.mkdir()

    def save_step(step: int, loss: float | None = None) -> Path:
        scores = {"mlm_loss": loss, "nsp_loss": 0.0} if loss is not None else None
        state = CheckpointState(step, 0, 0, 0.0, 0, demo.tokenizer.digest, {}, demo.digest, scores)
        return save_checkpoint(config.out, state, bert, demo.tokenizer, optimizer)

    return save_step


def keys(s3: S3) -> list[str]:
    """All keys of the bucket."""
    return [key for key, _ in list_keys(s3.client, s3.bucket, "")]


def test_what_is_uploaded_is_downloaded(store: S3Store, save: Save, tmp_path: Path) -> None:
    folder = save(7, 1.5)
    size = store.upload(folder)
    assert size == sum(path.stat().st_size for path in folder.iterdir() if path.name != MANIFEST)
    assert store.steps() == [7]
    downloaded = store.download(7, tmp_path)
    assert checkpoint_problem(downloaded) is None
    for path in folder.iterdir():
        assert sha256(path) == sha256(downloaded / path.name)


def test_a_second_upload_replaces_the_first(store: S3Store, save: Save, s3: S3, tmp_path: Path) -> None:
    folder = save(7)
    store.upload(folder)
    first_keys = set(keys(s3))
    store.upload(folder)
    store.prune(1)
    assert len(keys(s3)) == len(first_keys)
    assert len(set(keys(s3)) & first_keys) == 1  # the manifest
    assert checkpoint_problem(store.download(7, tmp_path)) is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "step", "format"])
@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_and_leaves_nothing(
    store: S3Store, save: Save, s3: S3, tmp_path: Path, damage: str
) -> None:
    store.upload(save(7))
    (weights,) = [key for key in keys(s3) if key.endswith("model.safetensors")]
    content = bytearray(s3.client.get_object(Bucket=s3.bucket, Key=weights)["Body"].read())
    manifest_key = store.key("step-00000007", MANIFEST)
    manifest = json.loads(store.manifest(7).to_json())

    def put(key: str, body: bytes) -> None:
        s3.client.put_object(Bucket=s3.bucket, Key=key, Body=body)

    if damage == "flip":
        content[len(content) // 2] ^= 1
        put(weights, bytes(content))
    elif damage == "truncate":
        put(weights, bytes(content[:-5]))
    elif damage == "remove":
        s3.client.delete_object(Bucket=s3.bucket, Key=weights)
    elif damage == "manifest":
        put(manifest_key, b"{garbage")
    else:
        put(manifest_key, json.dumps({**manifest, damage: 99}).encode())
    with pytest.raises(DataError, match="step-00000007"):
        store.download(7, tmp_path)
    assert not [path for path in tmp_path.iterdir() if "step-" in path.name]


def test_the_newest_and_the_best_are_kept_and_orphans_are_deleted(store: S3Store, save: Save, s3: S3) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)):
        store.upload(save(step, loss))
    for orphan in ("step-00000003/" + "0" * 32 + "/x", "step-00000009/" + "a" * 32 + "/x"):
        s3.client.put_object(Bucket=s3.bucket, Key=store.key(*orphan.split("/")), Body=b"x")
    s3.client.put_object(Bucket=s3.bucket, Key=store.key("notes.txt"), Body=b"not ours")
    store.prune(2)
    assert store.steps() == [5, 4, 2]
    steps = {key.split("/")[2] for key in keys(s3)}
    assert steps == {"step-00000002", "step-00000004", "step-00000005", "notes.txt"}
    assert not [key for key in keys(s3) if "0" * 32 in key or "a" * 32 in key]
    store.download(2, save(5).parent)


def test_parts_of_a_killed_upload_are_aborted(store: S3Store, save: Save, s3: S3) -> None:
    for key in (store.key("step-00000003", "0" * 32, "model.safetensors"), "elsewhere"):
        upload = s3.client.create_multipart_upload(Bucket=s3.bucket, Key=key)
        s3.client.upload_part(
            Bucket=s3.bucket, Key=key, UploadId=upload["UploadId"], PartNumber=1, Body=b"x" * 6_000_000
        )
    store.upload(save(4))
    store.prune(2)
    left = [upload["Key"] for upload in s3.client.list_multipart_uploads(Bucket=s3.bucket).get("Uploads", [])]
    assert left == ["elsewhere"]


def test_denied_access_says_to_what(store: S3Store, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    store.check_access()
    assert keys(s3) == []
    with pytest.raises(DataError, match="no-such-bucket/x: cannot list there: no such object or bucket"):
        S3Store("s3://no-such-bucket/x").check_access()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "read-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "read-secret")
    with pytest.raises(UsageError, match="cannot write there: access denied"):
        S3Store(store.address).check_access()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UsageError, match="cannot list there: access denied"):
        S3Store(store.address).check_access()
