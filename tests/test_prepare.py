import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import imdb_review_folder

from babybert.config import PrepareConfig
from babybert.data.demo import generate_reviews
from babybert.data.prepare import open_dataset, prepare, sha256, unigram_entropy
from babybert.errors import DataError, StorageError, UsageError


def files_of(folder):
    return {path.name: sha256(path) for path in folder.iterdir()}


def test_the_same_seed_writes_the_same_files(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare(PrepareConfig(out=tmp_path / name, demo_documents=40, validation_fraction=0.2, seed=seed))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert files_of(tmp_path / "a")["train.csv"] != files_of(tmp_path / "c")["train.csv"]


def test_facts_are_those_of_the_files(demo):
    facts = demo.facts
    assert facts["generated"] is True
    for split in ("train", "validation"):
        examples = demo.examples(split)
        assert facts[split]["pairs"] == len(examples) == len(pd.read_csv(demo.folder / f"{split}.csv"))
        assert facts[split]["masked_tokens"] == (examples.labels > 0).sum()
        assert facts[split]["longest"] == np.diff(examples.offsets).max() <= facts["max_positions"]
    assert (demo.token_counts() == demo.examples("train").token_counts(demo.tokenizer.size)).all()


def test_copies_of_a_document_are_on_one_side(tmp_path):
    texts = generate_reviews(60, seed=0)
    prepare(PrepareConfig(corpus="imdb", source=imdb_review_folder(tmp_path / "source", texts * 2), out=tmp_path / "data", validation_fraction=0.3))
    dataset = open_dataset(tmp_path / "data")
    sides = {}
    for split in ("train", "validation"):
        examples = dataset.examples(split)
        ids = examples.original_ids()
        positive = np.flatnonzero(examples.is_next == 1)
        sides[split] = {ids[examples.offsets[p] : examples.offsets[p + 1]].tobytes() for p in positive}
    assert sides["train"]
    assert sides["validation"]
    assert not sides["train"] & sides["validation"]


def test_prepared_data_is_not_replaced_unasked(tmp_path):
    prepare(PrepareConfig(out=tmp_path, demo_documents=40, validation_fraction=0.2))
    before = files_of(tmp_path)
    with pytest.raises(UsageError, match="--overwrite"):
        prepare(PrepareConfig(out=tmp_path, demo_documents=50, validation_fraction=0.2))
    assert files_of(tmp_path) == before
    prepare(PrepareConfig(out=tmp_path, demo_documents=60, validation_fraction=0.2, overwrite=True))
    assert open_dataset(tmp_path).facts["train"]["documents"] > 40


def test_a_failed_prepare_leaves_nothing(tmp_path):
    source = imdb_review_folder(tmp_path / "source", ["Too short"] * 10)
    with pytest.raises(DataError, match="give no sentence pairs"):
        prepare(PrepareConfig(corpus="imdb", source=source, out=tmp_path / "data"))
    assert list((tmp_path / "data").iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write the data"):
        prepare(PrepareConfig(out=tmp_path / "file" / "data", demo_documents=40))


@pytest.mark.parametrize("name", ["train.csv", "validation.csv", "vocabulary.csv", "tokenizer.json", "dataset.json"])
@pytest.mark.parametrize("harm", ["missing", "changed"])
def test_a_harmed_file_is_named(tmp_path, demo_folder, name, harm):
    folder = tmp_path / "data"
    shutil.copytree(demo_folder, folder)
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


def test_entropy_of_known_shares():
    assert unigram_entropy(np.array([0, 4, 4])) == pytest.approx(np.log(2))
    assert unigram_entropy(np.array([0, 0, 8])) == 0
