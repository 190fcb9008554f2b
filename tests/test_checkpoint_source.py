"""Checkpoints at an address: the newest valid one of a folder or of a prefix in S3."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import S3

from babybert.checkpoint.format import MANIFEST
from babybert.checkpoint.source import CheckpointSource
from babybert.checkpoint.storage import S3Store, split_step
from babybert.config import PretrainConfig
from babybert.errors import DataError, NoCheckpoint, UsageError
from babybert.training.train import pretrain


@pytest.fixture
def run(small: Callable[..., PretrainConfig]) -> Path:
    """Checkpoints of steps 4, 8 and 12; the last one is damaged."""
    for step in (4, 8, 12):
        pretrain(small(max_steps=step, keep_checkpoints=9))
    out = small().out
    (out / "step-00000012" / "model.json").write_text("{}")
    return out


def test_a_run_stands_for_its_newest_valid_checkpoint(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "empty").mkdir()
    source = CheckpointSource(str(run))
    assert source.find(tmp_path).name == "step-00000008"
    assert CheckpointSource(str(run / "step-00000004")).find(tmp_path).name == "step-00000004"
    newer = source.newer(4, tmp_path)
    assert newer is not None and newer.name == "step-00000008"
    assert source.newer(8, tmp_path) is None
    assert source.newer(8, tmp_path) is None
    assert caplog.text.count("skipping") == 1
    with pytest.raises(NoCheckpoint, match="no valid checkpoint there"):
        CheckpointSource(str(tmp_path / "empty")).find(tmp_path)
    for missing in ("nothing", "step-00000001"):  # a run that does not exist is not one that has just begun
        with pytest.raises(DataError, match="no") as caught:
            CheckpointSource(str(tmp_path / missing)).find(tmp_path)
        assert not isinstance(caught.value, NoCheckpoint)


@pytest.mark.slow
def test_a_prefix_in_s3_stands_for_its_newest_valid_checkpoint(
    run: Path, s3: S3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = f"s3://{s3.bucket}/runs/one"
    with pytest.raises(NoCheckpoint, match="no valid checkpoint there"):
        CheckpointSource(address).find(tmp_path)
    for step in ("04", "08", "12"):
        S3Store(address).upload(run / f"step-000000{step}")
    source = CheckpointSource(address + "/")
    found = source.find(tmp_path / "fetched")
    assert (found.name, found.parent) == ("step-00000008", tmp_path / "fetched")
    assert (found / "model.safetensors").read_bytes() == (run / "step-00000008" / "model.safetensors").read_bytes()
    assert CheckpointSource(f"{address}/step-00000004").find(tmp_path / "other").name == "step-00000004"
    with pytest.raises(DataError, match=r"step-00000012: model\.json differs"):
        CheckpointSource(f"{address}/step-00000012").find(tmp_path / "other")
    assert source.newer(8, tmp_path / "fetched") is None
    assert caplog.text.count("skipping") == 1
    with pytest.raises(UsageError, match="not an S3 address"):
        CheckpointSource("s3:///no-bucket").find(tmp_path)


@pytest.mark.parametrize("content", [b"{garbage", b"[]", b'{"step": 12}', b""])
@pytest.mark.slow
def test_a_corrupt_newest_manifest_in_s3_is_skipped(
    run: Path, s3: S3, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    """It has no attempt id to remember it by. `serve --watch` looks again and again."""
    address = f"s3://{s3.bucket}/runs/one"
    store = S3Store(address)
    store.upload(run / "step-00000008")
    s3.client.put_object(Bucket=s3.bucket, Key=store.key("step-00000012", MANIFEST), Body=content)
    source = CheckpointSource(address)
    for _ in range(2):
        newer = source.newer(4, tmp_path / "fetched")
        assert newer is not None and newer.name == "step-00000008"
        assert source.newer(8, tmp_path / "fetched") is None
    assert caplog.text.count("skipping") == 1


def test_a_manifest_with_paths_in_it_is_refused(run: Path, s3: S3, tmp_path: Path) -> None:
    store = S3Store(f"s3://{s3.bucket}/runs/one")
    store.upload(run / "step-00000008")
    content = json.loads(store.manifest(8).to_json())
    del content["sha256"]
    content["files"]["../outside"] = {"bytes": 1, "sha256": ""}
    body = json.dumps(content).encode()
    s3.client.put_object(Bucket=s3.bucket, Key=store.key("step-00000008", MANIFEST), Body=body)
    with pytest.raises(DataError, match="not a valid manifest"):
        store.download(8, tmp_path)


def test_an_address_may_name_a_step() -> None:
    assert split_step("s3://bucket/runs/one/step-00000004") == ("s3://bucket/runs/one", 4)
    assert split_step("s3://bucket/runs/one/step-00000004/") == ("s3://bucket/runs/one", 4)
    assert split_step("s3://bucket/runs/one") == ("s3://bucket/runs/one", None)
    assert split_step("s3://bucket/step-4") == ("s3://bucket/step-4", None)
