import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from babybert.errors import StorageError
from babybert.inference.archive import write_archive
from babybert.training.trainer import pretrain


@pytest.fixture
def checkpoint(small):
    return pretrain(small(max_steps=2)).checkpoint


def test_it_holds_what_a_server_needs_and_answers_without_the_package(checkpoint, tmp_path):
    archive = write_archive(checkpoint, tmp_path / "store")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["babybert.mar"]
    zipfile.ZipFile(archive).extractall(tmp_path / "unpacked")
    manifest = json.loads((tmp_path / "unpacked/MAR-INF/MANIFEST.json").read_text())
    assert manifest["model"]["handler"] == "babybert_handler.py"
    digest = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    version = f"2-{digest[:12]}"
    assert manifest["model"]["modelVersion"] == version
    assert json.loads((tmp_path / "unpacked/served.json").read_text()) == {"version": version, "step": 2, "digest": digest}
    assert not (tmp_path / "unpacked/babybert/training").exists()
    code = (
        "import sys; sys.path.insert(0, '.'); import babybert; from pathlib import Path; from babybert.inference.predictor import Predictor; "
        "assert Path(babybert.__file__).is_relative_to(Path.cwd()), babybert.__file__; print(Predictor.load(Path('.')).fill_mask(['a [MASK]'])[0]['masks'][0]['position'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "unpacked", capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


def test_an_older_archive_is_replaced_and_nobodys_folder_is_touched(checkpoint, tmp_path, monkeypatch):
    shared = tmp_path / "tmp"
    (shared / "babybert").mkdir(parents=True)
    (shared / "babybert" / "mine").write_text("keep")
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    first = write_archive(checkpoint, tmp_path / "store").stat().st_mtime_ns
    assert write_archive(checkpoint, tmp_path / "store").stat().st_mtime_ns > first
    assert (shared / "babybert" / "mine").read_text() == "keep"
    assert tempfile.gettempdir() == str(shared)


def test_a_store_that_cannot_be_is_one_line(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write_archive(checkpoint, Path(tmp_path / "file" / "store"))
