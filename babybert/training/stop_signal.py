"""SIGTERM and SIGINT as a request: finish the step, save a checkpoint, end."""

import logging
import signal
from types import FrameType, TracebackType

logger = logging.getLogger(__name__)


class StopSignal:
    """While entered, the first SIGTERM or SIGINT is only recorded. A second one acts as usual.

    Kubernetes sends SIGTERM before it evicts a pod; a terminal sends SIGINT for Ctrl-C.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.received is not None

    def __enter__(self) -> "StopSignal":
        self._previous_handlers = {
            signal_number: signal.signal(signal_number, self._record)
            for signal_number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore_handlers()

    def _record(self, signal_number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(signal_number)
        logger.info(f"{self.received.name}: finishing the step and saving a checkpoint")
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for signal_number, handler in self._previous_handlers.items():
            signal.signal(signal_number, handler)
