"""The folder in which datasets from S3 are kept on this machine, each in a folder of its own.

While a process uses a dataset, it holds a shared lock on `.in-use`. If a new dataset would make the folder too large,
datasets that nobody uses are deleted, those first that were not used for the longest time.
"""

import contextlib
import fcntl
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from babybert.errors import StorageError, UsageError

logger = logging.getLogger(__name__)

IN_USE = ".in-use"
BYTES_PER_GB = 10**9


@dataclass(frozen=True)
class CacheLimits:
    """Where datasets from S3 are kept.

    Attributes:
        folder: the folder; None for `babybert/datasets` in the user's folder for caches.
        gigabytes: how large it may become.
    """

    folder: Path | None
    gigabytes: int

    @property
    def place(self) -> Path:
        """The folder, as the XDG Base Directory Specification has it if none is given."""
        if self.folder is not None:
            return self.folder
        user_caches = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        return Path(user_caches) / "babybert" / "datasets"


def mark_used(folder: Path) -> IO[bytes]:
    """Say that this process uses a folder of the cache, until the file is closed or the process ends."""
    file = (folder / IN_USE).open("ab")
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_SH)
    os.utime(file.fileno())
    return file


def make_room(cache: CacheLimits, folder: Path, new_bytes: int, address: str) -> None:
    """Delete datasets that are not used until another `new_bytes` fit into the cache.

    Raises UsageError if the cache may not become so large, StorageError if the disk is too full.
    """
    limit = cache.gigabytes * BYTES_PER_GB
    place = cache.place
    sizes = {marker.parent: size_of(marker.parent) for marker in place.glob(f"*/{IN_USE}")}
    needed = sizes.get(folder, 0) + new_bytes
    if needed > limit:
        raise UsageError(
            f"{address}: needs {needed / BYTES_PER_GB:.1f} GB in the cache {place}, which may have {cache.gigabytes}; "
            "raise --cache-gb"
        )
    others = sorted((other for other in sizes if other != folder), key=last_use)
    for other in others:
        total = sum(sizes.values()) + new_bytes
        if total <= limit and new_bytes <= shutil.disk_usage(place).free:
            break
        if delete_unused(other):
            del sizes[other]
    if sum(sizes.values()) + new_bytes > limit:
        raise UsageError(
            f"{place}: has no room for {needed / BYTES_PER_GB:.1f} GB of {address}, because other processes use what "
            "is in it; raise --cache-gb"
        )
    free = shutil.disk_usage(place).free
    if new_bytes > free:
        raise StorageError(
            f"{address}: needs {new_bytes / BYTES_PER_GB:.1f} GB on the disk of {place}, which has "
            f"{free / BYTES_PER_GB:.1f}; make room, or choose another --cache"
        )


def size_of(folder: Path) -> int:
    """The bytes of all files below a folder, as far as they can be seen."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # deleted meanwhile
            total += path.stat().st_size
    return total


def last_use(folder: Path) -> float:
    """When a dataset of the cache was opened last; 0 if that is not known."""
    try:
        return (folder / IN_USE).stat().st_mtime
    except OSError:
        return 0.0


def delete_unused(folder: Path) -> bool:
    """Delete a dataset of the cache unless a process uses it. Returns whether it was deleted."""
    try:
        with (folder / IN_USE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            logger.info(f"{folder}: deleted from the cache, to make room")
            shutil.rmtree(folder)
    except OSError:
        return False
    return True
