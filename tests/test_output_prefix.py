"""`prepare --out s3://...` with a real S3 server: the bytes of a folder, one writer, no half dataset, no lost work."""

import dataclasses
import hashlib
import json
import os
import re
import resource
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import S3, run_until_killed
from engine_corpus import corpus_config, make_many_batches
from faulty_proxy import FaultyProxy, Refusal, S3Proxy, S3Request, access_denied, allow, deny, pass_all
from processes import babybert_command, run_babybert

from babybert import s3_lease
from babybert.config import PrepareConfig
from babybert.data import output_prefix
from babybert.data.digest import sha256
from babybert.data.prepare import prepare
from babybert.errors import DataError, StorageError, UsageError, UserError
from babybert.s3 import list_keys
from babybert.s3_lease import Lease, LeaseLost

DEMO = PrepareConfig(demo_documents=80, validation_fraction=0.2)
DEMO_FLAGS = ["prepare", "--demo-documents=80", "--validation-fraction=0.2"]
RIGHTS = ("s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload")
OTHER_OWNER = {"owner": "x", "host": "elsewhere", "process": 1, "seconds": 60.0}


@pytest.fixture
def out(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty prefix. Temporary files are below `tmp_path`."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    return f"s3://{s3.bucket}/data/one"


def objects(s3: S3, folder: str = "data/one/") -> dict[str, str]:
    """The SHA-256 of each object below a prefix."""
    digests = {}
    for key, _ in list_keys(s3.client, s3.bucket, folder):
        content = s3.client.get_object(Bucket=s3.bucket, Key=key)["Body"].read()
        digests[key.removeprefix(folder)] = hashlib.sha256(content).hexdigest()
    return digests


def files(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a dataset; other tests may have made a cache in `demo_folder`."""
    return {path.name: sha256(path) for path in folder.iterdir() if path.is_file()}


def etags(s3: S3) -> dict[str, tuple[str, Any]]:
    """What an object that is written again would not keep: its ETag and time."""
    found = s3.client.list_objects_v2(Bucket=s3.bucket).get("Contents", [])
    return {entry["Key"]: (entry["ETag"], entry["LastModified"]) for entry in found}


@pytest.mark.parametrize("file_format", ["csv", "parquet"])
def test_the_objects_are_the_files_of_a_folder(s3: S3, out: str, tmp_path: Path, file_format: Any) -> None:
    config = dataclasses.replace(DEMO, format=file_format)
    assert prepare(dataclasses.replace(config, out=out)) == prepare(dataclasses.replace(config, out=tmp_path / "data"))
    assert objects(s3) == files(tmp_path / "data")
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_upload_the_bytes_of_a_folder(
    s3: S3, out: str, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_many_batches(monkeypatch)
    config = dataclasses.replace(corpus_config(tmp_path / "corpus", "jsonl"), workers=workers)
    prepare(dataclasses.replace(config, out=tmp_path / "data"))
    facts = prepare(dataclasses.replace(config, out=out))
    assert len(facts["shards"]["train"]) > 1
    assert objects(s3) == files(tmp_path / "data")


def test_tables_are_imported(s3: S3, out: str, tmp_path: Path, demo_folder: Path) -> None:
    config = PrepareConfig(
        corpus="table",
        tokenizer=demo_folder / "tokenizer.json",
        source=(str(demo_folder / "train-00000.csv"),),
        validation_source=(str(demo_folder / "validation-00000.csv"),),
    )
    for place in (tmp_path / "data", out):
        prepare(dataclasses.replace(config, out=place))
    assert objects(s3) == files(tmp_path / "data")


@pytest.mark.slow
def test_the_command_prints_what_it_prints_for_a_folder(s3: S3, out: str, tmp_path: Path) -> None:
    """Also for a whole bucket."""
    outputs = []
    for place in (str(tmp_path / "data"), f"s3://{s3.bucket}/"):
        done = run_babybert(*DEMO_FLAGS, f"--out={place}")
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.replace(place, "PLACE"))
    assert outputs[0] == outputs[1]
    assert objects(s3, "") == files(tmp_path / "data")


def test_prepared_data_is_replaced_only_with_overwrite(s3: S3, out: str, demo_folder: Path) -> None:
    """What the new dataset does not name is deleted; what is no shard stays."""
    for name in ("dataset.json", "train-00000.csv", "train-00007.parquet"):
        s3.client.put_object(Bucket=s3.bucket, Key=f"data/one/{name}", Body=b"earlier")
    for key in ("data/one/train-notes/a.txt", "data/one/readme.txt", "data/one2/train-00007.csv"):
        s3.client.put_object(Bucket=s3.bucket, Key=key, Body=b"other")
    before = etags(s3)
    with pytest.raises(UsageError, match="has prepared data already; add --overwrite to replace it"):
        prepare(dataclasses.replace(DEMO, out=out))
    assert etags(s3) == before
    prepare(dataclasses.replace(DEMO, out=out, overwrite=True))
    other = {"train-notes/a.txt", "readme.txt"}
    assert {name: digest for name, digest in objects(s3).items() if name not in other} == files(demo_folder)
    assert other < objects(s3).keys()
    assert objects(s3, "data/one2/").keys() == {"train-00007.csv"}


def uploads(proxy: S3Proxy) -> int:
    """How many shards were uploaded."""
    return sum(is_upload(request) for request in proxy.requests)


def is_upload(request: S3Request) -> bool:
    return request.method == "PUT" and bool(re.search(r"/\.partial/[0-9a-f]{32}$", request.path))


@pytest.mark.parametrize(
    ("function", "calls", "finished"),
    [
        ("babybert.data.output_prefix:OutputPrefix.write_record", 2, 1),  # the second shard is uploaded
        ("babybert.data.output_prefix:OutputPrefix._copy", 2, 2),
        ("babybert.s3_prefix:S3Prefix.put_new", 1, 2),
    ],
)
@pytest.mark.slow
def test_a_killed_command_leaves_no_dataset_and_the_same_command_goes_on(
    s3: S3, out: str, s3_proxy: S3Proxy, demo_folder: Path, function: str, calls: int, finished: int
) -> None:
    """The killed one has left its lease and its temporary folder."""
    run_until_killed(function, calls, *DEMO_FLAGS, f"--out={out}")
    assert "dataset.json" not in objects(s3)
    assert ".lock" in objects(s3)
    s3_proxy.requests.clear()
    prepare(dataclasses.replace(DEMO, out=out))
    assert uploads(s3_proxy) == 2 - finished
    assert objects(s3) == files(demo_folder)
    assert list(Path(os.environ["TMPDIR"]).iterdir()) == []


def interrupt(config: PrepareConfig) -> None:
    """Prepare data, and press Ctrl-C when all shards are finished."""

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_prefix.OutputPrefix, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)


@pytest.mark.slow
def test_only_intact_shards_of_the_same_data_are_used_again(
    s3: S3, out: str, s3_proxy: S3Proxy, demo_folder: Path, tmp_path: Path
) -> None:
    interrupt(dataclasses.replace(DEMO, out=out))
    (record,) = [name for name in objects(s3) if name.startswith(".partial/train") and name.endswith(".record")]
    content = s3.client.get_object(Bucket=s3.bucket, Key=f"data/one/{record}")["Body"].read()
    facts = json.loads(content.partition(b"\n")[0])
    name = facts["place"][0]
    s3.client.put_object(Bucket=s3.bucket, Key=f"data/one/{name}", Body=b"x" * facts["facts"]["bytes"])
    s3_proxy.requests.clear()
    prepare(dataclasses.replace(DEMO, out=out))
    assert uploads(s3_proxy) == 1
    assert objects(s3) == files(demo_folder)

    interrupt(dataclasses.replace(DEMO, out=out, overwrite=True))
    other = dataclasses.replace(DEMO, max_positions=64)
    s3_proxy.requests.clear()
    prepare(dataclasses.replace(other, out=out, overwrite=True))
    assert uploads(s3_proxy) == 2
    prepare(dataclasses.replace(other, out=tmp_path / "other"))
    assert objects(s3) == files(tmp_path / "other")


def test_a_second_writer_is_refused(s3: S3, out: str) -> None:
    with Lease(s3.client, s3.bucket, "data/one/.lock", out, "--out", seconds=3.0):
        with pytest.raises(UserError, match=r"process \d+ on .* is writing there; stop it, or choose another --out"):
            prepare(dataclasses.replace(DEMO, out=out))
        assert objects(s3).keys() == {".lock"}
    assert UserError.exit_code == 1


def test_a_command_that_lost_its_lease_changes_nothing(s3: S3, out: str, s3_proxy: S3Proxy) -> None:
    """Another one takes over while the first shard is uploaded. What a worker still uploads has a new name."""
    s3.client.put_object(Bucket=s3.bucket, Key="data/one/dataset.json", Body=b"earlier")

    def take_over(request: S3Request) -> None:
        if is_upload(request):
            s3.client.put_object(Bucket=s3.bucket, Key="data/one/.lock", Body=json.dumps(OTHER_OWNER).encode())

    s3_proxy.rule = take_over
    with pytest.raises(LeaseLost, match="process 1 on elsewhere has taken over"):
        prepare(dataclasses.replace(DEMO, out=out, overwrite=True))
    first_upload = next(number for number, request in enumerate(s3_proxy.requests) if is_upload(request))
    changes = [request for request in s3_proxy.requests[first_upload + 1 :] if request.method not in ("GET", "HEAD")]
    assert all(map(is_upload, changes))
    assert {"dataset.json", ".lock"} < objects(s3).keys()


@pytest.mark.slow
def test_earlier_data_stays_if_the_command_fails(s3: S3, out: str, s3_proxy: S3Proxy, tmp_path: Path) -> None:
    prepare(dataclasses.replace(DEMO, out=out))
    before = etags(s3)
    (tmp_path / "t.jsonl").write_text('{"text": "too short"}\n' * 9)
    overwriting = dataclasses.replace(DEMO, out=out, overwrite=True, demo_documents=90)
    with pytest.raises(DataError, match="no sentence pairs"):
        prepare(dataclasses.replace(overwriting, corpus="jsonl", source=(str(tmp_path / "t.jsonl"),)))
    assert etags(s3) == before
    s3_proxy.rule = lambda request: access_denied(request) if is_upload(request) else None
    with pytest.raises(UsageError, match=r"upload from .*/\.partial/.*: access denied .* need the right s3:PutObject"):
        prepare(overwriting)
    assert etags(s3) == before


@pytest.mark.slow
def test_what_is_finished_is_used_after_s3_was_away(
    s3: S3, out: str, s3_proxy: S3Proxy, demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays away for longer than the command waits, from the second shard on."""
    monkeypatch.setattr(output_prefix, "RETRY_SECONDS", 0.1)
    s3_proxy.rule = lambda request: Refusal(503, "ServiceUnavailable") if uploads(s3_proxy) > 1 else None
    with pytest.raises(StorageError, match=r"ServiceUnavailable.*; try again"):
        prepare(dataclasses.replace(DEMO, out=out))
    assert "dataset.json" not in objects(s3)
    s3_proxy.rule = pass_all
    s3_proxy.requests.clear()
    monkeypatch.setattr(s3_lease, "_is_dead_process_of_this_host", lambda content: True)
    prepare(dataclasses.replace(DEMO, out=out))
    assert uploads(s3_proxy) == 1
    assert objects(s3) == files(demo_folder)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "method"), [("refuse", "write_record"), ("hang", "_copy")])
def test_a_command_waits_while_s3_is_away(
    s3: S3, out: str, s3_endpoint: str, mode: str, method: str, demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(s3_endpoint.rpartition(":")[2])
    proxy = FaultyProxy(("127.0.0.1", port))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("BABYBERT_S3_TIMEOUT", "1")
    original = getattr(output_prefix.OutputPrefix, method)

    def go_away_once(*arguments: Any) -> Any:
        if proxy.mode == "pass" and not timers:
            timers.append(threading.Timer(4, setattr, (proxy, "mode", "pass")))
            proxy.mode = mode
            timers[0].start()
        return original(*arguments)

    timers: list[threading.Timer] = []
    monkeypatch.setattr(output_prefix.OutputPrefix, method, go_away_once)
    try:
        prepare(dataclasses.replace(DEMO, out=out))
    finally:
        for timer in timers:
            timer.join()
        proxy.close()
    assert timers
    assert objects(s3) == files(demo_folder)


def test_these_rights_are_enough(s3: S3, out: str, s3_proxy: S3Proxy, demo_folder: Path) -> None:
    """Without the right to list uploads, those that were interrupted are not aborted."""
    s3_proxy.rule = allow(*RIGHTS)
    prepare(dataclasses.replace(DEMO, out=out))
    assert objects(s3) == files(demo_folder)


@pytest.mark.parametrize("right", RIGHTS)
def test_a_missing_right_is_named_before_the_work(s3: S3, out: str, s3_proxy: S3Proxy, right: str) -> None:
    s3_proxy.rule = deny(right)
    with pytest.raises(UsageError, match=f"{out}.*: access denied .* need the right {right}"):
        prepare(dataclasses.replace(DEMO, out=out, corpus="jsonl", source=("no-such-file",)))


def test_an_address_is_checked_before_the_work(s3: S3, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_source = PrepareConfig(corpus="jsonl", source=("no-such-file",))
    with pytest.raises(UsageError, match="not an S3 address"):
        PrepareConfig(out="s3:///data")
    with pytest.raises(DataError, match="no such object or bucket"):
        prepare(dataclasses.replace(without_source, out="s3://no-such-bucket/data"))
    for key, secret in (("read-key", "read-secret"), ("test-key", "wrong")):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        with pytest.raises(UsageError, match="access denied"):
            prepare(dataclasses.replace(without_source, out=out))


@pytest.mark.slow
def test_a_wrong_endpoint_is_an_error_at_once(s3: S3, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    start = time.monotonic()
    with pytest.raises(StorageError, match="check the endpoint and try again"):
        prepare(dataclasses.replace(DEMO, out=out))
    assert time.monotonic() - start < 100


@pytest.mark.slow
@pytest.mark.parametrize("limit", [50_000, 450_000])
def test_a_full_disk_is_reported_in_one_line(s3: S3, out: str, limit: int) -> None:
    """A limit on the size of files simulates the full disk: for the tokens, or for a shard."""
    done = subprocess.run(
        babybert_command("prepare", "--demo-documents=2000", f"--out={out}"),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1, done.stderr
    last_line = done.stderr.strip().splitlines()[-1]
    assert "cannot write temporary files: File too large; make room or set TMPDIR" in last_line
    assert objects(s3) == {}


def test_interrupted_uploads_are_aborted(s3: S3, out: str) -> None:
    """Those of a shard and of its copy; not those of others."""
    others = ["data/one/.partial/check-0", "data/one/notes.txt", "data/two/train-00000.csv"]
    for key in (f"data/one/.partial/{'0' * 32}", "data/one/train-00000.csv", *others):
        s3.client.create_multipart_upload(Bucket=s3.bucket, Key=key)
    prepare(dataclasses.replace(DEMO, out=out))
    left = s3.client.list_multipart_uploads(Bucket=s3.bucket)["Uploads"]
    assert sorted(upload["Key"] for upload in left) == others
