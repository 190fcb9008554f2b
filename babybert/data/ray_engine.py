"""Run jobs on a Ray cluster: one that is started on this machine and stopped at the end, or one that is running.

Data is in Ray's object store, which moves it between nodes and writes it to disk if memory is short. The nodes need no
common file system. Ray runs a task again if its process or its node dies.
"""

import logging
import os
import secrets
import shutil
import signal
import socket
import threading
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read at import: Ray would report the use to its makers

import ray
from ray import exceptions
from ray._private import ray_constants

from babybert.data.engine import ATTEMPTS, JOBS_PER_WORKER, Arrays, Engine, Function, WorkerDied
from babybert.data.worker_process import use_one_core
from babybert.errors import StorageError, UserError
from babybert.folders import make_temporary_folder

CONNECT_SECONDS = 10
OBJECT_STORE_BYTES = 2 << 30  # of a cluster that is started here; what does not fit is written to disk
# Ray would return data of less than 100 KB to the memory of the driver. In a large corpus most data is smaller, since
# the documents of a batch go to many shards. A cluster that is running has settings of its own, but the environment of
# a process comes first; processes with another environment take two seconds more to start.
MOST_BYTES_TO_DRIVER = 0
TO_OBJECT_STORE = {"env_vars": {"RAY_max_direct_call_object_size": str(MOST_BYTES_TO_DRIVER)}}
DIED = (
    exceptions.WorkerCrashedError,
    exceptions.OutOfMemoryError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
)
NO_ROOM = (exceptions.ObjectStoreFullError, exceptions.OutOfDiskError)


class RayEngine(Engine):
    """Runs each job as a Ray task.

    Args:
        folder: where a cluster that is started here writes data for which memory is short.
        workers: how many CPUs a cluster that is started here has, and how many tasks run at a time; None for all CPUs
            of a running cluster.
        address: of a running cluster; None to start one.
    """

    def __init__(self, folder: Path, workers: int | None, address: str | None) -> None:
        assert address or workers
        self._folder = folder
        self._workers = workers
        self._address = address
        self._temporary_folder: Path | None = None
        # Its nodes may be other machines.
        self.workers_see_files = address is None
        self._task_options = {"runtime_env": TO_OBJECT_STORE} if address else {}

    def __enter__(self) -> "RayEngine":
        handler = signal.getsignal(signal.SIGTERM)
        logging.getLogger("ray").setLevel(logging.ERROR)
        try:
            if self._address:
                _require_answer(self._address)
                ray.init(self._address, log_to_driver=False, configure_logging=False)
            else:
                self._start_cluster()
        except Exception as error:  # Ray has no class for some: a node that does not start in time is an `Exception`
            ray.shutdown()
            self._delete_temporary_folder()
            place = f"no Ray cluster at {self._address}" if self._address else "Ray cannot be started"
            raise StorageError(f"{place}: {_reason(error)}") from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's would end the process as an error that deletes what is done
        workers = self._workers or int(ray.cluster_resources().get("CPU", 1))
        self.window = JOBS_PER_WORKER * workers
        return self

    def _start_cluster(self) -> None:
        # In a folder of its own, because the paths of Ray's sockets must be short.
        self._temporary_folder = make_temporary_folder("ray")
        self._folder.mkdir(parents=True, exist_ok=True)
        # Without it, Ray would write a token to the home folder.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Ray uses the loopback interface alone where it does not expect other nodes. Its other processes see the
        # variable, and this one has read it already.
        os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
        ray_constants.ENABLE_RAY_CLUSTER = False
        ray.init(
            "local",
            num_cpus=self._workers,
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            object_spilling_directory=str(self._folder.absolute()),
            log_to_driver=False,
            configure_logging=False,
            _temp_dir=str(self._temporary_folder),
            _system_config={"max_direct_call_object_size": MOST_BYTES_TO_DRIVER},
        )

    def __exit__(self, *exception: object) -> None:
        ray.shutdown()
        self._delete_temporary_folder()

    def _delete_temporary_folder(self) -> None:
        if self._temporary_folder:
            os.environ.pop(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, None)
            ray_constants.ENABLE_RAY_CLUSTER = True
            shutil.rmtree(self._temporary_folder, ignore_errors=True)

    def put(self, arrays: Arrays) -> Any:
        """Copy the data to the object store; see `Engine.put`."""
        return ray.put(list(arrays))

    def get(self, handle: Any) -> Arrays:
        """Return the data, mapped from the object store; see `Engine.get`."""
        arrays: Arrays = ray.get(handle)
        return arrays

    def drop(self, handle: Any) -> None:
        """Do nothing: Ray deletes data when nobody has its handle; see `Engine.drop`."""

    def _start(self, function: Function, arguments: tuple[Any, ...], pieces: int) -> Any:
        handles = RUN_TASK.options(num_returns=1 + pieces, **self._task_options).remote(function, *arguments)
        return _RayJob(handles if pieces else [handles], arguments)

    def _wait(self, jobs: list[Any]) -> Any:
        (done,), _ = ray.wait([job.handles[0] for job in jobs], num_returns=1)
        return next(job for job in jobs if job.handles[0] == done)

    def _result(self, job: Any) -> tuple[Any, list[Any]]:
        summary, *handles = job.handles
        try:
            return ray.get(summary), handles
        except exceptions.RayTaskError as error:
            if not isinstance(error.cause, exceptions.RayError):
                raise error.cause from None
            # The node could not even call the function.
            raise UserError(
                f"a Ray node cannot run the work: {_reason(error.cause)}; it needs this version of babybert and its "
                "packages"
            ) from error
        except DIED as error:
            raise WorkerDied(job.arguments) from error
        except NO_ROOM as error:
            raise StorageError(
                f"a Ray node has no room for the data: {_reason(error)}; give it more memory or disk"
            ) from error
        except exceptions.RayError as error:
            raise UserError(f"Ray: {_reason(error)}") from error

    def _cancel(self, job: Any) -> None:
        """Do nothing: Ray ends the tasks when the driver disconnects.

        `ray.cancel` can end the driver instead, if the task finishes at that moment (ray-project/ray#54260).
        """


class _RayJob:
    """A task, with the references to what it returns."""

    def __init__(self, handles: list[Any], arguments: tuple[Any, ...]) -> None:
        self.handles = handles
        self.arguments = arguments


def _require_answer(address: str) -> None:
    """Raise OSError if nobody listens there. Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if host:  # not "auto"
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


def _run(function: Function, *arguments: Any) -> Any:
    use_one_core()
    summary, pieces = function(*arguments)
    return (summary, *pieces) if pieces else summary


RUN_TASK = ray.remote(max_retries=ATTEMPTS - 1)(_run)


def _reason(error: Exception) -> str:
    """The first line of an error of Ray; further ones are for its developers."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
