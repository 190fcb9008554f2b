"""Checkpoints in a real S3 server: complete or absent, pruned, and refused with a clear message."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import S3
from faulty_proxy import Refusal, S3Proxy, S3Request, access_denied, allow, deny

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
    for key in (store.key("step-00000003", "0" * 32, "model.safetensors"), "elsewhere", store.key("step-check")):
        upload = s3.client.create_multipart_upload(Bucket=s3.bucket, Key=key)
        s3.client.upload_part(
            Bucket=s3.bucket, Key=key, UploadId=upload["UploadId"], PartNumber=1, Body=b"x" * 6_000_000
        )
    store.upload(save(4))
    store.abort_uploads()
    left = {upload["Key"] for upload in s3.client.list_multipart_uploads(Bucket=s3.bucket)["Uploads"]}
    assert left == {"elsewhere", store.key("step-check")}


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


RIGHTS = ("s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload")


def test_the_check_needs_these_rights_and_no_others(store: S3Store, s3: S3, s3_proxy: S3Proxy) -> None:
    s3_proxy.rule = allow(*RIGHTS)
    store.check_access()
    assert {request.right for request in s3_proxy.requests} == set(RIGHTS)
    assert keys(s3) == []
    assert "Uploads" not in s3.client.list_multipart_uploads(Bucket=s3.bucket)


@pytest.mark.parametrize("right", RIGHTS)
def test_the_check_names_a_missing_right(store: S3Store, s3: S3, s3_proxy: S3Proxy, right: str) -> None:
    s3_proxy.rule = deny(right)
    with pytest.raises(UsageError, match=f"{store.address}: cannot .* there: access denied .* need the right {right}"):
        store.check_access()
    assert keys(s3) == [] or right == "s3:DeleteObject"


def test_the_check_notices_a_right_to_list_that_is_limited_to_a_prefix(store: S3Store, s3_proxy: S3Proxy) -> None:
    """Amazon's S3 then answers 403 for a missing object."""

    s3_proxy.rule = lambda request: access_denied(request) if request.path.endswith("-missing") else None
    with pytest.raises(UsageError, match=r"cannot look for a missing object there: .* need the right s3:ListBucket"):
        store.check_access()


@pytest.mark.parametrize("part", ["uploads", "partNumber", "uploadId"])
def test_the_check_notices_a_server_without_multipart_uploads(store: S3Store, s3_proxy: S3Proxy, part: str) -> None:
    s3_proxy.rule = lambda request: Refusal(501, "NotImplemented") if part in request.query else None
    with pytest.raises(UsageError, match="cannot upload in parts there: the S3 server does not support this request"):
        store.check_access()


@pytest.mark.parametrize("condition", ["If-None-Match", "If-Match"])
@pytest.mark.parametrize(
    ("refusal", "says"),
    [
        (
            Refusal(501, "NotImplemented", "A header you provided implies functionality"),
            "does not support this request",
        ),
        (Refusal(200), "ignores conditions of a write"),  # it answers as if it had written the object
    ],
)
def test_the_check_notices_a_server_without_conditional_writes(
    store: S3Store, s3: S3, s3_proxy: S3Proxy, condition: str, refusal: Refusal, says: str
) -> None:
    s3_proxy.rule = lambda request: refusal if condition in request.conditions else None
    with pytest.raises(UsageError, match=says):
        store.check_access()
    assert keys(s3) == []


def test_what_may_not_be_deleted_stays_complete_and_the_rest_is_deleted(
    store: S3Store, save: Save, s3_proxy: S3Proxy, tmp_path: Path
) -> None:
    """A policy protects the manifest of step 1 and a file of step 2."""
    for step in (1, 2, 3, 4):
        store.upload(save(step))
    protected = ("step-00000001/manifest.json", "state.json")

    def protect(request: S3Request) -> Refusal | None:
        is_protected = request.path.endswith(protected) and "step-00000003" not in request.path
        return access_denied(request) if request.method == "DELETE" and is_protected else None

    s3_proxy.rule = protect
    with pytest.raises(UsageError, match=r"2 objects stay, the first: .*step-00000001/manifest.json: access denied"):
        store.prune(1)
    assert store.steps() == [4, 1]
    assert checkpoint_problem(store.download(1, tmp_path)) is None
    assert checkpoint_problem(store.download(4, tmp_path)) is None


def test_an_archived_checkpoint_is_neither_skipped_nor_deleted(store: S3Store, save: Save, s3_proxy: S3Proxy) -> None:
    """To skip it would start the run from scratch, and then delete it."""
    store.upload(save(1))
    s3_proxy.rule = lambda request: Refusal(403, "InvalidObjectState") if "/step-00000001/" in request.path else None
    for action in (lambda: store.download(1, save(1).parent), lambda: store.prune(1)):
        with pytest.raises(UsageError, match="in an archive class"):
            action()
    assert [request.method for request in s3_proxy.requests if request.method == "DELETE"] == []


def test_a_bucket_with_versions(store: S3Store, save: Save, s3: S3, tmp_path: Path) -> None:
    s3.client.put_bucket_versioning(Bucket=s3.bucket, VersioningConfiguration={"Status": "Enabled"})
    store.check_access()
    for step in (1, 2, 3):
        store.upload(save(step))
    store.prune(1)
    assert store.steps() == [3]
    assert checkpoint_problem(store.download(3, tmp_path)) is None
    assert {key.split("/")[2] for key in keys(s3)} == {"step-00000003"}
