"""Free memory goes back to the operating system."""

import ctypes
from pathlib import Path

import numpy as np
import pytest

from babybert.training import free_memory
from babybert.training.free_memory import FreeMemory

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
ARRAYS, BYTES = 2000, 100_000  # below the size from which glibc asks the operating system for each array


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def test_gaps_are_returned_when_the_time_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = FreeMemory()
    arrays = [np.ones(BYTES, np.uint8) for _ in range(ARRAYS)]
    arrays = arrays[-1:]  # all that is below it in the heap is a gap
    fragmented = resident_bytes()
    memory.return_if_due()
    assert resident_bytes() > fragmented - 0.1 * ARRAYS * BYTES  # too early
    monkeypatch.setattr(free_memory, "SECONDS_BETWEEN", 0.0)
    memory.return_if_due()
    assert resident_bytes() < fragmented - 0.5 * ARRAYS * BYTES
    assert arrays[0].all()
