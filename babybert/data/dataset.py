"""A folder that `babybert prepare` finished: opened, verified, and read into flat arrays.

`dataset.json` is written last and names every file with its SHA-256. A folder without it is not a dataset; a file that
differs from it is refused. Digests are computed again only when a file's size or time has changed.
"""

import csv
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from babybert.corpus.files import BadRows
from babybert.data.cache import CACHE_FORMAT, build_cache, open_cache, stamp_cache
from babybert.data.digest import sha256
from babybert.data.table import Examples, read_table
from babybert.data.tokenizer import Tokenizer
from babybert.errors import DataError
from babybert.progress import Progress

FORMAT = 2
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Dataset:
    """A finished folder, with its description and its tokenizer."""

    folder: Path
    facts: dict[str, Any]
    tokenizer: Tokenizer

    def shards(self, split: str) -> list[Path]:
        """The files of `train` or `validation`, in order."""
        return [self.folder / shard["file"] for shard in self.facts["shards"][split]]

    def examples(self, split: str) -> Examples:
        """The rows of `train` or `validation`, mapped from the cache, which is made if need be.

        Raises DataError if a shard is missing or not the one that was written.
        """
        facts = self.facts["shards"][split]
        stamps = {}
        for path in self.shards(split):
            if not path.is_file():
                raise DataError(f"{path}: missing; prepare the data again")
            stamps[path.name] = [path.stat().st_size, path.stat().st_mtime_ns]
        key = hashlib.sha256(
            "".join([str(CACHE_FORMAT), self.tokenizer.digest, *(shard["sha256"] for shard in facts)]).encode()
        ).hexdigest()
        cache = self.folder / ".cache" / f"{split}-{key[:16]}"
        examples = open_cache(cache, stamps)
        if examples is None:
            for path, shard in zip(self.shards(split), facts, strict=True):
                check_sha256(path, shard["sha256"])
            examples = open_cache(cache)
            if examples is not None:
                stamp_cache(cache, stamps)
        return build_cache(cache, lambda: self._read(split), stamps) if examples is None else examples

    def _read(self, split: str) -> Iterator[Examples]:
        with Progress(f"read {split}", self.facts[split]["pairs"], "pairs") as progress:
            for path in self.shards(split):
                for chunk in read_table(path, self.tokenizer.size, BadRows()):
                    yield chunk
                    progress.advance(len(chunk))

    @property
    def digest(self) -> str:
        """SHA-256 of what a run's order of pairs rests on: the training rows and the tokenizer."""
        return hashlib.sha256(
            "".join([self.tokenizer.digest, *(shard["sha256"] for shard in self.facts["shards"]["train"])]).encode()
        ).hexdigest()

    def token_counts(self) -> np.ndarray:
        """How often each token stands in the training pairs (int64, one a token id). Raises DataError."""
        path = self.folder / "vocabulary.csv"
        check_sha256(path, self.facts["files"][path.name]["sha256"])
        with path.open(
            newline="", encoding="utf-8"
        ) as file:  # by pandas it would take 40 MB that training has no other use for
            return np.array([row["count"] for row in csv.DictReader(file)], np.int64)


def open_dataset(folder: Path) -> Dataset:
    """Open a prepared folder. Raises DataError when it is missing, unfinished, or of another format."""
    path = folder / "dataset.json"
    if not path.is_file():
        raise DataError(
            f"{folder}: no dataset.json, so no (or not wholly) prepared data; run `babybert prepare --out {folder}`"
        )
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise DataError(
                f"{path}: format {facts['format']}; this version reads format {FORMAT}: prepare the data again"
            )
        check_sha256(folder / "tokenizer.json", facts["files"]["tokenizer.json"]["sha256"])
        for split in SPLITS:
            assert facts[split]["pairs"] == sum(shard["rows"] for shard in facts["shards"][split])
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a description of prepared data ({error!r}); prepare the data again") from error
    return Dataset(folder, facts, Tokenizer.load(folder / "tokenizer.json"))


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of words drawn with these frequencies: the loss of a model that knows only word counts."""
    share = counts[counts > 0] / counts.sum()
    return -math.fsum((share * np.log(share)).tolist())


def check_sha256(path: Path, expected: str) -> None:
    """Raise DataError unless `path` has this SHA-256."""
    if not path.is_file():
        raise DataError(f"{path}: missing; prepare the data again")
    if sha256(path) != expected:
        raise DataError(f"{path}: differs from what dataset.json recorded; prepare the data again")
