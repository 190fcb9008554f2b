"""Child processes with a time limit on every wait: one that hangs fails its test, with what it has printed."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

START_SECONDS = 120.0  # for a command to start; imports are slow on a loaded machine
STOP_SECONDS = 60.0
COMMAND_SECONDS = 1800.0  # the longest trains a model on the demo


def run_babybert(*arguments: str, folder: Path | None = None, timeout: float = COMMAND_SECONDS) -> str:
    """Run one command to its end in `folder`, check that it succeeds, and return its standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "babybert.cli", *arguments], cwd=folder, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class ChildProcess:
    """A running command whose standard error is collected by a thread."""

    def __init__(
        self, command: Sequence[str], folder: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        self.lines: list[str] = []  # of its standard error, so far
        self.process = subprocess.Popen(
            command, cwd=folder, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
        )
        self._reader = threading.Thread(target=self._read_lines, daemon=True)
        self._reader.start()

    def _read_lines(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line)

    def wait_for_line(self, text: str, timeout: float = START_SECONDS) -> str:
        """The first line on standard error that contains `text`. Fails if the process ends or the time is over."""
        deadline = time.monotonic() + timeout
        while True:
            has_ended = not self._reader.is_alive()  # before the lines are searched, so that none is missed
            for line in self.lines:
                if text in line:
                    return line
            if has_ended:
                pytest.fail(f"the process ended without a line with '{text}':\n{self.output}")
            if time.monotonic() > deadline:
                pytest.fail(f"no line with '{text}' within {timeout:.0f} s:\n{self.output}")
            time.sleep(0.02)

    def wait(self, timeout: float = STOP_SECONDS) -> int:
        """The exit code. Fails if the process does not end in time."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the process did not end within {timeout:.0f} s:\n{self.output}")
        self._reader.join(timeout)
        return code

    def send_signal(self, signal_number: int) -> None:
        """Send a signal to the process."""
        self.process.send_signal(signal_number)

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.poll() is None

    @property
    def output(self) -> str:
        """Its standard error so far."""
        return "".join(self.lines)

    def kill(self) -> None:
        """End it now, if it still runs."""
        self.process.kill()
        self.process.wait(STOP_SECONDS)
        self._reader.join(STOP_SECONDS)


def start_babybert(
    *arguments: str, folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> ChildProcess:
    """Start a `babybert` command in `folder`."""
    return ChildProcess([sys.executable, "-m", "babybert.cli", *arguments], folder, environment)
