"""Retries what may succeed later, when S3 has been away for longer than boto3's own retries take."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from babybert.errors import StorageError

logger = logging.getLogger(__name__)

T = TypeVar("T")
RETRY_SECONDS = 300.0  # how long S3 may be away
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between two attempts, doubled each time


def retry(action: Callable[[], T], seconds: float = RETRY_SECONDS) -> T:
    """Call `action`. If it raises StorageError, call it again for up to `seconds`, then raise the error."""
    deadline = time.monotonic() + seconds
    pause = FIRST_PAUSE
    while True:
        try:
            return action()
        except StorageError as error:
            pause = min(pause, deadline - time.monotonic())
            if pause <= 0:
                raise
            logger.warning(f"{error}; retrying in {pause:.0f} s")
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
