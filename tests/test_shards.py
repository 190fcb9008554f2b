import csv
import gzip
import hashlib
import io
import json

import numpy as np
import pandas as pd
import pytest
import zstandard

from babybert.corpus.files import BadRows
from babybert.data import shards as module
from babybert.data.shards import FORMATS, CsvSpelling, ShardWriter
from babybert.data.table import COLUMNS, Examples, concatenate, read_table

VOCABULARY = 123_456


def some_examples(rows, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 9, rows)  # csv.writer leaves "[7]" unquoted, which is the same to any reader
    total = int(lengths.sum())
    ids, labels = rng.integers(6, VOCABULARY, total), rng.integers(0, VOCABULARY, total)
    labels[rng.random(total) < 0.8] = 0
    segments = rng.integers(1, 3, total)
    return Examples(
        ids.astype(np.int32),
        labels.astype(np.int32),
        segments.astype(np.int8),
        np.concatenate([[0], np.cumsum(lengths)]),
        rng.integers(0, 2, rows).astype(np.int8),
    )


def plain_csv(examples):
    """The oracle: `csv` and `json`, a row at a time."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in range(len(examples)):
        part = examples.rows(row, row + 1)
        writer.writerow(
            [
                *(
                    json.dumps(array.tolist(), separators=(",", ":"))
                    for array in (part.ids, part.labels, part.segments)
                ),
                part.is_next[0],
            ]
        )
    return text.getvalue()


def test_text_equals_that_of_csv_and_json():
    examples = some_examples(300)
    assert CsvSpelling(VOCABULARY).rows(examples).tobytes().decode() == plain_csv(examples)
    part = examples.rows(7, 20)
    assert CsvSpelling(VOCABULARY).rows(part).tobytes().decode() == plain_csv(part)


def write(folder, examples, kind, shard_bytes=10**9):
    with ShardWriter(folder, "train", kind, shard_bytes, VOCABULARY) as writer:
        for first in range(0, len(examples), 400):
            writer.add(examples.rows(first, first + 400))
    return writer.shards


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_written_is_read(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 100)
    examples = some_examples(1000)
    facts = write(tmp_path, examples, kind, shard_bytes=4000)
    assert len(facts) > 1
    assert sum(fact["rows"] for fact in facts) == 1000
    for fact in facts:
        content = (tmp_path / fact["file"]).read_bytes()
        assert fact["bytes"] == len(content)
        assert fact["sha256"] == hashlib.sha256(content).hexdigest()
    again = concatenate(chunk for fact in facts for chunk in read_table(tmp_path / fact["file"], VOCABULARY, BadRows()))
    for name, array in vars(examples).items():
        assert (array == getattr(again, name)).all(), name
        assert array.dtype == getattr(again, name).dtype


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_rows_are_the_same_bytes(tmp_path, kind):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, some_examples(50), kind)
    assert (tmp_path / "a" / f"train-00000.{kind}").read_bytes() == (
        tmp_path / "b" / f"train-00000.{kind}"
    ).read_bytes()


@pytest.mark.parametrize("kind", FORMATS)
def test_pandas_and_json_read_it(tmp_path, kind):
    examples = some_examples(20)
    write(tmp_path, examples, kind)
    path = tmp_path / f"train-00000.{kind}"
    frame = pd.read_parquet(path) if kind == "parquet" else pd.read_csv(path)
    assert list(frame.columns) == list(COLUMNS)
    assert frame["is_next"].tolist() == examples.is_next.tolist()
    for row, cell in enumerate(frame["bert_input"]):
        assert (json.loads(cell) if isinstance(cell, str) else cell.tolist()) == examples.rows(
            row, row + 1
        ).ids.tolist()


def test_compressed_files_are_what_other_tools_read(tmp_path):
    for kind in ("csv", "csv.gz", "csv.zst"):
        write(tmp_path, some_examples(30), kind)
    plain = (tmp_path / "train-00000.csv").read_bytes()
    assert gzip.decompress((tmp_path / "train-00000.csv.gz").read_bytes()) == plain
    with zstandard.open(tmp_path / "train-00000.csv.zst", "rb") as file:
        assert file.read() == plain
