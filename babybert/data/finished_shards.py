"""Shards that are finished, with a record each, so that the same command goes on after the driver was killed.

A record is next to the shard until the dataset is complete. It has a key: a digest of everything that the shards depend
on. Shards of another key are deleted, and so is everything else that a killed command has left there.
"""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from babybert.data.block_plan import PlannedShard
from babybert.data.digest import sha256
from babybert.data.shards import shard_name
from babybert.data.split_statistics import SplitStatistics
from babybert.folders import write_file

RECORD_SUFFIX = ".record"


class FinishedShards:
    """The shards in a folder.

    Attributes:
        folder: the folder; it has the files of the shards and their records.
    """

    def __init__(self, folder: Path, key: str, file_format: str, vocab_size: int) -> None:
        self.folder = folder
        self._key = key
        self._format = file_format
        self._vocab_size = vocab_size
        self._found: dict[str, tuple[dict[str, Any], SplitStatistics]] = {}

    def load(self, planned: list[PlannedShard]) -> None:
        """Find the planned shards that an earlier command has finished; delete everything else in the folder."""
        names = set(map(self.name, planned))
        for record in self.folder.glob("*" + RECORD_SUFFIX):
            name = record.name.removesuffix(RECORD_SUFFIX)
            if name in names and (found := self._read(record, self.folder / name)):
                self._found[name] = found
        kept = {*self._found, *(name + RECORD_SUFFIX for name in self._found)}
        for path in self.folder.iterdir():
            if path.name not in kept:
                path.unlink()

    def name(self, shard: PlannedShard) -> str:
        """Return the name of a shard's file."""
        return shard_name("validation" if shard.held_out else "train", shard.number, self._format)

    def __contains__(self, shard: PlannedShard) -> bool:
        return self.name(shard) in self._found

    def __getitem__(self, shard: PlannedShard) -> tuple[dict[str, Any], SplitStatistics]:
        """Return what `dataset.json` records about a finished shard, and the counts over its pairs."""
        return self._found[self.name(shard)]

    def add(self, shard: PlannedShard, path: Path, facts: dict[str, Any], statistics: SplitStatistics) -> None:
        """Give a shard that was written to `path` its name, then write its record. Raises OSError."""
        name = self.name(shard)
        facts = {**facts, "file": name}
        path.replace(self.folder / name)
        counts = {name: value for name, value in dataclasses.asdict(statistics).items() if name != "token_counts_V"}
        header = json.dumps({"key": self._key, "facts": facts, "statistics": counts}).encode()
        record = header + b"\n" + statistics.token_counts_V.astype("<i8").tobytes()
        write_file(self.folder / (name + RECORD_SUFFIX), record)
        self._found[name] = (facts, statistics)

    def _read(self, record: Path, path: Path) -> tuple[dict[str, Any], SplitStatistics] | None:
        """Read a record. None if it is of another key, or if it or the shard is damaged."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            header, _, token_counts = record.read_bytes().partition(b"\n")
            content = json.loads(header)
            if content["key"] == self._key and sha256(path) == content["facts"]["sha256"]:
                statistics = SplitStatistics(**content["statistics"])
                statistics.token_counts_V += np.frombuffer(token_counts, "<i8")
                return content["facts"], statistics
        return None
