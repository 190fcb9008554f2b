"""A dataset is verified, cached, and refused if a file of it is missing or changed."""

import csv
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from babybert.config import PrepareConfig
from babybert.data import dataset as module
from babybert.data.cache import open_cache
from babybert.data.dataset import Dataset, open_dataset, unigram_entropy
from babybert.data.digest import sha256
from babybert.data.prepare import prepare
from babybert.data.table import Examples, read_table
from babybert.errors import DataError


@pytest.fixture
def folder(demo_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage, without a cache."""
    shutil.copytree(demo_folder, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    return tmp_path / "data"


def are_equal(one: Examples, other: Examples) -> bool:
    return all(
        (array == getattr(other, name)).all() and array.dtype == getattr(other, name).dtype
        for name, array in vars(one).items()
    )


def must_not_be_called(*arguments: Any) -> NoReturn:
    raise AssertionError("the table was read although it is cached")


def refuse_shards(path: Path, expected: str) -> None:
    """In place of `check_sha256`: only the tokenizer may be verified."""
    assert path.name == "tokenizer.json", path


def test_the_second_time_the_table_is_not_read(folder: Path, demo: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    assert are_equal(open_dataset(folder).examples("train"), demo.examples("train"))
    monkeypatch.setattr(module, "read_table", must_not_be_called)
    monkeypatch.setattr(module, "check_sha256", refuse_shards)
    again = open_dataset(folder).examples("train")
    assert isinstance(again.ids, np.memmap)
    assert are_equal(again, demo.examples("train"))


def test_a_touched_shard_is_verified_but_not_read_again(
    folder: Path, demo: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_dataset(folder).examples("train")
    os.utime(folder / "train-00000.csv", (1, 1))
    monkeypatch.setattr(module, "read_table", must_not_be_called)
    assert are_equal(open_dataset(folder).examples("train"), demo.examples("train"))
    monkeypatch.setattr(module, "check_sha256", refuse_shards)
    assert are_equal(open_dataset(folder).examples("train"), demo.examples("train"))


def test_a_changed_shard_is_refused_even_if_it_is_cached(folder: Path) -> None:
    open_dataset(folder).examples("train")
    path = folder / "train-00000.csv"
    path.write_bytes(path.read_bytes().replace(b",1\n", b",0\n", 1))
    with pytest.raises(DataError, match=r"train-00000.csv: differs from what dataset.json recorded"):
        open_dataset(folder).examples("train")


@pytest.mark.parametrize("damage", ["cut", "gone", "description"])
def test_a_damaged_cache_is_built_again(folder: Path, demo: Dataset, damage: str) -> None:
    open_dataset(folder).examples("train")
    (cache,) = (folder / ".cache").iterdir()
    if damage == "cut":
        (cache / "ids").write_bytes((cache / "ids").read_bytes()[:-4])
    elif damage == "gone":
        (cache / "offsets").unlink()
    else:
        (cache / "cache.json").write_text("{")
    assert are_equal(open_dataset(folder).examples("train"), demo.examples("train"))
    assert [path.name for path in (folder / ".cache").iterdir()] == [cache.name]


def test_what_a_killed_process_left_of_a_cache_is_ignored(folder: Path, demo: Dataset) -> None:
    partial = folder / ".cache" / ".partial-x"
    partial.mkdir(parents=True)
    (partial / "ids").write_bytes(b"half")
    assert are_equal(open_dataset(folder).examples("train"), demo.examples("train"))


def test_a_volume_that_cannot_be_written_is_read_into_memory(
    folder: Path, demo: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / ".cache").write_text("in the way")
    examples = open_dataset(folder).examples("train")
    assert not isinstance(examples.ids, np.memmap)
    assert are_equal(examples, demo.examples("train"))
    assert "held in memory" in caplog.text


def test_two_processes_may_build_a_cache_at_once(folder: Path, demo: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one finishes while the first one reads: both have the data, and the cache is one that is valid."""
    first, second = open_dataset(folder), open_dataset(folder)
    others: list[Examples] = []

    def read_after_the_other(*arguments: Any) -> Any:
        monkeypatch.setattr(module, "read_table", read_table)
        others.append(second.examples("train"))
        yield from read_table(*arguments)

    monkeypatch.setattr(module, "read_table", read_after_the_other)
    examples = first.examples("train")
    assert are_equal(examples, demo.examples("train"))
    assert are_equal(others[0], demo.examples("train"))
    (cache,) = (folder / ".cache").iterdir()
    assert open_cache(cache) is not None


def test_a_cache_that_another_process_deletes_stays_readable(
    folder: Path, demo: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process deletes it as soon as it is complete, to put its own there."""
    rename = Path.rename

    def rename_and_delete(path: Path, target: Path) -> Path:
        renamed = rename(path, target)
        shutil.rmtree(target)
        return renamed

    monkeypatch.setattr(Path, "rename", rename_and_delete)
    assert are_equal(open_dataset(folder).examples("train"), demo.examples("train"))


@pytest.mark.parametrize(
    "name", ["train-00000.csv", "validation-00000.csv", "vocabulary.csv", "tokenizer.json", "dataset.json"]
)
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_missing_or_changed_file_is_named(folder: Path, name: str, damage: str) -> None:
    if damage == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes((folder / name).read_bytes()[:-30])
    with pytest.raises(DataError, match=re.escape(name)):
        dataset = open_dataset(folder)
        dataset.examples("train"), dataset.examples("validation"), dataset.token_counts()


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(DataError, match="format 99"):
        open_dataset(tmp_path)


def test_a_description_that_contradicts_itself_is_refused(folder: Path) -> None:
    facts = json.loads((folder / "dataset.json").read_text())
    facts["shards"]["train"] = []
    (folder / "dataset.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match="not a description of prepared data"):
        open_dataset(folder)


def test_words_that_pandas_would_read_as_missing_have_counts(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"null is nan number {i} . it is n/a and none {i} .")
    prepare(PrepareConfig(corpus="text", source=(str(tmp_path),), out=tmp_path / "data", validation_fraction=0.3))
    dataset = open_dataset(tmp_path / "data")
    assert (dataset.token_counts() == dataset.examples("train").token_counts(dataset.tokenizer.size)).all()
    assert dataset.token_counts()[dataset.tokenizer.id_of("nan")] == dataset.facts["train"]["documents"]


def test_entropy_of_known_shares() -> None:
    assert unigram_entropy(np.array([0, 4, 4])) == pytest.approx(np.log(2))
    assert unigram_entropy(np.array([0, 0, 8])) == 0


def test_a_vocabulary_with_a_very_long_word_is_read(tmp_path: Path, demo_folder: Path) -> None:
    shutil.copytree(demo_folder, tmp_path / "data")
    vocabulary = tmp_path / "data" / "vocabulary.csv"
    with vocabulary.open("a") as file:
        file.write(f"999,{'x' * 200_000},7\r\n")
    path = tmp_path / "data" / "dataset.json"
    facts = json.loads(path.read_text())
    facts["files"]["vocabulary.csv"]["sha256"] = sha256(vocabulary)
    path.write_text(json.dumps(facts))
    csv.field_size_limit(131_072)  # the default, which reading other CSV files has changed
    assert open_dataset(tmp_path / "data").token_counts()[-1] == 7
