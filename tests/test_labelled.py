"""Labelled documents for the probe: reading and sampling."""

import random
from pathlib import Path

import pytest
from conftest import imdb_review_folder

from babybert.corpus.labelled import Labelled, LabelledColumns, read_labelled, sample
from babybert.errors import DataError

COLUMNS = LabelledColumns("text", "label")


def test_imdb_folders_give_labels_and_splits(tmp_path: Path) -> None:
    imdb_review_folder(tmp_path, [f"review {index}" for index in range(8)])
    documents = {document.text: document for document in read_labelled("imdb", (str(tmp_path),), COLUMNS)}
    assert len(documents) == 8
    assert documents["review 0"] == Labelled("review 0", "pos", "train")
    assert documents["review 3"] == Labelled("review 3", "neg", "test")


def test_csv_columns_and_their_errors(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("review,id,sentiment\ngood film,1,positive\nbad film,2, negative\n", encoding="utf-8")
    documents = list(read_labelled("csv", (str(path),), LabelledColumns("review", "sentiment")))
    assert documents == [Labelled("good film", "positive", None), Labelled("bad film", "negative", None)]
    with pytest.raises(
        DataError, match="no column 'label'; it has review, id, sentiment; choose one with --label-column"
    ):
        list(read_labelled("csv", (str(path),), LabelledColumns("review", "label")))
    path.write_text("text,label\na,\n", encoding="utf-8")
    with pytest.raises(DataError, match="row 1: 'label' is empty"):
        list(read_labelled("csv", (str(path),), COLUMNS))


def test_the_imdb_csv_without_labels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "reviews.txt"
    path.write_text("no label here", encoding="utf-8")
    with pytest.raises(DataError, match="not IMDB's reviews"):
        list(read_labelled("imdb", (str(path),), COLUMNS))


def test_a_sample_depends_on_the_texts_alone() -> None:
    documents = [Labelled(f"text {index}", "ab"[index % 2], None) for index in range(500)]
    train, test = sample(iter(documents), 50, 0)
    assert len(train) == len(test) == 50
    assert not {document.text for document in train} & {document.text for document in test}
    shuffled = documents * 2  # copies count once
    random.Random(0).shuffle(shuffled)
    assert sample(iter(shuffled), 50, 0) == (train, test)
    assert sample(iter(documents), 50, 1) != (train, test)
    assert sample(iter(documents), 20, 0)[0] == train[:20]  # a smaller sample is part of a larger one


def test_splits_of_the_source_are_kept() -> None:
    documents = [Labelled(f"text {index}", "ab"[index % 2], "train" if index < 30 else "test") for index in range(40)]
    train, test = sample(iter(documents), 100, 0)
    assert {document.text for document in train} == {f"text {index}" for index in range(30)}
    assert len(test) == 10


def test_other_than_two_labels_are_refused() -> None:
    for labels in ("a", "abc"):
        documents = [Labelled(f"text {index}", labels[index % len(labels)], None) for index in range(60)]
        with pytest.raises(DataError, match="needs the same two in both"):
            sample(iter(documents), 30, 0)
