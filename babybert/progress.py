"""Progress of long work: a bar on a terminal, a plain line every few seconds anywhere else.

Both say how far it is, the rate and the time left. Lines go to standard error, so that what a command prints as its
result can be piped on.
"""

import json
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_FRAMES = 0.1  # of the bar: to draw it for each unit would cost more than many a unit does


def say(text: str) -> None:
    """One line to the person who watches, on standard error."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """A task of `total` units; `advance` moves it on. Use as a context manager. Bytes are shown as MB.

    `done` is what an earlier process had done of the same task: it counts in the bar, not in the rate. `json_lines`
    makes the lines elsewhere than on a terminal JSON objects with the same fields, for whoever collects logs. Without
    `show` nothing is shown: there is another process that does.
    """

    def __init__(
        self, task: str, total: int, unit: str, done: int = 0, show: bool = True, json_lines: bool = False
    ) -> None:
        self.task, self.total, self.unit, self._silent, self._json = task, total, unit, not show, json_lines
        self._values: dict[str, float] = {}
        self._start_done = self._done = done
        self._start = self._last_shown = time.monotonic()
        self._bar: RichProgress | None = None
        console = Console(stderr=True)
        if console.is_terminal and show:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[amount]}  {task.fields[note]}"),
                TimeRemainingColumn(),
            )
            self._bar = RichProgress(*columns, console=console)
            self._bar_task = self._bar.add_task(task, total=total, completed=done, amount="", note="")

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._show()
            self._bar.stop()
        elif kind is None and not self._silent:
            say(f"{self.task}: {self._amount(self._done)} in {time.monotonic() - self._start:.1f} s")

    @property
    def rate(self) -> float:
        """Units a second since this process began."""
        return (self._done - self._start_done) / max(time.monotonic() - self._start, 1e-9)

    def advance(self, units: int = 1, values: Mapping[str, float] | None = None) -> None:
        """Move on by `units`; `values` (the loss, say) are shown beside the rate until others take their place."""
        self._done += units
        self._values.update(values or {})
        now = time.monotonic()
        if now - self._last_shown >= (SECONDS_BETWEEN_FRAMES if self._bar else SECONDS_BETWEEN_LINES):
            self._last_shown = now
            self._show()

    def _show(self) -> None:
        if self._silent:
            return
        amount = f"{self._amount(self._done)} of {self._amount(self.total)}"
        note = "  ".join(
            [f"{self._amount(self.rate)}/s", *(f"{name} {value:.4g}" for name, value in self._values.items())]
        )
        if self._bar:
            self._bar.update(self._bar_task, completed=self._done, amount=amount, note=note)
        else:
            left = (self.total - self._done) / max(self.rate, 1e-9)
            if self._json:
                now = datetime.now(UTC).isoformat(timespec="seconds")
                line = {"time": now, "task": self.task, "done": self._done, "total": self.total, "unit": self.unit}
                say(
                    json.dumps(
                        {
                            **line,
                            "rate": round(self.rate, 1),
                            "seconds_left": round(left),
                            **{k: round(v, 6) for k, v in self._values.items()},
                        }
                    )
                )
                return
            say(f"{self.task}: {amount}  {note}  {left:.0f} s left")

    def _amount(self, units: float) -> str:
        return f"{units / 1e6:,.1f} MB" if self.unit == "bytes" else f"{units:,.0f} {self.unit}"
