"""Sources in S3 are fetched one at a time while they are read, named by their address, and never skipped by mistake."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import S3
from engine_corpus import BAD_ROWS, corpus_config, make_many_batches
from faulty_proxy import Refusal, S3Proxy, S3Request, access_denied

from babybert.config import PrepareConfig
from babybert.corpus.documents import open_corpus
from babybert.corpus.files import BadRows
from babybert.corpus.s3_file import S3File
from babybert.data.prepare import prepare
from babybert.errors import DataError, StorageError, UsageError


def put_documents(s3: S3, *keys: str, rows: int = 3) -> None:
    for key in keys:
        lines = [json.dumps({"text": f"Row {row} of {key}. It is good."}) for row in range(rows)]
        s3.client.put_object(Bucket=s3.bucket, Key=key, Body="\n".join(lines).encode())


def config_of(s3: S3, **settings: Any) -> PrepareConfig:
    return PrepareConfig(corpus="jsonl", source=(f"s3://{s3.bucket}/in",), validation_fraction=0.3, **settings)


def fetched(proxy: S3Proxy) -> list[str]:
    """The keys that were fetched."""
    paths = [request.path for request in proxy.requests if request.method == "GET"]
    return [path.rpartition("/")[2] for path in paths if path.endswith(".jsonl")]


def test_objects_are_fetched_one_after_the_other(s3: S3, s3_proxy: S3Proxy, tmp_path: Path) -> None:
    put_documents(s3, "in/a.jsonl", "in/b.jsonl", "in/c.jsonl")
    corpus = open_corpus(config_of(s3), tmp_path, BadRows())
    assert corpus.size == sum(file.size for file in corpus.files.paths if isinstance(file, S3File)) > 0
    documents = corpus.documents("read")
    assert fetched(s3_proxy) == []
    for row, key in enumerate("aaabbbccc"):
        assert next(documents).name == f"s3://{s3.bucket}/in/{key}.jsonl: line {row % 3 + 1}"
        assert fetched(s3_proxy) == [f"{name}.jsonl" for name in "abc"[: row // 3 + 1]]
        assert list(tmp_path.iterdir()) == []  # the copy has no name
    assert list(documents) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_workers_fetch_what_they_read(s3: S3, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_many_batches(monkeypatch)
    config = dataclasses.replace(corpus_config(tmp_path / "corpus", kind), tokenizer_kind="wordpiece", workers=2)
    expected = prepare(dataclasses.replace(config, out=tmp_path / "expected"))
    for path in config.source:
        s3.client.upload_file(path, s3.bucket, f"in/{Path(path).name}")
    facts = prepare(dataclasses.replace(config, source=(f"s3://{s3.bucket}/in",), out=tmp_path / "data"))
    assert facts["skipped_rows"] == BAD_ROWS
    assert facts["shards"] == expected["shards"]


def test_bad_rows_and_files_are_named_by_their_address(s3: S3, tmp_path: Path) -> None:
    put_documents(s3, "in/a.jsonl", rows=30)
    s3.client.put_object(Bucket=s3.bucket, Key="in/b.jsonl.gz", Body=b"not compressed")
    s3.client.put_object(Bucket=s3.bucket, Key="in/c.jsonl", Body=b"no JSON")
    with pytest.raises(DataError, match=rf"^s3://{s3.bucket}/in/b\.jsonl\.gz: damaged"):
        prepare(config_of(s3, out=tmp_path / "data"))
    facts = prepare(config_of(s3, out=tmp_path / "data", skip_bad_rows=True))
    assert facts["source_files"]["bad"] == [f"s3://{s3.bucket}/in/b.jsonl.gz"]
    assert facts["skipped_rows"] == 1


def test_an_object_that_cannot_be_fetched_is_not_a_bad_file(s3: S3, s3_proxy: S3Proxy, tmp_path: Path) -> None:
    """Otherwise `--skip-bad-rows` would leave it out, and the dataset would lack documents."""
    put_documents(s3, "in/a.jsonl", "in/b.jsonl", rows=30)
    config = config_of(s3, out=tmp_path / "data", skip_bad_rows=True)
    s3_proxy.rule = lambda request: access_denied(request) if request.path.endswith("b.jsonl") else None
    with pytest.raises(UsageError, match=rf"s3://{s3.bucket}/in/b.jsonl: access denied"):
        prepare(config)
    (tmp_path / "file").touch()
    corpus = open_corpus(config_of(s3, skip_bad_rows=True), tmp_path / "file", BadRows(skip=True))
    with pytest.raises(StorageError, match=rf"s3://{s3.bucket}/in/a.jsonl: cannot be copied to .*; make room there"):
        list(corpus.documents("read"))


@pytest.mark.slow
def test_reading_waits_while_s3_is_away(s3: S3, s3_proxy: S3Proxy, tmp_path: Path) -> None:
    """For longer than boto3 tries it."""
    put_documents(s3, "in/a.jsonl", "in/b.jsonl", rows=30)

    def refuse_some(request: S3Request) -> Refusal | None:
        attempts = sum(earlier.path.endswith("b.jsonl") for earlier in s3_proxy.requests)
        is_refused = request.path.endswith("b.jsonl") and attempts < 6
        return Refusal(503, "ServiceUnavailable") if is_refused else None

    s3_proxy.rule = refuse_some
    assert prepare(config_of(s3, out=tmp_path / "data"))["documents"] == 60
