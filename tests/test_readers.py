"""Every kind of source is read, limited, and checked; errors name the file and the row."""

import bz2
import csv
import gzip
import json
import lzma
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import imdb_review_folder

from babybert.config import PrepareConfig
from babybert.corpus import documents as documents_module
from babybert.corpus import imdb
from babybert.corpus.documents import DemoCorpus, LimitedCorpus, open_corpus
from babybert.corpus.download import Download
from babybert.corpus.files import BadRows
from babybert.corpus.labelled import LabelledColumns, read_labelled
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


def test_reviews_with_upper_case_endings_or_compressed_are_read(folder: Path, tmp_path: Path) -> None:
    train = folder / "aclImdb/train/pos"
    (train / "0_7.txt").rename(train / "0_7.TXT")
    (train / "4_7.txt").unlink()
    (train / "4_7.txt.gz").write_bytes(gzip.compress(TEXTS[4].encode()))
    assert sorted(read(tmp_path, "imdb", folder)) == TEXTS
    assert {row.label for row in read_labelled("imdb", (str(folder),), LabelledColumns("text", "label"))} == {
        "pos",
        "neg",
    }


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


GOOD_LINE = b'{"text": "good"}\n'


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
            b'{"text": "good"}\n' + b"[" * 100_000 + b'\n{"text": "good"}',
            "line 2: not JSON: nested too deeply",
        ),
        (
            "jsonl",
            b'{"text": "good"}\n{"a": ' + b"9" * 5000 + b'}\n{"text": "good"}',
            "line 2: no key 'text'; it has a",
        ),
        (
            "jsonl",
            b'{"text": "good"}\n{"text": "a", "text": "b"}\n{"text": "good"}',
            "line 2: has the key 'text' 2 times",
        ),
        ("jsonl", b'{"text": "good"}\n{"a\\n\\u001b": ""}\n{"text": "good"}', r"line 2: no key 'text'; it has a\n\x1b"),
        ("jsonl", b'{"text": "good"}\n{"text": NaN}\n{"text": "good"}', "line 2: 'text' is not a string"),
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
        ("t.csv", b"\n\n"),
        ("t.csv", b'a,text\n1,"open'),
        ("t.csv", b'"text'),
        ("t.csv", b'"te"xt,a\nb,c\n'),
        ("t.csv", "text\na\n".encode("utf-16-le")),
        ("t.csv", b"a,text,text\n1,2,3\n"),
        ("t.csv", b"PAR1\x15\x04"),
        ("t.csv", b"PK\x03\x04"),
        ("t.csv", gzip.compress(b"text\na\n", mtime=0)),
        ("t.csv", b"text\ra\rb\r"),
        ("t.csv.gz", b"x"),
        ("t.csv.bz2", b"x"),
        ("t.csv.xz", b"x"),
        ("t.jsonl.zst", b"x"),
        ("t.jsonl", b"[" * 100_000),
        ("t.json", b'[{"text": "a"},'),
        ("t.json", b'[{"text": "a"} {"text": "b"}]'),
        ("t.json", b'[{"text": "a"}]\n{"text": "b"}'),
        ("t.json", b'[{"text": "\xff"}]'),
        ("t.json", b'[{"text": "a}]'),
        ("t.parquet", b""),
        ("t.parquet", b"PAR1xPAR1"),
    ],
)
def test_a_bad_file_is_refused_or_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, content: bytes
) -> None:
    corpus = "jsonl" if ".json" in name else name.split(".")[1]
    (tmp_path / name).write_bytes(content)
    for skip in (False, True):  # the only file: there is nothing to go on with
        with pytest.raises(DataError, match=rf"{name}: ") as error:
            rows = read(tmp_path, corpus, tmp_path / name, bad_rows=BadRows(skip))
            assert rows == ["a"]  # those before the damage
            raise DataError(f"{name}: bad from there on")
        assert "\n" not in str(error.value)
        assert str(error.value).isprintable()
    good = tmp_path / f"good.{corpus}"
    if corpus == "parquet":
        pd.DataFrame({"text": ["good"]}).to_parquet(good)
    else:
        good.write_text("text\ngood\n" if corpus == "csv" else '{"text": "good"}')
    bad_rows = BadRows(skip=True)
    assert read(tmp_path, corpus, tmp_path / name, good, bad_rows=bad_rows)[-1:] == ["good"]
    assert bad_rows.files == [str(tmp_path / name)]
    assert f"skipped a file, except for rows before the damage: {tmp_path / name}: " in caplog.text


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt"])
def test_a_truncated_file_is_refused_and_the_rows_before_are_kept(tmp_path: Path, suffix: str, kind: str) -> None:
    texts = [os.urandom(500).hex() for _ in range(400)]
    row = {"csv": "{}\n", "jsonl": '{{"text": "{}"}}\n', "txt": "{}\n\n"}[kind]
    content = ("text\n" if kind == "csv" else "") + "".join(map(row.format, texts))
    path = tmp_path / f"t.{kind}{suffix.upper()}"
    half = len(content) // 2
    compressed = b"".join(COMPRESSIONS[suffix](part.encode()) for part in (content[:half], content[half:]))
    corpus = "text" if kind == "txt" else kind
    for size in (len(compressed) - 1, len(compressed) * 3 // 4):
        path.write_bytes(compressed[:size])
        with pytest.raises(DataError, match=rf"t.{kind}{suffix.upper()}: damaged"):
            read(tmp_path, corpus, path, documents="blank-lines")
        rows = [
            read(tmp_path, corpus, path, bad_rows=BadRows(skip=True), documents="blank-lines", limit=99_999)
            for _ in range(2)
        ]
        assert rows[0] == rows[1]
        assert [text.strip() for text in rows[0]] == texts[: len(rows[0])]
        assert len(rows[0]) > 0.3 * len(texts)
    path.write_bytes(compressed)
    assert [text.strip() for text in read(tmp_path, corpus, path, documents="blank-lines")] == texts


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_other_encodings_are_recognized_by_their_byte_order_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, suffix: str
) -> None:
    monkeypatch.setattr("babybert.corpus.files.CHUNK_BYTES", 5)
    texts = ["plain", "caf\u00e9 \U0001f600\u2028 \u0a0a"]
    content = {
        "csv": "text\n" + "".join(f'"{text}"\n' for text in texts),
        "jsonl": "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts),
        "json": json.dumps([{"text": text} for text in texts], ensure_ascii=False),
        "txt": "\n\n".join(texts),
    }
    for kind, text in content.items():
        path = tmp_path / f"{kind}.{kind}{suffix}"
        path.write_bytes(gzip.compress(text.encode(encoding)) if suffix else text.encode(encoding))
        corpus = {"txt": "text", "json": "jsonl"}.get(kind, kind)
        assert [row.strip("\n") for row in read(tmp_path, corpus, path, documents="blank-lines")] == texts
    (tmp_path / "cut.txt").write_bytes("text".encode("utf-16")[:-1])
    with pytest.raises(DataError, match=r"cut\.txt: damaged"):
        read(tmp_path, "text", tmp_path / "cut.txt")


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_header_decides_about_the_delimiter(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "t.csv"
    header = ["an, odd; name | with\nall", "text", "n"]
    rows = [["x", "one, two; three | four\tfive", "1"], ["y", 'a "quoted" word\n', "2"]]
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([header, *rows])
    texts = [row[1] for row in rows]
    assert read(tmp_path, "csv", path) == texts
    assert read(tmp_path, "csv", path, delimiter=delimiter if delimiter != "\t" else "tab") == texts
    wrong: Any = ";" if delimiter == "," else ","
    with pytest.raises(DataError, match=r"no column 'text'|not CSV"):
        read(tmp_path, "csv", path, delimiter=wrong)
    with pytest.raises(DataError, match=r"no column 'title'; it has .*all, text, n; choose one with --text-column"):
        read(tmp_path, "csv", path, text_column="title")


def test_a_csv_with_one_column_may_have_any_delimiter_in_its_texts(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("\ntext\na;b\tc|d\n\nNaN\n")
    assert read(tmp_path, "csv", tmp_path / "t.csv") == ["a;b\tc|d", "NaN"]
    (tmp_path / "header.csv").write_text("text,label\n")
    assert read(tmp_path, "csv", tmp_path / "header.csv") == []
    (tmp_path / "long.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert read(tmp_path, "csv", tmp_path / "long.csv") == ["x" * 200_000]


def test_an_array_of_objects_is_read_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*UNUSUAL_TEXTS, "]", "[1, 2", "x" * 50]
    rows = [{"id": [index, {"text": "inner"}], "text": text} for index, text in enumerate(texts)]
    for chunk_bytes in (1, 2, 7, 1 << 20):
        monkeypatch.setattr("babybert.corpus.files.CHUNK_BYTES", chunk_bytes)
        for indent in (None, 2):
            (tmp_path / "t.json").write_text("\n " + json.dumps(rows, indent=indent) + "\n")
            assert read(tmp_path, "jsonl", tmp_path / "t.json") == texts
        (tmp_path / "t.json").write_text('[7, {"text": "good"}, 12]')
        bad_rows = BadRows(skip=True)
        assert read(tmp_path, "jsonl", tmp_path / "t.json", bad_rows=bad_rows) == ["good"]
        assert bad_rows.count == 2
        (tmp_path / "t.json").write_text(" [ ] ")
        assert read(tmp_path, "jsonl", tmp_path / "t.json") == []
        (tmp_path / "t.json").write_text('[{"text": "a"}, {"text": nul}]')
        with pytest.raises(DataError, match="element 2 of the array: not JSON"):
            read(tmp_path, "jsonl", tmp_path / "t.json")


def test_texts_of_every_arrow_type_are_read(tmp_path: Path) -> None:
    texts = ["one", "two", None, "one"]
    text_types = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
    for index, text_type in enumerate(text_types):
        path = tmp_path / f"{index}.parquet"
        pq.write_table(pa.table({"text": pa.array(texts).cast(text_type)}), path)
        bad_rows = BadRows(skip=True)
        assert read(tmp_path, "parquet", path, bad_rows=bad_rows) == ["one", "two", "one"]
        assert bad_rows.count == 1
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "no-rows.parquet")
    assert read(tmp_path, "parquet", tmp_path / "no-rows.parquet") == []


def not_utf8(text_type: pa.DataType) -> pa.Array:
    """Three texts, of which the second is Latin-1."""
    array = pa.array([b"good", "caf\u00e9".encode("latin-1"), b"good"])
    return array.view(pa.string()) if text_type == pa.string() else array.view(pa.string()).cast(text_type)


@pytest.mark.parametrize("text_type", [pa.string(), pa.dictionary(pa.int32(), pa.string())])
def test_text_in_parquet_that_is_not_utf8_is_named_or_skipped(tmp_path: Path, text_type: pa.DataType) -> None:
    pq.write_table(pa.table({"text": not_utf8(text_type)}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet: row 2: byte 3 is not UTF-8"):
        read(tmp_path, "parquet", tmp_path / "t.parquet")
    bad_rows = BadRows(skip=True)
    assert read(tmp_path, "parquet", tmp_path / "t.parquet", bad_rows=bad_rows) == ["good", "good"]
    assert bad_rows.count == 1


def test_a_truncated_parquet_file_and_a_column_that_is_there_twice_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pd.DataFrame({"text": [os.urandom(50).hex() for _ in range(5000)]}).to_parquet(path, row_group_size=1000)
    content = path.read_bytes()
    for size in (len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match=r"t\.parquet: damaged"):
            read(tmp_path, "parquet", path)
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(30_000) + content[middle + 30_000 :])
    assert 0 < len(read(tmp_path, "parquet", path, bad_rows=BadRows(skip=True))) < 5000
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    with pytest.raises(DataError, match="has column 'text' 2 times"):
        read(tmp_path, "parquet", path)


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
