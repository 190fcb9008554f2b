"""Every file of a source is found once, and what is left out is counted, on disk and in S3."""

import os
from pathlib import Path

import pytest
from conftest import S3

from babybert.cli import main
from babybert.config import PrepareConfig
from babybert.corpus.documents import open_corpus
from babybert.corpus.files import BadRows
from babybert.corpus.s3_file import SourceFile
from babybert.corpus.sources import SourceFiles, find_files
from babybert.data.dataset import open_dataset
from babybert.errors import DataError


def find(tmp_path: Path, *sources: object, suffixes: tuple[str, ...] = (".txt",)) -> SourceFiles:
    return find_files(list(map(str, sources)), suffixes, tmp_path / "work")


def write_files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def contents(found: SourceFiles) -> list[str]:
    return list(map(content, found.paths))


def content(path: SourceFile) -> str:
    """The text of a file, which is fetched if it is in S3."""
    with path.open("rb") as file:
        return str(file.read(), "utf-8")


def test_endings_match_in_upper_and_lower_case(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", "a.txt", "B.TXT", "c.Txt.GZ", "d.md", "e.MD", "f")
    found = find(tmp_path, folder, suffixes=(".txt", ".txt.gz"))
    assert contents(found) == ["B.TXT", "a.txt", "c.Txt.GZ"]
    assert found.left_out == {"other ending": 3}
    assert found.left_out_text() == "3 other ending (.md 2, none 1)"


def test_files_behind_links_are_found_once(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", "a.txt", "z/b.txt")
    elsewhere = write_files(tmp_path / "elsewhere", "c.txt", "deep/d.txt")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere / "deep")
    (folder / "also-z").symlink_to("z")  # sorts before the folder itself, which is searched first
    (folder / "up").symlink_to(tmp_path)
    (elsewhere / "loop").symlink_to(folder)
    (folder / "same.txt").symlink_to("a.txt")
    found = find(tmp_path, folder)
    assert sorted(contents(found)) == ["a.txt", "c.txt", "deep/d.txt", "z/b.txt"]
    assert folder / "z/b.txt" in found.paths
    assert found.left_out == {"found twice": 1, "link to a folder that is searched anyway": 4}
    assert found.paths == find(tmp_path, folder).paths == sorted(found.paths, key=str)


def test_a_file_of_two_sources_is_read_once(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", "a.txt", "b.txt")
    found = find(tmp_path, folder / "b.txt", folder, folder / "." / "a.txt", f"{folder}/*")
    assert contents(found) == ["b.txt", "a.txt"]
    assert found.left_out == {"found twice": 4}


def test_hidden_files_and_pipes_are_left_out(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", "a.txt", "._a.txt", ".ipynb_checkpoints/a.txt")
    os.mkfifo(folder / "pipe.txt")
    found = find(tmp_path, folder)
    assert contents(found) == ["a.txt"]
    assert found.left_out == {"hidden": 2, "not a regular file": 1}
    assert contents(find(tmp_path, folder / "._a.txt")) == ["._a.txt"]
    with pytest.raises(DataError, match="neither a file nor a folder"):
        find(tmp_path, folder / "pipe.txt")


def test_names_that_look_like_patterns_are_found(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in [1]", "a[1].txt", "a1.txt", "what?*.txt")
    assert contents(find(tmp_path, folder)) == ["a1.txt", "a[1].txt", "what?*.txt"]
    assert contents(find(tmp_path, folder / "a[1].txt")) == ["a[1].txt"]
    assert contents(find(tmp_path, folder / "what?*.txt")) == ["what?*.txt"]
    with pytest.raises(DataError, match=r"no file matches it as a pattern \(where \[\[\] stands for a \[\)"):
        find(tmp_path, folder / "*.txt")
    assert len(find(tmp_path, str(tmp_path / "in [[]1]" / "*.txt")).paths) == 3


def test_a_pattern_that_matches_folders_says_so(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", "a/b.txt", "c.txt")
    found = find(tmp_path, folder / "*")
    assert contents(found) == ["c.txt"]
    assert found.left_out == {"folder that a pattern matched": 1}
    with pytest.raises(DataError, match=r"no files .* left out: 1 folder that a pattern matched"):
        find(tmp_path, folder / "[a]")


def test_what_cannot_be_read_is_reported_or_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_files(tmp_path / "in", "a.txt", "c.txt")
    (folder / "b.txt").symlink_to("nowhere")
    (folder / "d.txt").symlink_to("d.txt")
    (folder / "nothing").symlink_to("nowhere")  # does not look like a document
    config = PrepareConfig(corpus="text", source=(str(folder),))
    with pytest.raises(DataError, match=r"b\.txt: cannot be read: No such file"):
        list(open_corpus(config, tmp_path, BadRows()).documents("read"))
    bad_rows = BadRows(skip=True)
    corpus = open_corpus(config, tmp_path, bad_rows)
    assert [document.text for document in corpus.documents("read")] == ["a.txt", "c.txt"]
    assert bad_rows.files == [str(folder / "b.txt"), str(folder / "d.txt")]
    assert corpus.files.left_out == {"other ending": 1}
    assert "d.txt: cannot be read: Too many levels of symbolic links" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="gives up root's rights to read everything")
def test_files_and_folders_without_permission_are_reported(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", "a.txt", "closed/b.txt", "closed.txt")
    config = PrepareConfig(corpus="text", source=(str(folder),))
    bad_rows = BadRows(skip=True)
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(0o755)
    (folder / "closed").chmod(0)
    (folder / "closed.txt").chmod(0)
    os.seteuid(65534)
    try:
        corpus = open_corpus(config, tmp_path, bad_rows)
        texts = [document.text for document in corpus.documents("read")]
    finally:
        os.seteuid(0)
    assert texts == ["a.txt"]
    assert bad_rows.files == [str(folder / "closed"), str(folder / "closed.txt")]


def test_what_was_left_out_is_in_the_log_and_in_the_dataset(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"Review {i} is good. It is number {i}.")
    (folder / "README.md").write_text("About the texts.")
    flags = ["prepare", "--corpus=text", f"--source={folder}", "--validation-fraction=0.3"]
    assert main([*flags, f"--out={tmp_path / 'data'}"]) == 0
    output = capsys.readouterr()
    assert "20 files found; left out: 1 other ending (.md 1)\n" in output.err
    assert "left out: 1 other ending\n" in output.out
    facts = open_dataset(tmp_path / "data").facts
    assert facts["source_files"] == {"found": 20, "left_out": {"other ending": 1}, "bad": []}
    (folder / "bad.txt").symlink_to("nowhere")
    assert main([*flags, f"--out={tmp_path / 'more'}", "--skip-bad-rows"]) == 0
    assert "bad files: 1; only rows before the damage were read" in capsys.readouterr().out
    assert open_dataset(tmp_path / "more").facts["source_files"]["bad"] == [str(folder / "bad.txt")]


def put(s3: S3, *keys: str) -> None:
    for key in keys:
        s3.client.put_object(Bucket=s3.bucket, Key=key, Body=b"" if key.endswith("/") else key.encode())


@pytest.mark.slow
def test_a_folder_marker_of_s3_is_no_document(s3: S3, tmp_path: Path) -> None:
    put(s3, "reviews/", "reviews/a.txt", "reviews/2024/", "reviews/2024/b.TXT", "reviews/.hidden.txt", "empty/")
    for address in (f"s3://{s3.bucket}/reviews/", f"s3://{s3.bucket}/reviews"):
        found = find(tmp_path, address)
        assert sorted(contents(found)) == ["reviews/2024/b.TXT", "reviews/a.txt"]
        assert found.left_out == {"folder marker": 2, "hidden": 1}
    assert contents(find(tmp_path, f"s3://{s3.bucket}/reviews/a*")) == ["reviews/a.txt"]
    with pytest.raises(
        DataError, match=r"no such object, and no object below it ends in \.txt; left out: 1 folder marker"
    ):
        find(tmp_path, f"s3://{s3.bucket}/reviews", f"s3://{s3.bucket}/empty/")


@pytest.mark.slow
def test_keys_that_look_like_patterns_are_found(s3: S3, tmp_path: Path) -> None:
    put(s3, "a[1].txt", "a1.txt", "b[2]/c.txt", "b2/d.txt", "e?*.txt", "ef.txt")
    bucket = f"s3://{s3.bucket}"
    assert contents(find(tmp_path, f"{bucket}/a[1].txt")) == ["a[1].txt"]
    assert contents(find(tmp_path, f"{bucket}/b[2]")) == ["b[2]/c.txt"]
    assert contents(find(tmp_path, f"{bucket}/b[2]/*.txt")) == ["b2/d.txt"]
    assert contents(find(tmp_path, f"{bucket}/b[[]2]/*.txt")) == ["b[2]/c.txt"]
    assert contents(find(tmp_path, f"{bucket}/e?*.txt")) == ["e?*.txt"]


def test_equal_keys_of_two_buckets_are_two_files(s3: S3, tmp_path: Path) -> None:
    other = f"{s3.bucket}-other"
    s3.client.create_bucket(Bucket=other)
    put(s3, "a.txt")
    s3.client.put_object(Bucket=other, Key="a.txt", Body=b"of the other bucket")
    found = find(tmp_path, f"s3://{s3.bucket}/a.txt", f"s3://{other}", f"s3://{s3.bucket}")
    assert contents(found) == ["a.txt", "of the other bucket"]
    assert found.left_out == {"found twice": 1}
