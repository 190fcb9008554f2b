"""Run jobs on this machine: in this process, or in several.

Data is in files of one folder, each job's in one file.
"""

import concurrent.futures
import contextlib
import itertools
import math
import multiprocessing
import multiprocessing.forkserver
import os
import sys
import types
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from babybert.data.engine import ATTEMPTS, JOBS_PER_WORKER, Arrays, Engine, Function, WorkerDied
from babybert.data.worker_process import JOB_MODULES, prepare_worker

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container


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
                _save(file, array)
    return handles


def _save(file: IO[bytes], array: np.ndarray) -> None:
    """Append an array in the format of `np.save`, whose own error about a full disk does not say that it is full."""
    array = np.ascontiguousarray(array)
    header = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(file, header)
    file.write(array.data.cast("B") if array.size else b"")


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


@dataclass(eq=False)
class _FinishedJob:
    """What a job gave that ran in this process."""

    summary: Any
    handles: list[StoredData]


class InProcessEngine(Engine):
    """Runs each job where it is asked for: no other process is started."""

    window = 1

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self._undropped: dict[Path, int] = {}  # how many handles of each file may still be used

    def __enter__(self) -> "InProcessEngine":
        self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *exception: object) -> None:
        for path in self._folder.glob("data-*"):
            path.unlink(missing_ok=True)

    def put(self, arrays: Arrays) -> StoredData:
        """Write the data to a file; see `Engine.put`."""
        (handle,) = self._register(store(self._new_path(), [arrays]))
        return handle

    def get(self, handle: Any) -> Arrays:
        """Read the data; see `Engine.get`."""
        return load(handle)

    def drop(self, handle: Any) -> None:
        """Delete the file if all data in it was dropped; see `Engine.drop`."""
        self._undropped[handle.path] -= 1
        if not self._undropped[handle.path]:
            del self._undropped[handle.path]
            handle.path.unlink()

    def _register(self, handles: list[StoredData]) -> list[StoredData]:
        """Remember how many handles the file of a job has."""
        if handles:
            self._undropped[handles[0].path] = len(handles)
        return handles

    def _new_path(self) -> Path:
        return self._folder / f"data-{next(self._numbers):06d}"

    def _start(self, function: Function, arguments: tuple[Any, ...], pieces: int) -> Any:
        return _FinishedJob(*run_job(function, arguments, self._new_path()))

    def _wait(self, jobs: list[Any]) -> Any:
        return jobs[0]

    def _result(self, job: Any) -> tuple[Any, list[Any]]:
        return job.summary, self._register(job.handles)

    def _cancel(self, job: Any) -> None:
        pass


@dataclass
class _Worker:
    """A process, and the jobs that it has been given, in their order. The first one that has not finished runs."""

    pool: ProcessPoolExecutor
    jobs: list["_LocalJob"] = field(default_factory=list)


@dataclass(eq=False)
class _LocalJob:
    """A job in a worker process."""

    function: Function
    arguments: tuple[Any, ...]
    path: Path
    worker: _Worker
    deaths: int = 0
    future: Future[Any] = field(default_factory=Future)


class LocalEngine(InProcessEngine):
    """Runs jobs in several processes. If one dies, a new one runs its jobs again; other processes go on."""

    def __init__(self, folder: Path, workers: int) -> None:
        super().__init__(folder)
        self.window = JOBS_PER_WORKER * workers
        # Not forked from this process: it has threads, whose locks a child would inherit as they are.
        self._context = multiprocessing.get_context("forkserver")
        self._workers = [_Worker(self._new_pool()) for _ in range(workers)]

    def __enter__(self) -> "LocalEngine":
        super().__enter__()
        # The server imports the modules of the jobs once, while this process reads the first batch.
        multiprocessing.forkserver.set_forkserver_preload(JOB_MODULES)
        multiprocessing.forkserver.ensure_running()
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers:
            worker.pool.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.pool.shutdown()
        super().__exit__(*exception)

    def _new_pool(self) -> ProcessPoolExecutor:
        """A pool of one process: if it dies, it is known which job it ran."""
        return ProcessPoolExecutor(1, self._context, prepare_worker, (dict(os.environ),))

    def _start(self, function: Function, arguments: tuple[Any, ...], pieces: int) -> Any:
        worker = min(self._workers, key=lambda worker: len(worker.jobs))
        job = _LocalJob(function, arguments, self._new_path(), worker)
        worker.jobs.append(job)
        self._submit(job)
        return job

    def _submit(self, job: _LocalJob) -> None:
        with _no_main_module():
            try:
                job.future = job.worker.pool.submit(run_job, job.function, job.arguments, job.path)
            except BrokenProcessPool as error:  # it has died since the last job
                job.future = Future()
                job.future.set_exception(error)

    def _wait(self, jobs: list[Any]) -> Any:
        while True:
            done, _ = concurrent.futures.wait((job.future for job in jobs), return_when="FIRST_COMPLETED")
            job = next(job for job in jobs if job.future in done)
            if not isinstance(job.future.exception(), BrokenProcessPool):
                job.worker.jobs.remove(job)
                return job
            self._replace(job.worker)

    def _replace(self, worker: _Worker) -> None:
        """Start a new process for one that died, with the jobs that it had not finished."""
        worker.pool.shutdown()
        worker.pool = self._new_pool()
        unfinished = [job for job in worker.jobs if isinstance(job.future.exception(), BrokenProcessPool)]
        unfinished[0].deaths += 1
        for job in unfinished:
            if job.deaths == ATTEMPTS:
                job.future = Future()
                job.future.set_exception(WorkerDied(job.arguments))
            else:
                self._submit(job)

    def _result(self, job: Any) -> tuple[Any, list[Any]]:
        summary, handles = job.future.result()
        return summary, self._register(handles)

    def _cancel(self, job: Any) -> None:
        job.future.cancel()
        job.worker.jobs.remove(job)


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Keep a worker process that is started inside from importing the script that this process runs.

    Jobs are functions of the package, which do not need it. A script without `if __name__ == "__main__"` would prepare
    the data once more in each worker.
    """
    main_module = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main_module


def usable_cores() -> int:
    """Return how many cores this process may use: those of its affinity, and no more than a container's limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such file, or no limit ("max")
        quota, period = CPU_QUOTA.read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)
