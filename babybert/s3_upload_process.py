"""Uploads large files in a process of their own, so that an upload does not slow down training.

In one process, only one thread at a time runs Python code (the GIL). boto3's threads hold it while they prepare, hash
and send. If they have a low priority and all cores are busy, the system suspends one that holds the GIL, and training
waits for it: its steps took 3.5 % longer on two cores. A process of its own has its own GIL, and its low priority then
does what it should: 1.2 %. `benchmarks/checkpoint.py` measures both.

It costs a start of Python and boto3 for each checkpoint (half a second at low priority) and 50 MB while it runs.
Requests and answers are lines of JSON. The process ends when its standard input is closed, so also when training is
killed.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from babybert.errors import DataError, StorageError, UsageError, UserError
from babybert.s3 import make_client, upload_file
from babybert.s3_errors import s3_errors

LOWEST_PRIORITY = 19  # a nice value
SECONDS_TO_END = 5  # how long to wait for a process that has nothing left to do
ERRORS = {error_class.__name__: error_class for error_class in (UsageError, DataError, StorageError)}


class UploadProcess:
    """A process that uploads files, one after the other. Use it as a context manager.

    Attributes:
        pid: its process id.
    """

    def __enter__(self) -> "UploadProcess":
        # -P keeps modules of the current folder out. The package may be there, and not be installed.
        folders = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "babybert.s3_upload_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))},
            # Ctrl-C is for training, which then waits for the last upload. Not a new session: Linux's autogroups give
            # each session an equal share of the cores, whatever its priority.
            process_group=0,
        )
        self.pid = self._process.pid
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):  # it was killed before it read the last request
            self._process.stdin.close()
        try:
            self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def upload(self, path: Path, bucket: str, key: str) -> None:
        """Upload a file, and wait until it is there.

        Raises what `s3_errors` makes of errors of S3, OSError if the file cannot be read, and StorageError if the
        process was killed.
        """
        assert self._process.stdin and self._process.stdout
        request = {"path": os.fspath(path), "bucket": bucket, "key": key}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise StorageError(f"s3://{bucket}/{key}: the process that uploads ended with code {code}; try again")
        answer = json.loads(line)
        if answer["error"] == "OSError":
            raise OSError(*answer["arguments"])
        if answer["error"]:
            raise ERRORS[answer["error"]](*answer["arguments"])


def main() -> None:
    """Answer the requests on standard input until it is closed."""
    os.nice(LOWEST_PRIORITY - os.nice(0))
    requests: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    client = None
    while True:
        request = requests.get()
        error = ""
        arguments: list[int | str | None] = []
        try:
            client = client or make_client()
            with s3_errors(f"s3://{request['bucket']}/{request['key']}"):
                upload_file(client, Path(request["path"]), request["bucket"], request["key"])
        except UserError as problem:
            error, arguments = type(problem).__name__, [str(problem)]
        except OSError as problem:
            error, arguments = "OSError", [problem.errno, problem.strerror or str(problem), problem.filename]
        print(json.dumps({"error": error, "arguments": arguments}), flush=True)


def _read_requests(requests: "queue.SimpleQueue[dict[str, Any]]") -> None:
    """Queue each request. Ends the process when there are no more, even in the middle of an upload."""
    for line in sys.stdin:
        requests.put(json.loads(line))
    os._exit(0)


if __name__ == "__main__":
    main()
