"""Progress of long work: a bar on a terminal, a plain log line every few seconds elsewhere.

Both show how far the work is, its rate and the time left.
"""

import json
import logging
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_FRAMES = 0.1  # of the bar; drawing it for each unit would cost more than the unit


class Progress:
    """A task of `total` units. Use as a context manager and call `advance`. Bytes are shown as MB.

    Args:
        done: units that an earlier process has done. They count in the bar, but not in the rate.
        show: False to show nothing, because another process does.
        json_lines: where there is no terminal, log JSON objects with the same fields, for log collectors.
    """

    def __init__(
        self, task: str, total: int, unit: str, done: int = 0, show: bool = True, json_lines: bool = False
    ) -> None:
        self.task = task
        self.total = total
        self.unit = unit
        self._show = show
        self._json_lines = json_lines
        self._values: dict[str, float] = {}
        self._done = self._done_at_start = done
        self._start_time = self._last_shown = time.monotonic()
        self._bar: ProgressBar | None = None
        console = Console(stderr=True)
        if console.is_terminal and show:
            amount_and_note = TextColumn("{task.fields[amount]}  {task.fields[note]}")
            name = TextColumn("{task.description}", markup=False)  # a source may be "s3://bucket/[/a-z]*"
            columns = (name, BarColumn(), amount_and_note, TimeRemainingColumn())
            self._bar = ProgressBar(*columns, console=console)
            self._bar_task = self._bar.add_task(task, total=total, completed=done, amount="", note="")

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._update_bar(self._bar)
            self._bar.stop()
        elif kind is None and self._show:
            seconds = time.monotonic() - self._start_time
            logger.info(f"{self.task}: {self._format_amount(self._done)} in {seconds:.1f} s")

    @property
    def rate(self) -> float:
        """Units per second since this process began."""
        return (self._done - self._done_at_start) / max(time.monotonic() - self._start_time, 1e-9)

    def advance(self, units: int = 1, values: Mapping[str, float] | None = None) -> None:
        """Move on by `units`. `values`, such as the loss, are shown next to the rate until new ones replace them."""
        self._done += units
        self._values.update(values or {})
        now = time.monotonic()
        pause = SECONDS_BETWEEN_FRAMES if self._bar else SECONDS_BETWEEN_LINES
        if not self._show or now - self._last_shown < pause:
            return
        self._last_shown = now
        if self._bar:
            self._update_bar(self._bar)
        else:
            self._log_line()

    def _update_bar(self, bar: ProgressBar) -> None:
        bar.update(self._bar_task, completed=self._done, amount=self._describe_amount(), note=self._describe_rate())

    def _log_line(self) -> None:
        seconds_left = (self.total - self._done) / max(self.rate, 1e-9)
        if not self._json_lines:
            logger.info(f"{self.task}: {self._describe_amount()}  {self._describe_rate()}  {seconds_left:.0f} s left")
            return
        line = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "task": self.task,
            "done": self._done,
            "total": self.total,
            "unit": self.unit,
            "rate": round(self.rate, 1),
            "seconds_left": round(seconds_left),
            **{name: round(value, 6) for name, value in self._values.items()},
        }
        logger.info(json.dumps(line))

    def _describe_amount(self) -> str:
        return f"{self._format_amount(self._done)} of {self._format_amount(self.total)}"

    def _describe_rate(self) -> str:
        values = [f"{name} {value:.4g}" for name, value in self._values.items()]
        return "  ".join([f"{self._format_amount(self.rate)}/s", *values])

    def _format_amount(self, units: float) -> str:
        return f"{units / 1e6:,.1f} MB" if self.unit == "bytes" else f"{units:,.0f} {self.unit}"
