import json
import os
import re
import shutil

import numpy as np
import pytest

from babybert.data import dataset as module
from babybert.data.dataset import open_dataset, unigram_entropy
from babybert.data.table import Examples
from babybert.errors import DataError


@pytest.fixture
def folder(demo_folder, tmp_path):
    """A copy that a test may harm, without a cache."""
    shutil.copytree(demo_folder, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    return tmp_path / "data"


def same(one: Examples, other: Examples):
    return all(
        (array == getattr(other, name)).all() and array.dtype == getattr(other, name).dtype
        for name, array in vars(one).items()
    )


def no_reading(*arguments):
    raise AssertionError("the table was read though it is cached")


def test_the_second_time_the_table_is_not_read(folder, demo, monkeypatch):
    assert same(open_dataset(folder).examples("train"), demo.examples("train"))
    monkeypatch.setattr(module, "read_table", no_reading)
    monkeypatch.setattr(module, "verify", lambda path, digest: None if path.name == "tokenizer.json" else no_reading())
    again = open_dataset(folder).examples("train")
    assert isinstance(again.ids, np.memmap)
    assert same(again, demo.examples("train"))


def test_a_touched_shard_is_verified_but_not_read_again(folder, demo, monkeypatch):
    open_dataset(folder).examples("train")
    os.utime(folder / "train-00000.csv", (1, 1))
    monkeypatch.setattr(module, "read_table", no_reading)
    assert same(open_dataset(folder).examples("train"), demo.examples("train"))
    monkeypatch.setattr(module, "verify", lambda path, digest: None if path.name == "tokenizer.json" else no_reading())
    assert same(open_dataset(folder).examples("train"), demo.examples("train"))


def test_a_changed_shard_is_refused_though_it_was_cached(folder):
    open_dataset(folder).examples("train")
    path = folder / "train-00000.csv"
    path.write_bytes(path.read_bytes().replace(b",1\n", b",0\n", 1))
    with pytest.raises(DataError, match=r"train-00000.csv: differs from what dataset.json recorded"):
        open_dataset(folder).examples("train")


@pytest.mark.parametrize("harm", ["cut", "gone", "description"])
def test_a_broken_cache_is_made_again(folder, demo, harm):
    open_dataset(folder).examples("train")
    (cache,) = (folder / ".cache").iterdir()
    if harm == "cut":
        (cache / "ids").write_bytes((cache / "ids").read_bytes()[:-4])
    elif harm == "gone":
        (cache / "offsets").unlink()
    else:
        (cache / "cache.json").write_text("{")
    assert same(open_dataset(folder).examples("train"), demo.examples("train"))
    assert [path.name for path in (folder / ".cache").iterdir()] == [cache.name]


def test_what_a_killed_reader_left_is_not_taken(folder, demo):
    partial = folder / ".cache" / ".partial-x"
    partial.mkdir(parents=True)
    (partial / "ids").write_bytes(b"half")
    assert same(open_dataset(folder).examples("train"), demo.examples("train"))


def test_a_volume_that_cannot_be_written_is_read_into_memory(folder, demo, capsys):
    (folder / ".cache").write_text("in the way")
    examples = open_dataset(folder).examples("train")
    assert not isinstance(examples.ids, np.memmap)
    assert same(examples, demo.examples("train"))
    assert "held in memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["train-00000.csv", "validation-00000.csv", "vocabulary.csv", "tokenizer.json", "dataset.json"]
)
@pytest.mark.parametrize("harm", ["missing", "changed"])
def test_a_harmed_file_is_named(folder, name, harm):
    if harm == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes((folder / name).read_bytes()[:-30])
    with pytest.raises(DataError, match=re.escape(name)):
        dataset = open_dataset(folder)
        dataset.examples("train"), dataset.examples("validation"), dataset.token_counts()


def test_another_format_is_refused(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(DataError, match="format 99"):
        open_dataset(tmp_path)


def test_a_description_that_contradicts_itself_is_refused(folder):
    facts = json.loads((folder / "dataset.json").read_text())
    facts["shards"]["train"] = []
    (folder / "dataset.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match="not a description of prepared data"):
        open_dataset(folder)


def test_words_that_pandas_would_take_for_nothing_have_their_counts(tmp_path):
    from babybert.config import PrepareConfig
    from babybert.data.prepare import prepare

    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"null is nan number {i} . it is n/a and none {i} .")
    prepare(PrepareConfig(corpus="text", source=(str(tmp_path),), out=tmp_path / "data", validation_fraction=0.3))
    dataset = open_dataset(tmp_path / "data")
    assert (dataset.token_counts() == dataset.examples("train").token_counts(dataset.tokenizer.size)).all()
    assert dataset.token_counts()[dataset.tokenizer.id_of("nan")] == dataset.facts["train"]["documents"]


def test_entropy_of_known_shares():
    assert unigram_entropy(np.array([0, 4, 4])) == pytest.approx(np.log(2))
    assert unigram_entropy(np.array([0, 0, 8])) == 0
