import hashlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest

from babybert.errors import DataError, StorageError
from babybert.serving.archive import check_archive, write_archive
from babybert.training.train import pretrain


@pytest.fixture
def checkpoint(small):
    return pretrain(small(max_steps=2)).checkpoint


@pytest.mark.slow
def test_it_holds_what_a_server_needs_and_answers_without_the_package(checkpoint, tmp_path):
    archive = write_archive(checkpoint, tmp_path / "store")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["babybert.mar"]
    zipfile.ZipFile(archive).extractall(tmp_path / "unpacked")
    manifest = json.loads((tmp_path / "unpacked/MAR-INF/MANIFEST.json").read_text())
    assert manifest["model"]["handler"] == "babybert_handler.py"
    digest = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    version = f"2-{digest[:12]}"
    assert manifest["model"]["modelVersion"] == version
    served = json.loads((tmp_path / "unpacked/served.json").read_text())
    assert (
        check_archive(archive)
        == {"version": version, "step": 2, "digest": digest}
        == {key: served[key] for key in ("version", "step", "digest")}
    )
    assert not (tmp_path / "unpacked/babybert/training").exists()
    code = (
        "import sys; sys.path.insert(0, '.'); import babybert; from pathlib import Path; from babybert.serving.predictor import Predictor; "
        "assert Path(babybert.__file__).is_relative_to(Path.cwd()), babybert.__file__; print(Predictor.load(Path('.')).fill_mask(['a [MASK]'])[0]['masks'][0]['position'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "unpacked", capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


@pytest.mark.slow
def test_the_same_checkpoint_gives_the_same_bytes_whenever_and_wherever_it_lies(checkpoint, tmp_path):
    first = write_archive(checkpoint, tmp_path / "one").read_bytes()
    shutil.copytree(checkpoint, tmp_path / "elsewhere")
    time.sleep(2)  # a zip file's times are to two seconds
    assert write_archive(tmp_path / "elsewhere", tmp_path / "two").read_bytes() == first


def test_a_checkpoint_that_is_not_what_its_manifest_says_is_refused_and_the_older_archive_stays(checkpoint, tmp_path):
    archive = write_archive(checkpoint, tmp_path / "store")
    before = archive.read_bytes()
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"model\.safetensors: differs from the checkpoint's manifest"):
        write_archive(checkpoint, tmp_path / "store")
    (checkpoint / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"manifest\.json: not the manifest"):
        write_archive(checkpoint, tmp_path / "store")
    assert archive.read_bytes() == before


def rewritten(archive, target, change):
    """The archive with `change` done to its files by name."""
    with zipfile.ZipFile(archive) as given:
        contents = {name: given.read(name) for name in given.namelist()}
    change(contents)
    with zipfile.ZipFile(target, "w") as written:
        for name, content in contents.items():
            written.writestr(name, content)
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files.pop("served.json"), "not an archive of ours"),
        (lambda files: files.update({"served.json": b"{}"}), "damaged, or no archive"),
        (lambda files: files.update({"more.py": b""}), "holds other files"),
        (lambda files: files.pop("tokenizer.json"), "holds other files"),
        (
            lambda files: files.update({"model.json": files["model.json"] + b" "}),
            "model.json is not the one that was packed",
        ),
    ],
)
def test_an_archive_that_is_not_whole_or_not_ours_is_refused(checkpoint, tmp_path, change, message):
    archive = write_archive(checkpoint, tmp_path)
    assert check_archive(archive)["step"] == 2
    with pytest.raises(DataError, match=message):
        check_archive(rewritten(archive, tmp_path / "other.mar", change))


def test_an_archive_that_ends_early_or_has_a_wrong_bit_is_refused(checkpoint, tmp_path):
    content, other = write_archive(checkpoint, tmp_path).read_bytes(), tmp_path / "other.mar"
    for place in range(0, len(content), len(content) // 50):
        other.write_bytes(content[:place])
        with pytest.raises(DataError):
            check_archive(other)
        other.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        try:
            assert check_archive(other) == check_archive(
                tmp_path / "babybert.mar"
            )  # where nobody looks: a date, a flag
        except DataError as error:
            assert "other.mar" in str(error)


@pytest.mark.slow
def test_a_full_disk_leaves_the_older_archive(checkpoint, tmp_path):
    archive = write_archive(checkpoint, tmp_path / "store")
    before = archive.read_bytes()
    command = [sys.executable, "-m", "babybert.cli", "archive", str(checkpoint), f"--out={tmp_path / 'store'}"]
    full = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1].startswith("babybert archive: error:") and "Traceback" not in full.stderr
    assert archive.read_bytes() == before
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["babybert.mar"]


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
