"""A job that measures itself; worker processes import this module, so it imports little."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from babybert.data.engine import Arrays, Function


class TimedSummary(NamedTuple):
    """What a timed job returns in place of its summary.

    Attributes:
        seconds: how long it ran, without reading and writing its data.
        bytes_returned: the size of its data.
        summary: its summary.
    """

    seconds: float
    bytes_returned: int
    summary: Any


def run_timed(function: Function, *arguments: Any) -> tuple[TimedSummary, Sequence[Arrays]]:
    """Call a job and return its data with a `TimedSummary`."""
    start = time.perf_counter()
    summary, pieces = function(*arguments)
    seconds = time.perf_counter() - start
    return TimedSummary(seconds, sum(array.nbytes for arrays in pieces for array in arrays), summary), pieces
