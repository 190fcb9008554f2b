"""Jobs that tests give to engines; worker processes import this module, so it imports little."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from babybert.corpus.batches import DocumentBatch
from babybert.corpus.files import BadRows
from babybert.data.engine import Arrays
from babybert.data.tokenize_batch import BatchSettings


def double(number: int, *data: Arrays) -> tuple[tuple[int, int], list[Arrays]]:
    """Return the process and twice the number, and all data twice."""
    return (os.getpid(), 2 * number), [[2 * array for array in arrays] for arrays in data]


def fail_at(number: int, fatal: set[int]) -> tuple[int, list[Arrays]]:
    """Fail for some numbers, the sooner the larger the number is."""
    if number in fatal:
        time.sleep(0.2 / number)
        raise ValueError(f"number {number}")
    return number, []


def read_variable(name: str) -> tuple[str | None, list[Arrays]]:
    """Return a variable of the environment."""
    return os.environ.get(name), []


def die_until(number: int, folder: Path, deaths: int) -> tuple[int, list[Arrays]]:
    """Log the call in a file. Number 3 kills its process, unless it has done so `deaths` times."""
    with (folder / "calls").open("a") as file:
        file.write(f"{number}\n")
    if number == 3 and (folder / "calls").read_text().split().count("3") <= deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return number, [[np.full(3, number)]]


def die_at_poison(batch: DocumentBatch, settings: BatchSettings) -> tuple[Any, list[Arrays]]:
    """Kill the process at a document with the word poison."""
    for document in batch.read(BadRows(settings.skip_bad_rows, quiet=True)):
        if "poison" in document.text:
            os.kill(os.getpid(), signal.SIGKILL)
    return None, [[np.zeros(1)]]
