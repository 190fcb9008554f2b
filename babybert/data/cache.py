"""Flat arrays of a table, made once and mapped into memory ever after.

The cache lies beside the data, in `.cache/<split>-<key>/`, the key made of the shards' digests: other data is another
cache. It is built in a folder of its own and renamed when it is whole, so several processes may build it at once. The
system reads in what is touched and shares it between processes; 9 bytes a token and 9 a pair on disk.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from babybert.data.table import Examples, concatenate
from babybert.progress import say

CACHE_FORMAT = 1
ARRAYS = {"ids": np.int32, "labels": np.int32, "segments": np.int8, "offsets": np.int64, "is_next": np.int8}
DESCRIPTION = "cache.json"


def open_cache(folder: Path, stamps: dict[str, Any] | None = None) -> Examples | None:
    """The examples cached in `folder`, mapped; None if there are none, they are not whole or, where `stamps` (sizes and
    times of the shards) are given, the shards have been touched since."""
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if description["format"] != CACHE_FORMAT or (stamps is not None and description["stamps"] != stamps):
            return None
        arrays = {}
        for name, kind in ARRAYS.items():
            path = folder / name
            if path.stat().st_size != description["bytes"][name]:
                return None
            arrays[name] = np.memmap(path, kind, "r")
        return Examples(**arrays)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def stamp_cache(folder: Path, stamps: dict[str, Any]) -> None:
    """Note that the shards with these stamps are the ones that the cache is of; where it cannot be noted, it is not."""
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        partial = folder / f"{DESCRIPTION}.{os.getpid()}"
        partial.write_text(json.dumps({**description, "stamps": stamps}), encoding="utf-8")
        partial.replace(folder / DESCRIPTION)
    except OSError:
        return


def build_cache(folder: Path, chunks: Callable[[], Iterator[Examples]], stamps: dict[str, Any]) -> Examples:
    """Write the chunks into `folder` and map them; caches of the split's earlier data are deleted.

    Where nothing can be written (a read-only volume, a full disk), the examples are held in memory instead.
    """
    partial = None
    try:
        folder.parent.mkdir(exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
        _write_arrays(partial, chunks(), stamps)
        for older in folder.parent.glob(folder.name.rpartition("-")[0] + "-*"):
            shutil.rmtree(older, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        if (found := open_cache(folder, stamps)) is not None:  # another process was faster
            return found
        say(f"{folder}: cannot be written ({error.strerror}): the data is held in memory, and read anew next time")
        return concatenate(chunks())
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    found = open_cache(folder)
    assert found is not None, folder
    return found


def _write_arrays(folder: Path, chunks: Iterator[Examples], stamps: dict[str, Any]) -> None:
    files = {name: (folder / name).open("wb") for name in ARRAYS}
    try:
        end = 0
        files["offsets"].write(np.zeros(1, np.int64).tobytes())
        for chunk in chunks:
            for name in ("ids", "labels", "segments", "is_next"):
                files[name].write(np.ascontiguousarray(getattr(chunk, name), ARRAYS[name]).data)
            files["offsets"].write((chunk.offsets[1:] + end).astype(np.int64).data)
            end += int(chunk.offsets[-1])
    finally:
        for file in files.values():
            file.close()
    sizes = {name: (folder / name).stat().st_size for name in ARRAYS}
    (folder / DESCRIPTION).write_text(
        json.dumps({"format": CACHE_FORMAT, "bytes": sizes, "stamps": stamps}), encoding="utf-8"
    )
