"""Folders that commands write to: made, locked for one process at a time, and files that appear complete.

Every command uses these functions, so that one rule holds for all: a place that cannot be written is a UsageError, a
full disk a StorageError.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from babybert.errors import UserError, cannot_write, os_reason

logger = logging.getLogger(__name__)

LOCK = ".lock"
HELD_BY_ANOTHER = (errno.EAGAIN, errno.EACCES)  # what flock reports for a lock that another process holds
ATTEMPTS = 100  # to lock a folder while other processes delete it and make it anew


def make_folder(folder: Path, flag: str) -> None:
    """Make `folder`, unless it exists, and try whether files can be written there.

    Raises UsageError that names `flag`, the setting to change, or StorageError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _cannot_write_to(folder, flag, error) from error


@contextlib.contextmanager
def lock_folder(folder: Path, flag: str, wait: bool = False) -> Iterator[None]:
    """Keep other processes from writing into `folder`. It is made if necessary, and deleted again if it stays empty.

    The lock is one on the file `.lock` in the folder. It ends with the process, whatever happens to it. Some network
    file systems have no locks. There a warning is logged and the work goes on: a file that marks the folder as taken
    would outlive a killed process and keep out its restart.

    Args:
        folder: the folder.
        flag: the setting that names it, for messages.
        wait: if another process holds the lock, wait until it ends.

    Raises UserError if another process holds the lock, UsageError or StorageError if the folder cannot be written.
    """
    is_new = not os.path.lexists(folder)
    with _open_locked(folder, flag, wait):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()
                if is_new:
                    folder.rmdir()  # fails if it has files by now


def _open_locked(folder: Path, flag: str, wait: bool) -> IO[bytes]:
    """Open and lock the file. If its owner deleted it meanwhile, another process may lock a new one: start again."""
    path = folder / LOCK
    for _ in range(ATTEMPTS):
        make_folder(folder, flag)
        try:
            file = path.open("ab")
        except OSError as error:
            raise _cannot_write_to(folder, flag, error) from error
        try:
            _lock(file, folder, flag, wait)
            if _is_open_file(path, file):
                return file
        except BaseException:
            file.close()
            raise
        file.close()
    raise UserError(f"{folder}: cannot be locked, because other processes come and go there; choose another {flag}")


def _lock(file: IO[bytes], folder: Path, flag: str, wait: bool) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in HELD_BY_ANOTHER:
            logger.warning(
                f"{folder}: file locks are not supported there ({os_reason(error)}); "
                "make sure that no other process writes into this folder"
            )
        elif wait:
            logger.info(f"{folder}: another process writes there; waiting until it has ended")
            fcntl.flock(file, fcntl.LOCK_EX)
        else:
            raise UserError(
                f"{folder}: another process writes there; wait until it has ended, stop it, or choose another {flag}"
            ) from error


def _is_open_file(path: Path, file: IO[bytes]) -> bool:
    """Whether `path` is the file that is open."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _cannot_write_to(folder: Path, flag: str, error: OSError) -> UserError:
    return cannot_write(f"{folder}: cannot be written: {os_reason(error)}; choose another {flag}", error)


def make_temporary_folder(purpose: str) -> Path:
    """A new folder below the system's folder for temporary files, for the caller to delete.

    Raises UsageError where there is no place for temporary files, StorageError if the disk is full.
    """
    try:
        return Path(tempfile.mkdtemp(prefix=f"babybert-{purpose}-"))
    except OSError as error:
        raise cannot_write(
            f"no temporary folder can be made: {os_reason(error)}; set TMPDIR to a folder that can be written", error
        ) from error


@contextlib.contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """`make_temporary_folder`, deleted at the end."""
    folder = make_temporary_folder(purpose)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def work_folder(purpose: str, name: str) -> Iterator[Path]:
    """An empty folder for temporary files, deleted at the end.

    What a killed process has left there is deleted by the next one that works on the same thing, called `name`.

    Raises UsageError where there is no place for temporary files, StorageError if the disk is full, UserError if
    another process works on the same thing.
    """
    digest = hashlib.sha256(f"{os.getuid()} {name}".encode()).hexdigest()[:16]
    try:
        parent = Path(tempfile.gettempdir()) / f"babybert-{purpose}-{digest}"
    except OSError as error:
        raise cannot_write(f"no temporary folder can be made: {os_reason(error)}; set TMPDIR", error) from error
    with lock_folder(parent, "TMPDIR"):
        folder = parent / "work"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        parent.rmdir()  # it exists still if a killed process had made it


def write_file(path: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all, also if two processes write it. Raises OSError."""
    partial = path.with_name(f".partial-{uuid.uuid4().hex}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
