"""Downloads from an HTTP server that breaks connections off, and files from a real S3 server."""

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import S3
from faulty_proxy import answering
from test_sources import content

from babybert.config import PrepareConfig
from babybert.corpus.download import Download, download
from babybert.corpus.sources import find_files
from babybert.data.prepare import prepare
from babybert.errors import DataError, StorageError, UsageError

CONTENT = bytes(range(256)) * 8000  # 2 MB


class UnsteadyServer(ThreadingHTTPServer):
    """Serves CONTENT, and breaks off the first `breaks` answers after `steady_bytes`.

    Attributes:
        breaks: how many answers are broken off.
        steady_bytes: how much of them arrives.
        ranges: whether the server honours the Range header.
        status: an error status to answer with.
        requested: the Range header of each request.
    """

    breaks = 0
    steady_bytes = 700_000
    ranges = True
    status: int | None = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), UnsteadyHandler)
        self.requested: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}/data.bin"
        self.source = Download(self.url, len(CONTENT), hashlib.md5(CONTENT).hexdigest())


class UnsteadyHandler(BaseHTTPRequestHandler):
    """One request to an `UnsteadyServer`."""

    server: UnsteadyServer

    def do_GET(self) -> None:
        server = self.server
        server.requested.append(self.headers["Range"])
        if server.status:
            self.send_error(server.status)
            return
        first = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if server.ranges else 0
        self.send_response(206 if server.ranges else 200)
        self.send_header("Content-Length", str(len(CONTENT) - first))
        self.end_headers()
        is_broken = len(server.requested) <= server.breaks
        self.wfile.write(CONTENT[first : first + server.steady_bytes] if is_broken else CONTENT[first:])

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def web() -> Iterator[UnsteadyServer]:
    server = UnsteadyServer()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_two_processes_download_a_file_once(web: UnsteadyServer, tmp_path: Path) -> None:
    """The second one waits for the first, and then finds the file."""
    with ThreadPoolExecutor() as pool:
        paths = list(pool.map(lambda _: download(web.source, tmp_path / "new"), range(3)))
    assert paths[0].read_bytes() == CONTENT
    assert web.requested == ["bytes=0-"]


def test_a_download_folder_that_cannot_be_written_is_a_usage_error(web: UnsteadyServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="choose another --download-folder"):
        download(web.source, tmp_path / "file" / "downloads")


def test_a_download_arrives_once(web: UnsteadyServer, tmp_path: Path) -> None:
    path = download(web.source, tmp_path / "new" / "folder")
    assert path.read_bytes() == CONTENT
    assert download(web.source, tmp_path / "new" / "folder") == path
    assert web.requested == ["bytes=0-"]
    assert [entry.name for entry in path.parent.iterdir()] == ["data.bin"]


def test_a_broken_download_is_resumed(web: UnsteadyServer, tmp_path: Path) -> None:
    web.breaks = 2
    assert download(web.source, tmp_path, pause=0).read_bytes() == CONTENT
    assert web.requested == ["bytes=0-", "bytes=700000-", "bytes=1400000-"]


def test_a_later_command_resumes_too(web: UnsteadyServer, tmp_path: Path) -> None:
    web.breaks = 99
    web.steady_bytes = 1000
    with pytest.raises(StorageError, match="5,000 of 2,048,000 bytes downloaded: run the command again to resume"):
        download(web.source, tmp_path, pause=0)
    web.breaks = 0
    assert download(web.source, tmp_path, pause=0).read_bytes() == CONTENT
    assert web.requested[-1] == "bytes=5000-"


def test_a_server_that_does_not_speak_http_is_reported(tmp_path: Path) -> None:
    with answering(b"SSH-2.0-OpenSSH_9.6\r\n") as (port, received):
        with pytest.raises(StorageError, match="run the command again"):
            download(Download(f"http://127.0.0.1:{port}/data.bin", 1, ""), tmp_path, pause=0)
        assert len(received) == 5


def test_without_ranges_the_download_starts_again(web: UnsteadyServer, tmp_path: Path) -> None:
    web.ranges = False
    web.breaks = 1
    assert download(web.source, tmp_path, pause=0).read_bytes() == CONTENT


def test_another_file_is_refused_and_deleted(web: UnsteadyServer, tmp_path: Path) -> None:
    wrong = Download(web.source.url, len(CONTENT), "0" * 32)
    with pytest.raises(DataError, match="not the expected one"):
        download(wrong, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_not_requested_again(web: UnsteadyServer, tmp_path: Path) -> None:
    web.status = 404
    with pytest.raises(StorageError, match=r"404.*--source"):
        download(web.source, tmp_path, pause=0)
    assert len(web.requested) == 1


def put(s3: S3, **objects: str) -> None:
    for name, text in objects.items():
        s3.client.put_object(Bucket=s3.bucket, Key=name.replace("__", "/") + ".txt", Body=text.encode())


@pytest.mark.slow
def test_objects_prefixes_and_globs_of_s3(s3: S3, tmp_path: Path) -> None:
    put(s3, in__a="A", in__b="B", in__deep__c="C", inside="D")
    s3.client.put_object(Bucket=s3.bucket, Key="in/no.md", Body=b"E")

    def texts(source: str) -> list[str]:
        return list(map(content, find_files([f"s3://{s3.bucket}/{source}"], (".txt",), tmp_path).paths))

    assert texts("in/a.txt") == ["A"]
    assert texts("in/no.md") == ["E"]
    assert texts("in") == texts("in/") == ["A", "B", "C"]
    assert texts("in/[b-z]*.txt") == ["B", "C"]
    assert sorted(texts("")) == ["A", "B", "C", "D"]
    with pytest.raises(DataError, match="no such object, and no object below it"):
        texts("nowhere")


def test_a_corpus_in_s3_is_prepared(s3: S3, tmp_path: Path) -> None:
    for i in range(20):
        put(s3, **{f"train__pos__{i}_7": f"Review {i} is good. It is number {i}."})
    facts = prepare(
        PrepareConfig(corpus="imdb", source=(f"s3://{s3.bucket}",), out=tmp_path / "data", validation_fraction=0.3)
    )
    assert facts["documents"] == 20
    assert not (tmp_path / "data" / ".work").exists()


def test_errors_of_s3_say_what_to_do(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(s3, a="A")
    with pytest.raises(DataError, match="no such object or bucket"):
        find_files(["s3://no-such-bucket-here/x"], (".txt",), tmp_path)
    with pytest.raises(UsageError, match="not an S3 address"):
        find_files(["s3://"], (".txt",), tmp_path)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UsageError, match="access denied"):
        find_files([f"s3://{s3.bucket}/a.txt"], (".txt",), tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="check the endpoint"):
        find_files([f"s3://{s3.bucket}/a.txt"], (".txt",), tmp_path)
