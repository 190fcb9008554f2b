"""Child processes of the tests. Each has a time limit: a process that hangs fails one test, not the whole run."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

TIME_LIMIT = (
    240.0  # seconds; below the limit of one test in pyproject.toml, so that the failure shows the process's output
)


def babybert_command(*arguments: str) -> list[str]:
    """The command line of `babybert ARGUMENTS`, run with this Python."""
    return [sys.executable, "-m", "babybert.cli", *arguments]


def run_babybert(
    *arguments: str,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    seconds: float = TIME_LIMIT,
) -> subprocess.CompletedProcess[str]:
    """Run `babybert ARGUMENTS` to its end and capture its output; the caller checks the exit code.

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


def wait_for_line(process: subprocess.Popen[str], pattern: str, seconds: float = TIME_LIMIT) -> str:
    """Read a process's standard error up to the first line that matches the regular expression, and return that line.

    What follows stays in the pipe for the caller. Fails with everything read so far if the process ends first. After
    `seconds` the process is killed, which ends its output and with it the wait.
    """
    assert process.stderr is not None, "start the process with stderr=subprocess.PIPE"
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    lines = []
    try:
        for line in process.stderr:
            lines.append(line)
            if re.search(pattern, line):
                return line
    finally:
        timer.cancel()
    raise AssertionError(f"no line matches {pattern!r} within {seconds:.0f} s:\n{''.join(lines)}")


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
    function: str, calls: int, *flags: str, before_import: bool = False, seconds: float = TIME_LIMIT
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
