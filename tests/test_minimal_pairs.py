"""BLiMP's files: read alike from a folder, an archive and S3, and errors that name the file and the line."""

import io
import json
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import S3

from babybert.corpus import minimal_pairs
from babybert.corpus.minimal_pairs import MinimalPair, read_minimal_pairs
from babybert.errors import DataError


def row(good: str = "She sleeps.", bad: str = "She sleep.", **changes: Any) -> dict[str, Any]:
    """One row of a paradigm's file, with BLiMP's keys."""
    pair = {"sentence_good": good, "sentence_bad": bad, "field": "syntax", "UID": "agreement_1"}
    return {**pair, "linguistics_term": "subject_verb_agreement", "pairID": "0", **changes}


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in rows)


FILES = {
    "data/agreement_1.jsonl": lines(row(), row("He runs.", "He run.")),
    "data/animacy.jsonl": lines(row("She ate it.", "It ate it.", UID="animacy", linguistics_term="s-selection")),
    "data/._animacy.jsonl": b"\x00\x05\x16\x07",  # macOS adds such a file for each file
    "raw_results/models_summary.jsonl": lines({"UID": "agreement_1", "gpt2": 0.8}),
    "raw_results/gpt2_outputs.jsonl": lines(row(gpt2=-9.5)),  # a copy of a pair of data/agreement_1.jsonl
    "README.md": b"# BLiMP",
}


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def texts(pairs: list[MinimalPair]) -> list[tuple[str, str, str, str]]:
    return [(pair.good, pair.bad, pair.paradigm, pair.phenomenon) for pair in pairs]


EXPECTED = [
    ("He runs.", "He run.", "agreement_1", "subject_verb_agreement"),
    ("She sleeps.", "She sleep.", "agreement_1", "subject_verb_agreement"),
    ("She ate it.", "It ate it.", "animacy", "argument_structure"),
]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_folder(path / "blimp", FILES),
        lambda path: write_tar(path / "blimp.tar.gz", FILES),
        lambda path: write_tar(path / "blimp.TGZ", dict(reversed(FILES.items()))),
        lambda path: write_tar(path / "blimp.tar", FILES, "w"),
        lambda path: write_tar(path / "blimp.tar.xz", FILES, "w:xz"),
        lambda path: write_zip(path / "blimp.zip", FILES),
    ],
    ids=["folder", "tar.gz", "tgz", "tar", "tar.xz", "zip"],
)
def test_a_folder_and_all_archives_have_the_same_pairs(
    tmp_path: Path, write: Callable[[Path], Path], caplog: pytest.LogCaptureFixture
) -> None:
    assert texts(read_minimal_pairs(str(write(tmp_path)))) == EXPECTED
    assert "copies of pairs, which are left out: 1\n" in caplog.text
    assert "left out: 1, the first is" in caplog.text and "models_summary.jsonl" in caplog.text


def test_a_single_file_and_a_file_with_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + FILES["data/agreement_1.jsonl"])
    pairs = read_minimal_pairs(str(path))
    assert texts(pairs) == EXPECTED[:2]
    assert pairs[0].name == f"{path}: line 2"


def test_an_archive_in_s3(tmp_path: Path, s3: S3) -> None:
    s3.client.upload_file(str(write_zip(tmp_path / "blimp.zip", FILES)), s3.bucket, "data/blimp.zip")
    assert texts(read_minimal_pairs(f"s3://{s3.bucket}/data/blimp.zip")) == EXPECTED


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines(row()) + b"{oops\n", "x.jsonl: line 2: not JSON"),
        (lines(row()) + lines(["a"]), "x.jsonl: line 2: not a JSON object"),
        (lines(row()) + b"\xff\n", "x.jsonl: line 2: byte 0 of the line is not UTF-8"),
        (lines({"sentence_good": "A."}), "x.jsonl: line 1: no key 'sentence_bad'; it has sentence_good"),
        (lines(row(), {"text": "A."}), "x.jsonl: line 2: no key 'sentence_good'; it has text"),
        (lines({"sentence_good": "A.", "sentence_bad": "B."}), "x.jsonl: line 1: no key 'UID'"),
        (lines(row(sentence_bad=7)), "x.jsonl: line 1: 'sentence_bad' is not a string"),
        (lines(row(sentence_bad=" ")), "x.jsonl: line 1: 'sentence_bad' is empty"),
        (lines(row(UID="")), "x.jsonl: line 1: 'UID' is empty"),
        (lines(row(sentence_good="\ud800")), "x.jsonl: line 1: 'sentence_good' has half of a surrogate pair"),
        (b'{"sentence_good": "a", "sentence_good": "b"}', "x.jsonl: line 1: has a key more than once"),
        (lines(row(), row(linguistics_term="binding")), "'agreement_1' has the linguistics_term"),
        (lines({"text": "A film."}), "no minimal pairs: "),
        (b"", "no minimal pairs: "),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    for source in (
        write_folder(tmp_path / "folder", {"x.jsonl": content}),
        write_tar(tmp_path / "x.tar.gz", {"x.jsonl": content}),
        write_zip(tmp_path / "x.zip", {"x.jsonl": content}),
    ):
        with pytest.raises(DataError) as error:
            read_minimal_pairs(str(source))
        assert message in str(error.value) and str(source) in str(error.value)


def test_sources_without_pairs(tmp_path: Path) -> None:
    write_tar(tmp_path / "empty.tar.gz", {"a.txt": b"text"})
    write_zip(tmp_path / "empty.zip", {})
    (tmp_path / "zero.tar.gz").write_bytes(b"")
    (tmp_path / "page.zip").write_bytes(b"<html>not found</html>")
    (tmp_path / "page.tar.gz").write_bytes(b"<html>not found</html>")
    (tmp_path / "blimp.rar").write_bytes(b"Rar!")
    (tmp_path / "folder").mkdir()
    expected = {
        "empty.tar.gz": "it has no file that ends in .jsonl",
        "empty.zip": "it has no file that ends in .jsonl",
        "zero.tar.gz": "damaged",
        "page.zip": "damaged, or not a zip archive",
        "page.tar.gz": "damaged",
        "blimp.rar": "not a folder, a .jsonl file or an archive",
        "folder": "no files that end in .jsonl",
        "missing": "no such file or folder",
    }
    for name, message in expected.items():
        with pytest.raises(DataError) as error:
            read_minimal_pairs(str(tmp_path / name))
        assert message in str(error.value) and str(tmp_path / name) in str(error.value)


def test_links_devices_and_large_members_of_an_archive_do_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret.jsonl"
    secret.write_bytes(FILES["data/animacy.jsonl"])
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("a.jsonl", tarfile.SYMTYPE), ("b.jsonl", tarfile.LNKTYPE), ("c.jsonl", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(secret)
            archive.addfile(member)
        content = FILES["data/agreement_1.jsonl"]
        for name in ("/etc/agreement_1.jsonl", "x\n\x1b[31m.jsonl"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert texts(read_minimal_pairs(str(path))) == EXPECTED[:2]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hostile.tar", "secret.jsonl"]

    monkeypatch.setattr(minimal_pairs, "MOST_BYTES", 100)
    bomb = {"bomb.jsonl": b" " * 101}
    sources = (
        write_tar(tmp_path / "b.tar.gz", bomb),
        write_zip(tmp_path / "b.zip", bomb),
        write_folder(tmp_path, bomb),
    )
    for source in sources:
        with pytest.raises(DataError, match=r"bomb.jsonl: has 101 bytes, more than any file of BLiMP"):
            read_minimal_pairs(str(source / "bomb.jsonl" if source == tmp_path else source))


def test_equal_pairs_with_different_numbers_are_two(tmp_path: Path) -> None:
    files = {"a.jsonl": lines(row(pairID="0"), row(pairID="1")), "b.jsonl": lines(row(pairID="1"))}
    assert [pair.number for pair in read_minimal_pairs(str(write_folder(tmp_path, files)))] == ["0", "1"]


def test_too_many_pairs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minimal_pairs, "MOST_PAIRS", 2)
    with pytest.raises(DataError, match=r"jsonl: line 1: more than 2 pairs in all"):
        read_minimal_pairs(str(write_folder(tmp_path / "blimp", FILES)))


@pytest.mark.parametrize("write", [write_tar, write_zip], ids=["x.tar.gz", "x.zip"])
def test_a_damaged_archive_is_a_data_error(
    tmp_path: Path, write: Callable[[Path, dict[str, bytes]], Path], request: pytest.FixtureRequest
) -> None:
    path = write(tmp_path / request.node.callspec.id, FILES)
    whole = path.read_bytes()
    rng = random.Random(0)
    damaged = [whole[: len(whole) // 2], whole[:-9]]
    for _ in range(300):
        flipped = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3))):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    failures = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            read_minimal_pairs(str(path))  # a changed time or comment does no harm
        except DataError as error:
            failures += 1
            assert str(path) in str(error)
    assert failures > 100


def test_an_encrypted_zip_says_so(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {"a.jsonl": FILES["data/animacy.jsonl"]})
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flags of both headers
        content[content.index(signature) + offset] |= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x.zip: cannot be unpacked \(.*password"):
        read_minimal_pairs(str(path))
