"""Shards that are finished, with a record each, so that the same command goes on after the driver was killed.

A record is kept with the shard until the dataset is complete. It has a key: a digest of everything that the shards
depend on. Shards of another key are deleted, and so is everything else that a killed command has left there.
"""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from babybert.data.block_plan import PlannedShard
from babybert.data.dataset_output import DatasetOutput
from babybert.data.shard_upload import UploadedShard
from babybert.data.shards import shard_name
from babybert.data.split_statistics import SplitStatistics


class FinishedShards:
    """The shards that are finished.

    Attributes:
        output: where they are kept.
        statistics: the counts over their pairs, by split (training, held out).
    """

    def __init__(self, output: DatasetOutput, key: str, file_format: str, vocab_size: int) -> None:
        self.output = output
        self._key = key
        self._format = file_format
        self._found: dict[str, dict[str, Any]] = {}
        self.statistics = (SplitStatistics(vocab_size), SplitStatistics(vocab_size))

    def load(self, planned: list[PlannedShard]) -> None:
        """Find the planned shards that an earlier command has finished; delete everything else that is kept."""
        shards = {self.name(shard): shard for shard in planned}
        for name, record in self.output.records():
            if name in shards and (found := self._read(name, record)):
                self._count(shards[name], *found)
        self.output.delete_all_except(self._found)

    def name(self, shard: PlannedShard) -> str:
        """Return the name of a shard's file."""
        return shard_name("validation" if shard.held_out else "train", shard.number, self._format)

    def __contains__(self, shard: PlannedShard) -> bool:
        return self.name(shard) in self._found

    def __getitem__(self, shard: PlannedShard) -> dict[str, Any]:
        """Return what `dataset.json` records about a finished shard."""
        return self._found[self.name(shard)]

    def add(
        self,
        shard: PlannedShard,
        written: Path | UploadedShard,
        facts: dict[str, Any],
        statistics: SplitStatistics,
    ) -> None:
        """Keep a shard that was written or uploaded, then write its record. Raises OSError."""
        name = self.name(shard)
        facts = {**facts, "file": name}
        place = self.output.keep(name, written)
        counts = {name: value for name, value in dataclasses.asdict(statistics).items() if name != "token_counts_V"}
        header = json.dumps({"key": self._key, "place": place, "facts": facts, "statistics": counts}).encode()
        record = header + b"\n" + statistics.token_counts_V.astype("<i8").tobytes()
        self.output.write_record(name, record)
        self._count(shard, facts, statistics)

    def _count(self, shard: PlannedShard, facts: dict[str, Any], statistics: SplitStatistics) -> None:
        # The counts of each shard would take memory: of a large corpus, some GB.
        self._found[self.name(shard)] = facts
        self.statistics[shard.held_out].merge(statistics)

    def _read(self, name: str, record: bytes) -> tuple[dict[str, Any], SplitStatistics] | None:
        """Read a record. None if it is of another key, or if it or the shard is damaged."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            header, _, token_counts = record.partition(b"\n")
            content = json.loads(header)
            if content["key"] == self._key and self.output.is_kept(name, content["place"], content["facts"]):
                statistics = SplitStatistics(**content["statistics"])
                statistics.token_counts_V += np.frombuffer(token_counts, "<i8")
                return content["facts"], statistics
        return None
