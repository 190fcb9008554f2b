"""What a process that runs jobs does before its first job. Loads neither PyTorch nor pandas."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading

import pyarrow

# The modules of the jobs, which the server process imports once for all worker processes.
JOB_MODULES = [f"babybert.data.{name}" for name in ("worker_process", "tokenize_batch", "blocks", "shuffle")]


def prepare_worker(environment: dict[str, str]) -> None:
    """Use one core, leave Ctrl-C to the driver, and end when the driver ends, whatever kills it.

    `environment` are the driver's variables. Those of the fork server are as old as the first engine of the process.
    """
    os.environ.clear()
    os.environ.update(environment)
    use_one_core()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_driver, daemon=True).start()


def use_one_core() -> None:
    """Turn off the threads of libraries: there are as many processes as cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pyarrow.set_cpu_count(1)


def _end_with_driver() -> None:
    driver = multiprocessing.parent_process()
    assert driver is not None
    multiprocessing.connection.wait([driver.sentinel])
    os._exit(1)
