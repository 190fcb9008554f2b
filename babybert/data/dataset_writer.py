"""Write the files of a dataset: shards, vocabulary, tokenizer, and `dataset.json` with everything about them."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from babybert import __version__
from babybert.config import PrepareConfig
from babybert.data.dataset import FORMAT
from babybert.data.dataset_output import DESCRIPTION, DatasetOutput
from babybert.data.digest import sha256
from babybert.data.shards import ShardWriter
from babybert.data.split_statistics import SplitStatistics
from babybert.data.table import Examples
from babybert.data.tokenizer import Tokenizer

BYTES_PER_MB = 1_000_000


class DatasetWriter:
    """Writes the files of a dataset that is to be published: `write_split` for each split, then `finish`.

    Attributes:
        facts: the content of `dataset.json`; complete after `finish`.
        token_counts_V: how often each token occurs in the training pairs (int64); there after the training split.
    """

    token_counts_V: np.ndarray

    def __init__(self, config: PrepareConfig, output: DatasetOutput, tokenizer: Tokenizer) -> None:
        self._config = config
        self._output = output
        self._folder = output.files
        self._tokenizer = tokenizer
        default_source = "built-in grammar" if config.corpus == "demo" else "public archive"
        self.facts: dict[str, Any] = {
            "format": FORMAT,
            "babybert": __version__,
            "numpy": np.__version__,
            "tokenizers": tokenizers.__version__,
            "corpus": config.corpus,
            "generated": config.corpus == "demo",
            "source": ", ".join(config.source) or default_source,
            "seed": config.seed,
            "duplicates": config.duplicates,
            "max_positions": config.max_positions,
            **({"segments": config.segments} if config.segments != "sentences" else {}),
            "vocabulary": tokenizer.size,
            "tokenizer_digest": tokenizer.digest,
            "skipped_rows": 0,
            "shards": {},
        }

    def write_split(self, split: str, chunks: Iterable[Examples], statistics: SplitStatistics) -> None:
        """Write the shards of one split and, for the training split, `vocabulary.csv`.

        Args:
            split: `train` or `validation`.
            chunks: the pairs of the split, at least one.
            statistics: counts the pairs that are written.
        """
        shard_bytes = self._config.shard_mb * BYTES_PER_MB
        settings = (self._config.format, shard_bytes, self._tokenizer.size)
        with ShardWriter(self._folder, split, *settings, self._keep) as writer:
            for examples in chunks:
                writer.add(examples)
                statistics.add(examples)
        self.describe_split(split, writer.shards, statistics)

    def _keep(self, path: Path) -> None:
        self._output.keep(path.name, path)

    def describe_split(self, split: str, shards: list[dict[str, Any]], statistics: SplitStatistics) -> None:
        """Record one split, whose shards are written, and write `vocabulary.csv` for the training split.

        Args:
            split: `train` or `validation`.
            shards: what `Shard.close` returned for each shard.
            statistics: the counts of all its pairs, at least one.
        """
        statistics.log_label_problems(split)
        self.facts[split] = statistics.as_dict()
        self.facts["shards"][split] = shards
        if split == "train":
            self.token_counts_V = statistics.token_counts_V
            self._write_vocabulary(statistics.token_counts_V)

    def _write_vocabulary(self, token_counts_V: np.ndarray) -> None:
        ids = range(self._tokenizer.size)
        # Not with pandas: importing it takes longer than writing the file.
        with (self._folder / "vocabulary.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("id", "token", "count"))
            writer.writerows(zip(ids, self._tokenizer.tokens(ids), token_counts_V.tolist(), strict=True))

    def finish(self, skipped_rows: int) -> dict[str, Any]:
        """Write the tokenizer and, with the digests of all files, `dataset.json`. Return its content."""
        self.facts["skipped_rows"] = skipped_rows
        self._tokenizer.save(self._folder / "tokenizer.json")
        self.facts["files"] = {name: self._describe_file(name) for name in ("tokenizer.json", "vocabulary.csv")}
        (self._folder / DESCRIPTION).write_text(json.dumps(self.facts, indent=2) + "\n", encoding="utf-8")
        return self.facts

    def _describe_file(self, name: str) -> dict[str, Any]:
        path = self._folder / name
        return {"bytes": path.stat().st_size, "sha256": sha256(path)}
