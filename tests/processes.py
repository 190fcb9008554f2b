"""Child processes with a time limit on every wait: one that hangs fails its test, with what it has printed."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

START_SECONDS = 120.0  # for a command to start; imports are slow on a loaded machine
STOP_SECONDS = 60.0
COMMAND_SECONDS = 240.0  # below the limit of one test in pyproject.toml, so that the failure shows the output


def babybert_command(*arguments: str) -> list[str]:
    """The command line of `babybert ARGUMENTS`, run with this Python."""
    return [sys.executable, "-m", "babybert.cli", *arguments]


def run_babybert(
    *arguments: str,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    seconds: float = COMMAND_SECONDS,
) -> subprocess.CompletedProcess[str]:
    """Run `babybert ARGUMENTS` to its end and capture its output. The caller checks the exit code.

    `environment` is added to the variables of this process. Raises subprocess.TimeoutExpired after `seconds`.
    """
    return subprocess.run(
        babybert_command(*arguments),
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def babybert_output(*arguments: str, cwd: Path | None = None, seconds: float = COMMAND_SECONDS) -> str:
    """Run `babybert ARGUMENTS`, check that it succeeds, and return its standard output."""
    done = run_babybert(*arguments, cwd=cwd, seconds=seconds)
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
    return ChildProcess(babybert_command(*arguments), folder, environment)


# Arguments: function as module:attribute, number of the fatal call, "before" or "after" the import of babybert, flags.
KILL_AT_CALL = """
import importlib, os, signal, sys

function, calls, when, *flags = sys.argv[1:]
if when == "after":
    import babybert.cli

module_name, _, attribute = function.partition(":")
*classes, name = attribute.split(".")
holder = importlib.import_module(module_name)
for class_name in classes:
    holder = getattr(holder, class_name)
original = getattr(holder, name)
calls_left = int(calls)

def count_call(*args, **kwargs):
    global calls_left
    calls_left -= 1
    if calls_left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(holder, name, count_call)

import babybert.cli
sys.exit(babybert.cli.main(flags))
"""


def run_until_killed(
    function: str, calls: int, *flags: str, before_import: bool = False, seconds: float = COMMAND_SECONDS
) -> None:
    """Run `babybert FLAGS` in a process that kills itself with SIGKILL at a chosen moment.

    Args:
        function: The kill point, as "module:attribute" or "module:Class.attribute" of any module: "os:fsync",
            "pathlib:Path.replace". The name is replaced in that module only, so the code under test must look it up
            there at each call.
        calls: The process dies instead of making the call with this number; the first call is number 1.
        before_import: Replace the function before babybert is imported. Then modules that import it by name
            (`from shutil import rmtree`) see the replacement too, but calls during the imports count.
        seconds: Time limit.
    """
    when = "before" if before_import else "after"
    job = subprocess.run(
        [sys.executable, "-c", KILL_AT_CALL, function, str(calls), when, *flags],
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert job.returncode == -signal.SIGKILL, f"not killed, exit code {job.returncode}:\n{job.stderr}"
