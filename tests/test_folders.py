"""Folders that commands write to: locked for one process, checked before the work, and files that appear complete."""

import errno
import fcntl
import os
import tempfile
import threading
from pathlib import Path
from typing import Any, NoReturn

import pytest

from babybert.errors import StorageError, UsageError, UserError, cannot_write, os_reason
from babybert.folders import LOCK, lock_folder, make_folder, make_temporary_folder, temporary_folder, write_file


def test_a_locked_folder_is_refused_until_it_is_free(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "data"
    with lock_folder(folder, "--out"):
        with (
            pytest.raises(UserError, match=r"data: another process writes there; .*choose another --out") as error,
            lock_folder(folder, "--out"),
        ):
            pass
        assert error.value.exit_code == 1  # a later try may succeed
        (folder / "result").touch()
    with lock_folder(folder, "--out"):
        assert (folder / LOCK).exists()
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_a_new_folder_that_stays_empty_is_deleted(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lock_folder(tmp_path / "new", "--out"):
        raise KeyError
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with lock_folder(tmp_path / "old", "--out"):
        pass
    assert list((tmp_path / "old").iterdir()) == []


def test_who_waits_gets_the_lock_even_if_the_folder_is_deleted_meanwhile(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "new"
    entered = []

    def wait() -> None:
        with lock_folder(folder, "--out", wait=True), pytest.raises(UserError), lock_folder(folder, "--out"):
            pass
        entered.append(True)

    thread = threading.Thread(target=wait)
    with lock_folder(folder, "--out"):
        thread.start()
        while "waiting until it has ended" not in caplog.text:
            assert thread.is_alive()
    thread.join(60)
    assert entered == [True]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_file_locks_there_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """A network file system without locks, which the test machine does not have."""

    def refuse(*arguments: Any) -> NoReturn:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock_folder(tmp_path, "--out"):
        pass
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"{tmp_path}: file locks are not supported there ({os.strerror(code)})" in record.message


@pytest.mark.parametrize("name", ["file", "file/below", "/proc/babybert", "x" * 300])
def test_a_place_that_cannot_be_a_folder_is_a_usage_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot be written: .+; choose another --here"):
        make_folder(tmp_path / name, "--here")
    with pytest.raises(UsageError, match="choose another --here"), lock_folder(tmp_path / name, "--here"):
        pass


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_a_storage_error(code: int) -> None:
    assert isinstance(cannot_write("x", OSError(code, os.strerror(code))), StorageError)


def test_every_reason_is_a_text() -> None:
    """Libraries make OSErrors without the system's text."""
    assert os_reason(OSError(errno.ENOSPC, "No space left on device")) == "No space left on device"
    assert os_reason(OSError("no\nroom")) == "no room"
    assert os_reason(OSError()) == "OSError"


def test_without_a_place_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_folder("test") as folder:
        (folder / "file").touch()
        assert folder.parent == tmp_path
    assert not folder.exists()
    monkeypatch.setattr(tempfile, "tempdir", "/proc/none")
    with pytest.raises(UsageError, match=r"no temporary folder can be made: .*; set TMPDIR"):
        make_temporary_folder("test")


def test_a_file_is_replaced_at_once(tmp_path: Path) -> None:
    write_file(tmp_path / "a", b"old")
    write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_file(tmp_path / "folder", b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "folder"]
