import pytest

from babybert.checkpoint.source import CheckpointSource
from babybert.checkpoint.storage import S3Store
from babybert.errors import DataError, UsageError
from babybert.training.train import pretrain


@pytest.fixture
def run(small):
    """Checkpoints of the steps 4, 8 and 12, the last one damaged."""
    for step in (4, 8, 12):
        pretrain(small(max_steps=step, keep_checkpoints=9))
    out = small().out
    (out / "step-00000012" / "model.json").write_text("{}")
    return out


@pytest.mark.slow
def test_a_run_is_its_newest_whole_checkpoint_and_what_is_passed_over_is_said_once(run, tmp_path, capsys):
    source = CheckpointSource(str(run))
    assert source.find(tmp_path).name == "step-00000008"
    assert CheckpointSource(str(run / "step-00000004")).find(tmp_path).name == "step-00000004"
    capsys.readouterr()
    assert source.newer(4, tmp_path).name == "step-00000008"
    assert source.newer(8, tmp_path) is None
    assert source.newer(8, tmp_path) is None
    assert capsys.readouterr().err.count("passing over") == 1
    with pytest.raises(DataError, match="no whole checkpoint"):
        CheckpointSource(str(tmp_path / "nothing")).find(tmp_path)


@pytest.mark.slow
def test_the_same_in_s3(run, s3, tmp_path, capsys):
    address = f"s3://{s3.bucket}/runs/one"
    with pytest.raises(DataError, match="no whole checkpoint there"):
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
    assert capsys.readouterr().err.count("passing over") == 1
    with pytest.raises(UsageError, match="not an S3 address"):
        CheckpointSource("s3:///no-bucket").find(tmp_path)
