"""Shards that a killed command has finished are used again if they are valid and of the same data, and only then."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from babybert.data.block_plan import BlockRange, PlannedShard
from babybert.data.digest import sha256
from babybert.data.finished_shards import FinishedShards
from babybert.data.output_folder import OutputFolder
from babybert.data.split_statistics import SplitStatistics

SHARDS = [PlannedShard(held_out, 0, (BlockRange(0, 9, 1, 0),), 5) for held_out in (False, True)]


def output_of(folder: Path) -> OutputFolder:
    """An output that keeps shards in this folder."""
    output = OutputFolder(folder)
    output.files = folder
    return output


def finish(folder: Path, key: str = "key") -> FinishedShards:
    """Finish the first of two shards."""
    finished = FinishedShards(output_of(folder), key, "csv", 3)
    finished.load(SHARDS)
    (folder / "written").write_text("the rows")
    statistics = SplitStatistics(3, sentences=4, pairs=2, longest=7)
    statistics.token_counts_V[:] = 0, 10, 2**40
    facts = {"file": "written", "rows": 2, "bytes": 8, "sha256": sha256(folder / "written")}
    finished.add(SHARDS[0], folder / "written", facts, statistics)
    return finished


def found(folder: Path, key: str = "key", planned: Any = SHARDS) -> FinishedShards:
    """What the next command finds."""
    finished = FinishedShards(output_of(folder), key, "csv", 3)
    finished.load(planned)
    return finished


def test_a_finished_shard_is_found_with_its_counts(tmp_path: Path) -> None:
    before = finish(tmp_path)
    (tmp_path / ".half-written").write_text("x")
    (tmp_path / "validation-00000.csv").write_text("without a record")
    after = found(tmp_path)
    assert [shard in after for shard in SHARDS] == [True, False]
    facts, statistics = after[SHARDS[0]], after.statistics[0]
    assert facts == before[SHARDS[0]]
    assert facts["file"] == "train-00000.csv"
    assert after.statistics[1].pairs == 0
    assert np.array_equal(statistics.token_counts_V, [0, 10, 2**40])
    assert (statistics.sentences, statistics.pairs, statistics.longest) == (4, 2, 7)
    assert {path.name for path in tmp_path.iterdir()} == {"train-00000.csv", "train-00000.csv.record"}


def test_a_shard_of_other_data_is_deleted(tmp_path: Path) -> None:
    finish(tmp_path)
    assert SHARDS[0] not in found(tmp_path, "another key")
    assert not list(tmp_path.iterdir())
    finish(tmp_path)
    assert SHARDS[1] not in found(tmp_path, planned=SHARDS[1:])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["train-00000.csv", "train-00000.csv.record"])
@pytest.mark.parametrize("content", [None, b"", b"other", b'{"key": "key"}\n1234567', b"{}\n", b"[]"])
def test_a_damaged_shard_is_made_again(tmp_path: Path, name: str, content: bytes | None) -> None:
    finish(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    assert SHARDS[0] not in found(tmp_path)
    assert not list(tmp_path.iterdir())
