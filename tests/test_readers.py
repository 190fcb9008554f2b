"""Every kind of source is read, limited, and checked; errors name the file and the row."""

import gzip
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import zstandard
from conftest import imdb_review_folder

from babybert.config import PrepareConfig
from babybert.corpus import documents as documents_module
from babybert.corpus import imdb
from babybert.corpus.documents import DemoCorpus, LimitedCorpus, open_corpus
from babybert.corpus.download import Download
from babybert.corpus.files import BadRows
from babybert.data.prepare import prepare
from babybert.errors import DataError, StorageError

TEXTS = [f"Review number {i}. It has two sentences." for i in range(8)]


def read(tmp_path: Path, corpus: Any, *sources: Path, bad_rows: BadRows | None = None, **settings: Any) -> list[str]:
    """The texts of a corpus."""
    config = PrepareConfig(corpus=corpus, source=tuple(map(str, sources)), **settings)
    opened = open_corpus(config, tmp_path / "work", bad_rows or BadRows())
    return [document.text for document in opened.documents("read")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return imdb_review_folder(tmp_path / "extracted", TEXTS)


@pytest.fixture
def archive(folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "aclImdb_v1.tar.gz"
    (folder / "aclImdb/train/unsup").mkdir()
    (folder / "aclImdb/train/unsup/0_0.txt").write_text("Unlabelled.")
    (folder / "aclImdb/README").write_text("Not a review.")
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder / "aclImdb", "aclImdb")
    return path


def test_archive_folder_and_table_give_the_same_labelled_reviews(folder: Path, archive: Path, tmp_path: Path) -> None:
    assert sorted(read(tmp_path, "imdb", archive)) == TEXTS
    assert sorted(read(tmp_path, "imdb", folder)) == TEXTS
    assert sorted(read(tmp_path, "imdb", folder / "aclImdb")) == TEXTS
    pd.DataFrame({"review": TEXTS, "sentiment": "positive"}).to_csv(tmp_path / "IMDB Dataset.csv", index=False)
    assert read(tmp_path, "imdb", tmp_path / "IMDB Dataset.csv") == TEXTS


def test_archive_and_folder_make_the_same_data(folder: Path, archive: Path, tmp_path: Path) -> None:
    of_folder, of_archive = (
        prepare(
            PrepareConfig(corpus="imdb", source=(str(source),), out=tmp_path / f"data-{name}", validation_fraction=0.4)
        )
        for name, source in (("folder", folder), ("archive", archive))
    )
    assert of_folder["shards"] == of_archive["shards"]
    assert of_folder["files"] == of_archive["files"]


def test_a_truncated_archive_is_refused(archive: Path, tmp_path: Path) -> None:
    content = archive.read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 20):
        archive.write_bytes(content[:size])
        with pytest.raises(DataError, match=r"aclImdb_v1\.tar\.gz: damaged|no reviews"):
            read(tmp_path, "imdb", archive)


def test_a_source_without_reviews_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path, "imdb", tmp_path / "nowhere")
    (tmp_path / "x.tar.gz").write_text("hello")
    with pytest.raises(DataError, match="damaged, or not what its name says"):
        read(tmp_path, "imdb", tmp_path / "x.tar.gz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no files that end in .txt"):
        read(tmp_path, "imdb", tmp_path / "empty")
    (tmp_path / "empty" / "other.txt").write_text("no review")
    with pytest.raises(DataError, match="not IMDB's reviews"):
        read(tmp_path, "imdb", tmp_path / "empty")


def test_text_files_folders_and_globs(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.txt", "no.md"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    assert read(tmp_path, "text", tmp_path / "in") == ["a.txt", "b.txt", "deep/c.txt"]
    assert read(tmp_path, "text", tmp_path / "in" / "b.txt", tmp_path / "in" / "a.txt") == ["b.txt", "a.txt"]
    assert read(tmp_path, "text", tmp_path / "in" / "[a-b].*") == ["a.txt", "b.txt"]
    assert read(tmp_path, "text", tmp_path / "in" / "**" / "c.txt") == ["deep/c.txt"]
    assert read(tmp_path, "text", tmp_path / "in" / "no.md") == ["no.md"]


def test_blank_lines_separate_documents(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes("\ufeffone\r\nstill one\r\n \t\r\n\r\ntwo".encode())
    assert read(tmp_path, "text", tmp_path / "t.txt", documents="blank-lines") == ["one\r\nstill one\r\n", "two"]
    assert read(tmp_path, "text", tmp_path / "t.txt") == ["one\r\nstill one\r\n \t\r\n\r\ntwo"]


UNUSUAL_TEXTS = ["plain", "with, comma", 'with "quotes"', "with\nline\r\nbreaks", "caf\u00e9 \U0001f600", ""]


@pytest.mark.parametrize("compress", [None, gzip.compress, zstandard.ZstdCompressor().compress])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_columns_of_tables(tmp_path: Path, kind: str, compress: Callable[[bytes], bytes] | None) -> None:
    frame = pd.DataFrame(
        {"n": range(len(UNUSUAL_TEXTS)), "text": UNUSUAL_TEXTS, "body": [text + "!" for text in UNUSUAL_TEXTS]}
    )
    path = tmp_path / f"t.{kind}"
    if kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path, row_group_size=2)
    if compress:
        if kind == "parquet":
            pytest.skip("Parquet compresses itself")
        content = path.read_bytes()
        path.unlink()
        path = path.with_name(path.name + (".gz" if compress is gzip.compress else ".zst"))
        path.write_bytes(compress(content))
    assert read(tmp_path, kind, path) == UNUSUAL_TEXTS
    assert read(tmp_path, kind, tmp_path, text_column="body") == [text + "!" for text in UNUSUAL_TEXTS]
    with pytest.raises(DataError, match=r"'title'.*it has n, text, body.*--text-column"):
        read(tmp_path, kind, path, text_column="title")


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("csv", b"n,text\n1,good\n2,caf\xe9\n3,good\n", "row 2: line 3, byte 5 of the line, is not UTF-8"),
        ("csv", b"n,text\n1,good\n2\n3,good\n", "row 2: has 1 cells, the header has 2"),
        ("csv", b"n,text\n1,good\n2,a,b\n3,good\n", "row 2: has 3 cells, the header has 2"),
        ("jsonl", b'{"text": "good"}\n{"text": \n\n{"text": "good"}', "line 2: not JSON"),
        ("jsonl", b'{"text": "good"}\n{"text": "\xff"}\n{"text": "good"}', "line 2: byte 10 of the line is not UTF-8"),
        ("jsonl", b'{"text": "good"}\n[1]\n{"text": "good"}', "line 2: not a JSON object"),
        ("jsonl", b'{"text": "good"}\n{"texts": ""}\n{"text": "good"}', "line 2: no key 'text'; it has texts"),
        ("jsonl", b'{"text": "good"}\n{"text": 3}\n{"text": "good"}', "line 2: 'text' is not a string"),
        (
            "jsonl",
            b'{"text": "good"}\n{"text": "a\\ud800"}\n{"text": "good"}',
            "line 2: character 1 is half of a surrogate pair",
        ),
    ],
)
def test_a_bad_row_is_named_or_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, content: bytes, message: str
) -> None:
    path = tmp_path / f"t.{kind}"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read(tmp_path, kind, path)
    assert str(error.value).startswith(f"{path}: {message}")
    bad_rows = BadRows(skip=True)
    assert read(tmp_path, kind, path, bad_rows=bad_rows) == ["good", "good"]
    assert bad_rows.count == 1
    assert f"skipped: {path}: {message}" in caplog.text


def test_a_missing_text_in_parquet_is_named_or_skipped(tmp_path: Path) -> None:
    pd.DataFrame({"text": ["a", None, "b"]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t.parquet: row 2: 'text' is missing"):
        read(tmp_path, "parquet", tmp_path / "t.parquet")
    assert read(tmp_path, "parquet", tmp_path / "t.parquet", bad_rows=BadRows(skip=True)) == ["a", "b"]
    pd.DataFrame({"text": [1, 2]}).to_parquet(tmp_path / "n.parquet")
    with pytest.raises(DataError, match="column 'text' holds int64, not text"):
        read(tmp_path, "parquet", tmp_path / "n.parquet")


def test_a_file_that_is_not_utf8_is_named_or_skipped(folder: Path, tmp_path: Path) -> None:
    (folder / "aclImdb/train/pos/9_9.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"train/pos/9_9.txt: byte 3 is not UTF-8"):
        read(tmp_path, "imdb", folder)
    assert sorted(read(tmp_path, "imdb", folder, bad_rows=BadRows(skip=True))) == TEXTS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b""),
        ("t.csv", b'a,text\n1,"open'),
        ("t.csv.gz", b"x"),
        ("t.jsonl.zst", b"x"),
        ("t.parquet", b""),
        ("t.parquet", b"PAR1xPAR1"),
    ],
)
def test_a_damaged_file_is_refused_even_if_bad_rows_are_skipped(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    for skip in (False, True):
        with pytest.raises(DataError, match=name):
            read(tmp_path, name.split(".")[1], tmp_path / name, bad_rows=BadRows(skip))


def test_a_truncated_gz_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(os.urandom(2000).hex().encode())[:-9])
    with pytest.raises(DataError, match=r"t.txt.gz: damaged"):
        read(tmp_path, "text", tmp_path / "t.txt.gz")


def test_a_limit_takes_the_first_or_spreads_over_a_sorted_corpus(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    assert read(tmp_path, "jsonl", tmp_path / "t.jsonl", limit=3) == TEXTS[:3]
    assert read(tmp_path, "jsonl", tmp_path / "t.jsonl", limit=99) == TEXTS
    all_texts = read(tmp_path, "imdb", folder)
    assert read(tmp_path, "imdb", folder, limit=4) == all_texts[::2]
    assert read(tmp_path, "imdb", folder, limit=99) == all_texts


def test_a_limited_corpus_can_be_read_again(tmp_path: Path) -> None:
    corpus = LimitedCorpus(DemoCorpus(10, 0), 4, spread=True)
    assert list(corpus.documents("a")) == list(corpus.documents("b"))


def test_without_a_source_the_public_archive_is_downloaded(
    tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = []

    def download(source: Download, folder: Path) -> Path:
        downloads.append((source, folder))
        return archive

    monkeypatch.setattr(documents_module, "download", download)
    assert sorted(read(tmp_path, "imdb", download_folder=tmp_path / "downloads")) == TEXTS
    assert downloads == [(imdb.ARCHIVE, tmp_path / "downloads")]


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imdb, "ARCHIVE", Download("http://127.0.0.1:9/aclImdb_v1.tar.gz", 5, ""))
    monkeypatch.setattr("babybert.corpus.download.time.sleep", lambda seconds: None)
    with pytest.raises(StorageError, match=r"0 of 5 bytes downloaded.*--source"):
        read(tmp_path, "imdb", download_folder=tmp_path / "downloads")


def test_imdb_has_the_vocabulary_of_the_reference(tmp_path: Path) -> None:
    source = os.environ.get("BABYBERT_TEST_IMDB")
    if not source:
        pytest.skip("set BABYBERT_TEST_IMDB to the IMDB archive to run this: it is not part of the project")
    facts = prepare(PrepareConfig(corpus="imdb", source=(source,), out=tmp_path))
    assert facts["vocabulary"] == 147_161
    assert facts["tokens"] == 13_383_103
