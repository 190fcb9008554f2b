"""Where the block functions run: what prepare asks of an engine, and the loop that all engines share.

A *job* is one call of a function of this package. It returns a summary, which comes back to the driver, and data, which
stays with the engine: the driver gets a handle for each piece of it and passes the handle on to another job. So the
driver never holds the corpus. Data is a list of numpy arrays.

Jobs must be functions of their arguments alone: an engine may run one again if the process that ran it has died.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from babybert.errors import UserError

Arrays = Sequence[np.ndarray]
Function = Callable[..., tuple[Any, Sequence[Arrays]]]
JOBS_PER_WORKER = 2  # one runs and one waits, so that no process waits for the driver
ATTEMPTS = 3  # to run a job whose process dies; it may have died for another reason


class WorkerDied(UserError):
    """The process of a job has died at each attempt: it was killed, ran out of memory, or crashed.

    Attributes:
        arguments: the arguments of the job.
    """

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        super().__init__(
            f"a worker process died {ATTEMPTS} times at the same work: it was killed, ran out of memory or crashed; "
            "use fewer --workers or a machine with more memory"
        )
        self.arguments = arguments


class Result(NamedTuple):
    """What a job gave.

    Attributes:
        input_index: the index of its arguments among all inputs of `map`.
        summary: what the function returned first.
        handles: a handle for each piece of data that it returned.
    """

    input_index: int
    summary: Any
    handles: list[Any]


class Engine(ABC):
    """Runs jobs. A context manager; on exit, all data is deleted and all processes end.

    Attributes:
        window: how many jobs are in progress at most; it bounds the memory.
        workers_see_files: whether the processes can open the paths that the driver can.
    """

    window: int
    workers_see_files: bool = True

    def map(self, function: Function, inputs: Iterable[tuple[Any, ...]], pieces: int = 0) -> Generator[Result]:
        """Call `function` with each tuple of arguments and yield the results as they finish.

        Args:
            function: returns a summary and `pieces` pieces of data. An argument that is a handle arrives as the data.
            inputs: the arguments. They are asked for as jobs are started, so they may be read from a file.
            pieces: how many pieces of data each call returns.

        After an error, also one of `inputs`, no more jobs are started; of all errors the one of the first input is
        raised, whichever came first. Raises WorkerDied if a job could not be completed.
        """
        iterator = iter(inputs)
        running: dict[Any, int] = {}
        errors: dict[int, Exception] = {}
        index = 0
        is_exhausted = False
        try:
            while True:
                while not is_exhausted and not errors and len(running) < self.window:
                    try:
                        running[self._start(function, next(iterator), pieces)] = index
                        index += 1
                    except StopIteration:
                        is_exhausted = True
                    except Exception as error:
                        errors[index] = error
                if not running:
                    break
                job = self._wait(list(running))
                job_index = running.pop(job)
                try:
                    summary, handles = self._result(job)
                except Exception as error:
                    errors[job_index] = error
                else:
                    yield Result(job_index, summary, handles)
        finally:
            for job in running:
                self._cancel(job)
        if errors:
            raise errors[min(errors)]

    @abstractmethod
    def __enter__(self) -> "Engine":
        """Start the engine."""

    @abstractmethod
    def __exit__(self, *exception: object) -> None:
        """Delete all data and end all processes."""

    @abstractmethod
    def put(self, arrays: Arrays) -> Any:
        """Hand over data that the driver has. Return its handle."""

    @abstractmethod
    def get(self, handle: Any) -> Arrays:
        """Return data to the driver."""

    @abstractmethod
    def drop(self, handle: Any) -> None:
        """Delete data that no job needs any more. Each handle is dropped once at most."""

    @abstractmethod
    def _start(self, function: Function, arguments: tuple[Any, ...], pieces: int) -> Any:
        """Start a job."""

    @abstractmethod
    def _wait(self, jobs: list[Any]) -> Any:
        """Wait until one of these jobs has finished, and return it."""

    @abstractmethod
    def _result(self, job: Any) -> tuple[Any, list[Any]]:
        """Return the summary and the handles of a finished job, or raise its error."""

    @abstractmethod
    def _cancel(self, job: Any) -> None:
        """Forget a job that is not needed any more; it may still run to its end."""


def in_order(results: Iterable[Result]) -> Iterator[Result]:
    """Yield results in the order of their inputs, so that nothing depends on which job was faster."""
    waiting: dict[int, Result] = {}
    expected = 0
    for result in results:
        waiting[result.input_index] = result
        while expected in waiting:
            yield waiting.pop(expected)
            expected += 1
