"""The process that uploads: same errors as a call in this process, a low priority, and it ends with its parent."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import S3
from faulty_proxy import S3Proxy, access_denied

from babybert.errors import StorageError, UsageError
from babybert.s3_upload_process import LOWEST_PRIORITY, UploadProcess


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file to upload."""
    path = tmp_path / "weights \N{SNOWMAN}.bin"
    path.write_bytes(bytes(range(256)) * 100)
    return path


def wait_until_gone(process: int) -> None:
    """Wait until a process has ended, perhaps without a parent that notices."""
    deadline = time.monotonic() + 20
    status = Path(f"/proc/{process}/status")
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline, "the process still runs"
        time.sleep(0.01)


def test_files_arrive_one_after_the_other_at_low_priority(s3: S3, file: Path) -> None:
    with UploadProcess() as uploads:
        for key in ("one", "two"):
            uploads.upload(file, s3.bucket, key)
            assert s3.client.get_object(Bucket=s3.bucket, Key=key)["Body"].read() == file.read_bytes()
        assert os.getpriority(os.PRIO_PROCESS, uploads.pid) == LOWEST_PRIORITY
        assert os.getpgid(uploads.pid) != os.getpgid(0)  # so that Ctrl-C does not end it
        assert os.getsid(uploads.pid) == os.getsid(0)
    wait_until_gone(uploads.pid)


def test_after_an_error_the_next_file_is_uploaded(s3: S3, file: Path) -> None:
    with UploadProcess() as uploads:
        with pytest.raises(FileNotFoundError) as missing:
            uploads.upload(file.with_name("absent"), s3.bucket, "one")
        assert missing.value.filename == str(file.with_name("absent"))
        uploads.upload(file, s3.bucket, "one")
    assert s3.client.get_object(Bucket=s3.bucket, Key="one")["Body"].read() == file.read_bytes()


def test_a_refusal_of_s3_is_the_error_that_it_is_elsewhere(s3: S3, s3_proxy: S3Proxy, file: Path) -> None:
    s3_proxy.rule = access_denied
    with UploadProcess() as uploads, pytest.raises(UsageError, match=f"s3://{s3.bucket}/one: access denied"):
        uploads.upload(file, s3.bucket, "one")


def test_a_process_that_is_killed_is_an_error_that_a_retry_may_fix(s3: S3, s3_proxy: S3Proxy, file: Path) -> None:
    def kill(request: object) -> None:
        os.kill(uploads.pid, signal.SIGKILL)

    s3_proxy.rule = kill
    with UploadProcess() as uploads:
        for _ in range(2):  # while it uploads, and when it is gone
            with pytest.raises(StorageError, match=r"s3://.*/one: the process that uploads ended with code -9"):
                uploads.upload(file, s3.bucket, "one")


def test_leaving_does_not_wait_for_a_server_that_does_not_answer(s3: S3, s3_proxy: S3Proxy, file: Path) -> None:
    """It ends in the middle of an upload as soon as nobody waits for it."""
    asked, leave = threading.Event(), threading.Event()

    def stall(request: object) -> None:
        asked.set()
        leave.wait(60)

    s3_proxy.rule = stall
    uploads = UploadProcess().__enter__()
    thread = threading.Thread(target=pytest.raises, args=(StorageError, uploads.upload, file, s3.bucket, "one"))
    thread.start()
    assert asked.wait(30)
    uploads.__exit__()
    wait_until_gone(uploads.pid)
    leave.set()
    thread.join(20)
    assert not thread.is_alive()


def test_it_ends_with_the_process_that_started_it(s3: S3, file: Path) -> None:
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from babybert.s3_upload_process import UploadProcess\n"
        "with UploadProcess() as uploads:\n"
        "    uploads.upload(Path(sys.argv[1]), sys.argv[2], 'one')\n"
        "    print(uploads.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script, str(file), s3.bucket]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as training:
        assert training.stdout
        process = int(training.stdout.readline())
        training.kill()
    wait_until_gone(process)
