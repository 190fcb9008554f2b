"""What is written equals the text of `csv` and `json`, is the same every time, and can be read by other tools."""

import csv
import gzip
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import zstandard

from babybert.corpus.files import BadRows
from babybert.data import shards as module
from babybert.data.shards import FORMATS, CsvFormatter, ShardWriter
from babybert.data.table import COLUMNS, Examples, concatenate, read_table

VOCABULARY = 123_456


def random_examples(rows: int, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 9, rows)  # csv.writer leaves "[7]" unquoted, which is the same to any reader
    total = int(lengths.sum())
    ids = rng.integers(6, VOCABULARY, total)
    labels = rng.integers(0, VOCABULARY, total)
    labels[rng.random(total) < 0.8] = 0
    segments = rng.integers(1, 3, total)
    return Examples(
        ids.astype(np.int32),
        labels.astype(np.int32),
        segments.astype(np.int8),
        np.concatenate([[0], np.cumsum(lengths)]),
        rng.integers(0, 2, rows).astype(np.int8),
    )


def plain_csv(examples: Examples) -> str:
    """The oracle: `csv` and `json`, a row at a time."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in range(len(examples)):
        pair = examples.rows(row, row + 1)
        arrays = (pair.ids, pair.labels, pair.segments)
        lists = [json.dumps(array.tolist(), separators=(",", ":")) for array in arrays]
        writer.writerow([*lists, pair.is_next[0]])
    return text.getvalue()


def test_text_equals_that_of_csv_and_json() -> None:
    examples = random_examples(300)
    assert CsvFormatter(VOCABULARY).format(examples).tobytes().decode() == plain_csv(examples)
    some_rows = examples.rows(7, 20)
    assert CsvFormatter(VOCABULARY).format(some_rows).tobytes().decode() == plain_csv(some_rows)


def write(folder: Path, examples: Examples, kind: str, shard_bytes: int = 10**9) -> list[dict[str, Any]]:
    finished: list[Path] = []
    with ShardWriter(folder, "train", kind, shard_bytes, VOCABULARY, finished.append) as writer:
        for first in range(0, len(examples), 400):
            writer.add(examples.rows(first, first + 400))
    assert finished == [folder / shard["file"] for shard in writer.shards]
    return writer.shards


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_written_is_read_back(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_PER_CHUNK", 100)
    examples = random_examples(1000)
    shards = write(tmp_path, examples, kind, shard_bytes=4000)
    assert len(shards) > 1
    assert sum(shard["rows"] for shard in shards) == 1000
    for shard in shards:
        content = (tmp_path / shard["file"]).read_bytes()
        assert shard["bytes"] == len(content)
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()
    paths = [tmp_path / shard["file"] for shard in shards]
    again = concatenate(chunk for path in paths for chunk in read_table(path, VOCABULARY, BadRows()))
    for name, array in vars(examples).items():
        assert (array == getattr(again, name)).all(), name
        assert array.dtype == getattr(again, name).dtype


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_rows_are_the_same_bytes(tmp_path: Path, kind: str) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, random_examples(50), kind)
    first, second = ((tmp_path / name / f"train-00000.{kind}").read_bytes() for name in ("a", "b"))
    assert first == second


@pytest.mark.parametrize("kind", FORMATS)
def test_pandas_and_json_read_it(tmp_path: Path, kind: str) -> None:
    examples = random_examples(20)
    write(tmp_path, examples, kind)
    path = tmp_path / f"train-00000.{kind}"
    frame = pd.read_parquet(path) if kind == "parquet" else pd.read_csv(path)
    assert list(frame.columns) == list(COLUMNS)
    assert frame["is_next"].tolist() == examples.is_next.tolist()
    for row, cell in enumerate(frame["bert_input"]):
        ids = json.loads(cell) if isinstance(cell, str) else cell.tolist()
        assert ids == examples.rows(row, row + 1).ids.tolist()


def test_compressed_files_are_what_other_tools_read(tmp_path: Path) -> None:
    for kind in ("csv", "csv.gz", "csv.zst"):
        write(tmp_path, random_examples(30), kind)
    plain = (tmp_path / "train-00000.csv").read_bytes()
    assert gzip.decompress((tmp_path / "train-00000.csv.gz").read_bytes()) == plain
    with zstandard.open(tmp_path / "train-00000.csv.zst", "rb") as file:
        assert file.read() == plain
