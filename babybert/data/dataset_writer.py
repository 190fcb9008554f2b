"""Write the files of a dataset: shards, vocabulary, tokenizer, and `dataset.json` with everything about them."""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tokenizers

from babybert import __version__
from babybert.config import PrepareConfig
from babybert.data.dataset import FORMAT, describe_only_label
from babybert.data.digest import sha256
from babybert.data.shards import ShardWriter
from babybert.data.table import Examples
from babybert.data.tokenizer import UNK, Tokenizer

logger = logging.getLogger(__name__)

BYTES_PER_MB = 1_000_000


@dataclass
class SplitStatistics:
    """Counts over the pairs of one split, for `dataset.json` and `vocabulary.csv`.

    Attributes:
        vocab_size: size of the vocabulary.
        documents: documents of the split; None if the pairs come from tables, which do not record them.
        sentences: sentences in these documents; 0 if the pairs come from tables.
        pairs: pairs, copies counted.
        positive_pairs: pairs whose second sentence follows the first (is_next 1).
        without_negative: pairs that were left out because no second sentence makes them a negative.
        tokens: tokens in the pairs, special ones included.
        masked_tokens: tokens that were chosen for MLM.
        unknown_tokens: tokens that are `[UNK]` before masking.
        longest: length of the longest pair in tokens.
        token_counts_V: how often each token of the vocabulary occurs before masking (int64).
    """

    vocab_size: int
    documents: int | None = None
    sentences: int = 0
    pairs: int = 0
    positive_pairs: int = 0
    without_negative: int = 0
    tokens: int = 0
    masked_tokens: int = 0
    unknown_tokens: int = 0
    longest: int = 0
    token_counts_V: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.token_counts_V = np.zeros(self.vocab_size, np.int64)

    def add(self, examples: Examples) -> None:
        """Count these pairs."""
        self.token_counts_V += examples.token_counts(self.vocab_size)
        self.pairs += len(examples)
        self.positive_pairs += int(examples.is_next.sum())
        self.tokens += len(examples.ids)
        self.masked_tokens += int(np.count_nonzero(examples.labels))
        self.unknown_tokens += int(np.count_nonzero(examples.original_ids() == UNK))
        self.longest = max(self.longest, int(np.diff(examples.offsets).max(initial=0)))

    def log_label_problems(self, split: str) -> None:
        """Warn of pairs without a negative, and of a split in which all pairs have one label."""
        if self.without_negative:
            logger.warning(
                f"{split}: pairs left out, because no second sentence of another document makes them negatives: "
                f"{self.without_negative:,}"
            )
        if self.positive_pairs in (0, self.pairs):
            logger.warning(describe_only_label(split, int(self.positive_pairs == self.pairs)))

    def as_dict(self) -> dict[str, Any]:
        """Return what `dataset.json` records. There must be at least one pair."""
        documents = {} if self.documents is None else {"documents": self.documents}
        without_negative = {"pairs_without_negative": self.without_negative} if self.without_negative else {}
        return {
            **documents,
            "sentences": self.sentences,
            "pairs": self.pairs,
            **without_negative,
            "is_next_share": round(self.positive_pairs / self.pairs, 4),
            "tokens_in_pairs": self.tokens,
            "masked_tokens": self.masked_tokens,
            "unknown_tokens": self.unknown_tokens,
            "mean_length": round(self.tokens / self.pairs, 1),
            "longest": self.longest,
        }


class DatasetWriter:
    """Writes a dataset into a folder: `write_split` for each split, then `finish`.

    Attributes:
        facts: the content of `dataset.json`; complete after `finish`.
    """

    def __init__(self, config: PrepareConfig, folder: Path, tokenizer: Tokenizer) -> None:
        self._config = config
        self._folder = folder
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
        with ShardWriter(self._folder, split, self._config.format, shard_bytes, self._tokenizer.size) as writer:
            for examples in chunks:
                writer.add(examples)
                statistics.add(examples)
        statistics.log_label_problems(split)
        self.facts[split] = statistics.as_dict()
        self.facts["shards"][split] = writer.shards
        if split == "train":
            self._write_vocabulary(statistics.token_counts_V)

    def _write_vocabulary(self, token_counts_V: np.ndarray) -> None:
        table = pd.DataFrame({"token": self._tokenizer.tokens(range(self._tokenizer.size)), "count": token_counts_V})
        table.to_csv(self._folder / "vocabulary.csv", index_label="id", lineterminator="\r\n")

    def finish(self, skipped_rows: int) -> dict[str, Any]:
        """Write the tokenizer and, with the digests of all files, `dataset.json`. Return its content."""
        self.facts["skipped_rows"] = skipped_rows
        self._tokenizer.save(self._folder / "tokenizer.json")
        self.facts["files"] = {name: self._describe_file(name) for name in ("tokenizer.json", "vocabulary.csv")}
        (self._folder / "dataset.json").write_text(json.dumps(self.facts, indent=2) + "\n", encoding="utf-8")
        return self.facts

    def _describe_file(self, name: str) -> dict[str, Any]:
        path = self._folder / name
        return {"bytes": path.stat().st_size, "sha256": sha256(path)}
