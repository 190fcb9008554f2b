"""Archives: what is in them, that they are reproducible, and that corrupt ones are refused."""

import hashlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import babybert
from babybert.errors import DataError, UsageError
from babybert.serving.archive import check_archive, package_files, write_archive
from babybert.training.train import pretrain

Change = Callable[[dict[str, bytes]], Any]


@pytest.fixture
def checkpoint(small: Any) -> Path:
    result = pretrain(small(max_steps=2))
    assert result is not None
    return result.checkpoint


@pytest.mark.slow
def test_it_holds_what_a_server_needs_and_works_without_the_package(checkpoint: Path, tmp_path: Path) -> None:
    archive = write_archive(checkpoint, tmp_path / "store")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["babybert.mar"]
    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(archive).extractall(unpacked)
    manifest = json.loads((unpacked / "MAR-INF/MANIFEST.json").read_text())
    assert manifest["model"]["handler"] == "babybert_handler.py"
    digest = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    expected = {"version": f"2-{digest[:12]}", "step": 2, "digest": digest}
    assert manifest["model"]["modelVersion"] == expected["version"]
    served = json.loads((unpacked / "served.json").read_text())
    assert check_archive(archive) == expected
    assert {key: served[key] for key in expected} == expected
    code = """
import sys
from pathlib import Path
sys.path.insert(0, ".")
import babybert
from babybert.serving.predictor import Predictor
assert Path(babybert.__file__).is_relative_to(Path.cwd()), babybert.__file__
print(Predictor.load(Path(".")).fill_mask(["a [MASK]"])[0]["masks"][0]["position"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=unpacked, capture_output=True, text=True, timeout=120, env={}
    )
    assert done.stdout == "1\n", done.stderr


def test_it_holds_the_python_files_of_the_package_and_no_others(checkpoint: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(write_archive(checkpoint, tmp_path)) as archive:
        names = {name for name in archive.namelist() if name.startswith("babybert/")}
    assert names == {f"babybert/{path.as_posix()}" for path in package_files()}
    assert {"babybert/__init__.py", "babybert/serving/predictor.py", "babybert/model/bert.py"} <= names
    assert all(name.endswith(".py") and "__pycache__" not in name for name in names)
    package = Path(babybert.__file__).parent
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=package,
        capture_output=True,
        text=True,
        timeout=60,
    )
    existing = {name for name in tracked.stdout.splitlines() if (package / name).exists()}
    if existing:  # the package is in a checkout, not installed
        assert {path.as_posix() for path in package_files()} == existing


@pytest.mark.slow
def test_the_same_checkpoint_gives_the_same_bytes_at_any_time_and_place(checkpoint: Path, tmp_path: Path) -> None:
    first = write_archive(checkpoint, tmp_path / "one").read_bytes()
    shutil.copytree(checkpoint, tmp_path / "elsewhere")
    time.sleep(2)  # zip stores times with a resolution of two seconds
    assert write_archive(tmp_path / "elsewhere", tmp_path / " Ü, [a]* #100%").read_bytes() == first


def test_a_checkpoint_that_differs_from_its_manifest_is_refused_and_the_former_archive_stays(
    checkpoint: Path, tmp_path: Path
) -> None:
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


def rewrite(archive: Path, target: Path, change: Change) -> Path:
    """Copy an archive to `target` after `change` was applied to its files, a dict by name."""
    with zipfile.ZipFile(archive) as source:
        contents = {name: source.read(name) for name in source.namelist()}
    change(contents)
    with zipfile.ZipFile(target, "w") as changed:
        for name, content in contents.items():
            changed.writestr(name, content)
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files.pop("served.json"), "not written by `babybert archive`"),
        (lambda files: files.update({"served.json": b"{}"}), "corrupt, or not an archive"),
        (lambda files: files.update({"more.py": b""}), "its files are not those that served.json lists"),
        (lambda files: files.pop("tokenizer.json"), "its files are not those that served.json lists"),
        (
            lambda files: files.update({"model.json": files["model.json"] + b" "}),
            "model.json differs from its digest in served.json",
        ),
    ],
)
def test_a_corrupt_or_foreign_archive_is_refused(
    checkpoint: Path, tmp_path: Path, change: Change, message: str
) -> None:
    archive = write_archive(checkpoint, tmp_path)
    assert check_archive(archive)["step"] == 2
    with pytest.raises(DataError, match=message):
        check_archive(rewrite(archive, tmp_path / "other.mar", change))


def test_a_truncated_archive_or_one_with_a_flipped_bit_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    archive = write_archive(checkpoint, tmp_path)
    content = archive.read_bytes()
    other = tmp_path / "other.mar"
    for place in range(0, len(content), len(content) // 50):
        other.write_bytes(content[:place])
        with pytest.raises(DataError):
            check_archive(other)
        other.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        try:
            # The bit may be one that has no meaning for us, in a date or a flag.
            assert check_archive(other) == check_archive(archive)
        except DataError as error:
            assert "other.mar" in str(error)


@pytest.mark.slow
def test_a_full_disk_leaves_the_former_archive(checkpoint: Path, tmp_path: Path) -> None:
    archive = write_archive(checkpoint, tmp_path / "store")
    before = archive.read_bytes()
    command = [sys.executable, "-m", "babybert.cli", "archive", str(checkpoint), f"--out={tmp_path / 'store'}"]
    full = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1].startswith("babybert archive: error:")
    assert "Traceback" not in full.stderr
    assert archive.read_bytes() == before
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["babybert.mar"]


def test_an_existing_archive_is_replaced_and_the_shared_temporary_folder_is_not_touched(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "tmp"
    (shared / "babybert").mkdir(parents=True)
    (shared / "babybert" / "mine").write_text("keep")
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    first = write_archive(checkpoint, tmp_path / "store").stat().st_mtime_ns
    assert write_archive(checkpoint, tmp_path / "store").stat().st_mtime_ns > first
    assert (shared / "babybert" / "mine").read_text() == "keep"
    assert tempfile.gettempdir() == str(shared)


def test_a_store_that_cannot_be_created_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        write_archive(checkpoint, tmp_path / "file" / "store")
