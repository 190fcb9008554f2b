"""The table's arrays, written once as binary files and mapped into memory from then on.

The cache is next to the data, in `.cache/<split>-<key>/`; the key is derived from the digests of the shards, so other
data has another cache. It is written to a temporary folder that is renamed when it is complete: several processes may
build it at once. The operating system loads the parts that are used and shares them between processes. On disk a cache
takes 9 bytes per token and 9 per pair.
"""

import contextlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from babybert.data.table import Examples, concatenate
from babybert.errors import os_reason
from babybert.folders import write_file

logger = logging.getLogger(__name__)

CACHE_FORMAT = 1
DTYPES = {"ids": np.int32, "labels": np.int32, "segments": np.int8, "offsets": np.int64, "is_next": np.int8}
DESCRIPTION = "cache.json"


def open_cache(folder: Path, stamps: dict[str, Any] | None = None) -> Examples | None:
    """Map the examples that are cached in `folder`.

    Args:
        folder: the folder of the cache.
        stamps: size and modification time of each shard; None does not compare them.

    Returns:
        the examples; None if there is no cache, if it is damaged, or if a shard has been modified since it was built.
    """
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if description["format"] != CACHE_FORMAT:
            return None
        if stamps is not None and description["stamps"] != stamps:
            return None
        arrays = {}
        for name, dtype in DTYPES.items():
            path = folder / name
            if path.stat().st_size != description["bytes"][name]:
                return None
            arrays[name] = np.memmap(path, dtype, "r")
        return Examples(**arrays)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def stamp_cache(folder: Path, stamps: dict[str, Any]) -> None:
    """Record new stamps of the shards, after they were verified. On a read-only volume, nothing happens."""
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        write_file(folder / DESCRIPTION, json.dumps({**description, "stamps": stamps}).encode())
    except (OSError, ValueError):  # ValueError: another process has just replaced the cache by a damaged one
        return


def build_cache(folder: Path, read_chunks: Callable[[], Iterator[Examples]], stamps: dict[str, Any]) -> Examples:
    """Write the chunks to `folder` and map them. Caches of earlier data of the split are deleted.

    `read_chunks` reads the shards; it is called once more if the cache cannot be written (a read-only volume, a full
    disk). Then the examples are held in memory.
    """
    partial = None
    try:
        folder.parent.mkdir(exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
        _write_arrays(partial, read_chunks(), stamps)
        # Mapped before it is renamed: another process may replace or delete the folder, but not what is mapped.
        examples = open_cache(partial, stamps)
        assert examples is not None, partial
        _move_into_place(partial, folder, stamps)
        return examples
    except OSError as error:
        logger.info(
            f"{folder}: cannot be written ({os_reason(error)}): the data is held in memory, "
            "and the next command reads the table again"
        )
        return concatenate(read_chunks())
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _move_into_place(partial: Path, folder: Path, stamps: dict[str, Any]) -> None:
    """Rename a finished cache, and delete those of earlier data. One that another process has finished first stays."""
    if open_cache(folder, stamps) is not None:
        return
    split = folder.name.rpartition("-")[0]
    for older_cache in folder.parent.glob(f"{split}-*"):
        shutil.rmtree(older_cache, ignore_errors=True)
    with contextlib.suppress(OSError):  # another process has finished since
        partial.rename(folder)


def _write_arrays(folder: Path, chunks: Iterator[Examples], stamps: dict[str, Any]) -> None:
    """Append each chunk to a file per array, then describe the files in `cache.json`."""
    files = {name: (folder / name).open("wb") for name in DTYPES}
    try:
        tokens = 0
        files["offsets"].write(np.zeros(1, np.int64).tobytes())
        for chunk in chunks:
            for name in ("ids", "labels", "segments", "is_next"):
                files[name].write(np.ascontiguousarray(getattr(chunk, name), DTYPES[name]).data)
            files["offsets"].write((chunk.offsets[1:] + tokens).astype(np.int64).data)
            tokens += int(chunk.offsets[-1])
    finally:
        for file in files.values():
            file.close()
    sizes = {name: (folder / name).stat().st_size for name in DTYPES}
    description = {"format": CACHE_FORMAT, "bytes": sizes, "stamps": stamps}
    (folder / DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")
