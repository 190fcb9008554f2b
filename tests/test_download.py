"""Against a real HTTP server that breaks off, and a real S3 server."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from babybert.config import PrepareConfig
from babybert.corpus.download import Download, download, find_files
from babybert.data.prepare import prepare
from babybert.errors import DataError, StorageError, UsageError

CONTENT = bytes(range(256)) * 8000  # 2 MB


class Unsteady(BaseHTTPRequestHandler):
    """Serves CONTENT with ranges, and hangs up after `steady` bytes of each of the first `breaks` answers."""

    breaks, steady, ranges, status = 0, 700_000, True, None

    def do_GET(self):
        server = self.server
        server.asked.append(self.headers["Range"])
        if server.status:
            self.send_error(server.status)
            return
        first = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if server.ranges else 0
        self.send_response(206 if server.ranges else 200)
        self.send_header("Content-Length", str(len(CONTENT) - first))
        self.end_headers()
        broken = len(server.asked) <= server.breaks
        self.wfile.write(CONTENT[first : first + server.steady] if broken else CONTENT[first:])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def web():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Unsteady)
    server.asked, server.breaks, server.steady, server.ranges, server.status = [], 0, 700_000, True, None
    server.wanted = Download(
        f"http://127.0.0.1:{server.server_port}/data.bin", len(CONTENT), hashlib.md5(CONTENT).hexdigest()
    )
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_download_arrives_once(web, tmp_path):
    path = download(web.wanted, tmp_path / "new" / "folder")
    assert path.read_bytes() == CONTENT
    assert download(web.wanted, tmp_path / "new" / "folder") == path
    assert web.asked == ["bytes=0-"]
    assert [entry.name for entry in path.parent.iterdir()] == ["data.bin"]


def test_a_broken_download_goes_on_where_it_stopped(web, tmp_path):
    web.breaks = 2
    assert download(web.wanted, tmp_path, pause=0).read_bytes() == CONTENT
    assert web.asked == ["bytes=0-", "bytes=700000-", "bytes=1400000-"]


def test_a_later_process_goes_on_too(web, tmp_path):
    web.breaks = 99
    web.steady = 1000
    with pytest.raises(StorageError, match="5,000 of 2,048,000 bytes have come: start again"):
        download(web.wanted, tmp_path, pause=0)
    web.breaks = 0
    assert download(web.wanted, tmp_path, pause=0).read_bytes() == CONTENT
    assert web.asked[-1] == "bytes=5000-"


def test_a_server_without_ranges_starts_anew(web, tmp_path):
    web.ranges, web.breaks = False, 1
    assert download(web.wanted, tmp_path, pause=0).read_bytes() == CONTENT


def test_another_file_is_refused_and_deleted(web, tmp_path):
    wrong = Download(web.wanted.url, len(CONTENT), "0" * 32)
    with pytest.raises(DataError, match="not the file that was expected"):
        download(wrong, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_there_is_not_asked_for_again(web, tmp_path):
    web.status = 404
    with pytest.raises(StorageError, match=r"404.*--source"):
        download(web.wanted, tmp_path, pause=0)
    assert len(web.asked) == 1


def put(s3, **objects):
    for name, text in objects.items():
        s3.client.put_object(Bucket=s3.bucket, Key=name.replace("__", "/") + ".txt", Body=text.encode())


@pytest.mark.slow
def test_objects_prefixes_and_globs_of_s3(s3, tmp_path):
    put(s3, in__a="A", in__b="B", in__deep__c="C", inside="D")
    s3.client.put_object(Bucket=s3.bucket, Key="in/no.md", Body=b"E")

    def texts(source):
        return [path.read_text() for path in find_files(f"s3://{s3.bucket}/{source}", (".txt",), tmp_path)]

    assert texts("in/a.txt") == ["A"]
    assert texts("in/no.md") == ["E"]
    assert texts("in") == texts("in/") == ["A", "B", "C"]
    assert texts("in/[b-z]*.txt") == ["B", "C"]
    assert sorted(texts("")) == ["A", "B", "C", "D"]
    with pytest.raises(DataError, match="no such object, nor one below it"):
        texts("nowhere")


def test_a_corpus_in_s3_is_prepared(s3, tmp_path):
    for i in range(20):
        put(s3, **{f"train__pos__{i}_7": f"Review {i} is good. It is number {i}."})
    facts = prepare(
        PrepareConfig(corpus="imdb", source=(f"s3://{s3.bucket}",), out=tmp_path / "data", validation_fraction=0.3)
    )
    assert facts["documents"] == 20
    assert not (tmp_path / "data" / ".work").exists()


@pytest.mark.slow
def test_errors_of_s3_are_for_people(s3, tmp_path, monkeypatch):
    put(s3, a="A")
    with pytest.raises(DataError, match="no such object or bucket"):
        find_files("s3://no-such-bucket-here/x", (".txt",), tmp_path)
    with pytest.raises(UsageError, match="not an S3 address"):
        find_files("s3://", (".txt",), tmp_path)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UsageError, match="access refused"):
        find_files(f"s3://{s3.bucket}/a.txt", (".txt",), tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="check the endpoint"):
        find_files(f"s3://{s3.bucket}/a.txt", (".txt",), tmp_path)
