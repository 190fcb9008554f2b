"""Run the block functions on this machine: in this process, or in several.

Data is in files of one folder, each job's in one file.
"""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from babybert.data.engine import Arrays, Engine, Function


class StoredData(NamedTuple):
    """A handle: where the arrays are that were stored one after the other.

    Attributes:
        path: the file.
        offset: where in it the first array is.
        arrays: how many arrays there are.
    """

    path: Path
    offset: int
    arrays: int


def store(path: Path, pieces: list[Arrays]) -> list[StoredData]:
    """Write pieces of data to a new file and return their handles. Raises OSError."""
    handles = []
    with path.open("wb") as file:
        for arrays in pieces:
            handles.append(StoredData(path, file.tell(), len(arrays)))
            for array in arrays:
                np.save(file, array, allow_pickle=False)
    return handles


def load(handle: StoredData) -> list[np.ndarray]:
    """Read data back. Raises OSError."""
    with handle.path.open("rb") as file:
        file.seek(handle.offset)
        return [np.load(file, allow_pickle=False) for _ in range(handle.arrays)]


def run_job(function: Function, arguments: tuple[Any, ...], path: Path) -> tuple[Any, list[StoredData]]:
    """Run a job with its data in files: what handles stand for is read, and what it returns is written to `path`."""
    loaded = [load(argument) if isinstance(argument, StoredData) else argument for argument in arguments]
    summary, pieces = function(*loaded)
    return summary, store(path, list(pieces)) if pieces else []


class InProcessEngine(Engine):
    """Runs each job where it is asked for: no other process is started."""

    window = 1

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()

    def __enter__(self) -> "InProcessEngine":
        self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *exception: object) -> None:
        for path in self._folder.glob("data-*"):
            path.unlink(missing_ok=True)

    def put(self, arrays: Arrays) -> StoredData:
        """Write the data to a file; see `Engine.put`."""
        return store(self._new_path(), [arrays])[0]

    def get(self, handle: Any) -> Arrays:
        """Read the data; see `Engine.get`."""
        return load(handle)

    def drop(self, handle: Any) -> None:
        """Delete the file, with all other data that is in it; see `Engine.drop`."""
        handle.path.unlink(missing_ok=True)

    def _new_path(self) -> Path:
        return self._folder / f"data-{next(self._numbers):06d}"

    def _start(self, function: Function, arguments: tuple[Any, ...], pieces: int) -> Any:
        return _Call(*run_job(function, arguments, self._new_path()))

    def _wait(self, jobs: list[Any]) -> Any:
        return jobs[0]

    def _result(self, job: Any) -> tuple[Any, list[Any]]:
        return job.summary, job.handles

    def _cancel(self, job: Any) -> None:
        pass


class _Call:
    """A job that has been done."""

    def __init__(self, summary: Any, handles: list[StoredData]) -> None:
        self.summary = summary
        self.handles = handles
