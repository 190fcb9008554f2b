import os
import tarfile
from pathlib import Path

import pytest
from conftest import imdb_review_folder

from babybert.config import PrepareConfig
from babybert.data.corpus import imdb_documents, spread
from babybert.data.prepare import prepare
from babybert.errors import DataError

TEXTS = [f"Review number {i}. It has two sentences." for i in range(8)]


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


def test_archive_and_folder_give_the_same_labelled_reviews_in_the_same_order(folder, archive):
    from_archive = [document.text for document in imdb_documents(archive)]
    assert sorted(from_archive) == TEXTS
    assert from_archive == [document.text for document in imdb_documents(folder)]
    assert from_archive == [document.text for document in imdb_documents(folder / "aclImdb")]


def test_a_truncated_archive_is_refused(archive):
    content = archive.read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 20):
        archive.write_bytes(content[:size])
        with pytest.raises(DataError, match=r"aclImdb_v1\.tar\.gz"):
            imdb_documents(archive)


def test_what_is_no_archive_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        imdb_documents(tmp_path / "nowhere")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(DataError, match=r"not a whole \.tar\.gz archive"):
        imdb_documents(tmp_path / "text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no reviews found"):
        imdb_documents(tmp_path / "empty")


def test_a_review_that_is_not_utf8_is_named(folder):
    (folder / "aclImdb/train/pos/9_9.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"train/pos/9_9.txt: byte 3 is not UTF-8"):
        imdb_documents(folder)


def test_a_sample_is_spread_over_the_corpus():
    documents = list(range(10))
    assert spread(documents, 5) == [0, 2, 4, 6, 8]
    assert spread(documents, None) == spread(documents, 99) == documents


def test_imdb_has_the_vocabulary_of_the_reference(tmp_path):
    source = os.environ.get("BABYBERT_TEST_IMDB")
    if not source:
        pytest.skip("set BABYBERT_TEST_IMDB to the IMDB archive to run this: it is not part of the project")
    facts = prepare(PrepareConfig(corpus="imdb", source=Path(source), out=tmp_path))
    assert facts["vocabulary"] == 147_161
    assert facts["tokens"] == 13_383_103
