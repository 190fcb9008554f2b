"""A folder of prepared data: opened, verified, and read into flat arrays.

`dataset.json` is written last and has the SHA-256 of every file. A folder without it is not a dataset, and a file that
differs from it is refused. The digests of shards are computed again only if a file's size or modification time has
changed.
"""

import csv
import hashlib
import json
import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from babybert.corpus.files import BadRows
from babybert.data.cache import CACHE_FORMAT, build_cache, open_cache, stamp_cache
from babybert.data.digest import sha256
from babybert.data.table import Examples, read_table
from babybert.data.tokenizer import Tokenizer
from babybert.errors import DataError
from babybert.progress import Progress

logger = logging.getLogger(__name__)

FORMAT = 2
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Dataset:
    """Prepared data. `open_dataset` opens it.

    Attributes:
        folder: the folder that `babybert prepare` wrote.
        facts: the content of `dataset.json`.
        tokenizer: the tokenizer that the data was made with.
        per_node: whether each machine has its own copy of the pairs; see `S3Dataset`.
    """

    per_node: ClassVar[bool] = False

    folder: Path
    facts: dict[str, Any]
    tokenizer: Tokenizer

    def shards(self, split: str) -> list[Path]:
        """Return the files of `train` or `validation`, in order."""
        return [self.folder / shard["file"] for shard in self.facts["shards"][split]]

    def examples(self, split: str) -> Examples:
        """Return the pairs of `train` or `validation`, mapped from a cache that is built if necessary.

        Raises DataError if a shard is missing or differs from what `dataset.json` recorded.
        """
        stamps = self._stamps(split)
        cache = self._cache_folder(split)
        examples = open_cache(cache, stamps)
        if examples is not None:
            return examples
        # The cache is missing, or a shard was touched. A touched shard may still have the same content.
        self.verify(split)
        examples = open_cache(cache)
        if examples is not None:
            stamp_cache(cache, stamps)
            return examples
        return build_cache(cache, lambda: self._read(split), stamps)

    def _stamps(self, split: str) -> dict[str, Any]:
        """Return the size and modification time of each shard."""
        stamps = {}
        for path in self.shards(split):
            if not path.is_file():
                raise DataError(f"{path}: missing; prepare the data again")
            status = path.stat()
            stamps[path.name] = [status.st_size, status.st_mtime_ns]
        return stamps

    def _cache_folder(self, split: str) -> Path:
        key = self._joint_digest(str(CACHE_FORMAT) + self.tokenizer.digest, split)
        return self.folder / ".cache" / f"{split}-{key[:16]}"

    def _joint_digest(self, prefix: str, split: str) -> str:
        shard_digests = "".join(shard["sha256"] for shard in self.facts["shards"][split])
        return hashlib.sha256((prefix + shard_digests).encode()).hexdigest()

    def verify(self, split: str) -> None:
        """Compute the digests of all shards of a split. Raises DataError if one is missing or differs."""
        for path, shard in zip(self.shards(split), self.facts["shards"][split], strict=True):
            check_sha256(path, shard["sha256"])

    def _read(self, split: str) -> Iterator[Examples]:
        with Progress(f"read {split}", self.facts[split]["pairs"], "pairs") as progress:
            for path in self.shards(split):
                for chunk in read_table(path, self.tokenizer.size, BadRows()):
                    yield chunk
                    progress.advance(len(chunk))

    @property
    def digest(self) -> str:
        """SHA-256 of the tokenizer and the training rows: what the order of a run's batches depends on."""
        return self._joint_digest(self.tokenizer.digest, "train")

    def token_counts(self) -> np.ndarray:
        """Return how often each token occurs in the training pairs (int64, one per token id).

        Raises DataError if `vocabulary.csv` is missing or differs from what `dataset.json` recorded.
        """
        path = self.folder / "vocabulary.csv"
        check_sha256(path, self.facts["files"][path.name]["sha256"])
        csv.field_size_limit(sys.maxsize)  # earlier versions kept words of any length
        # Not with pandas: it takes 40 MB, and training does not use it otherwise.
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.reader(file)
            column = next(rows).index("count")
            return np.array([row[column] for row in rows], np.int64)


def open_dataset(folder: Path) -> Dataset:
    """Open a folder of prepared data. Raises DataError if it is missing, incomplete, or of another format."""
    path = folder / "dataset.json"
    if not path.is_file():
        raise DataError(
            f"{folder}: no dataset.json, so the data is missing or incomplete; run `babybert prepare --out {folder}`"
        )
    facts = parse_description(path.read_bytes(), str(path))
    check_sha256(folder / "tokenizer.json", facts["files"]["tokenizer.json"]["sha256"])
    return Dataset(folder, facts, Tokenizer.load(folder / "tokenizer.json"))


def parse_description(content: bytes, place: str) -> dict[str, Any]:
    """Return what `dataset.json` says. Raises DataError, which names `place`, if it is damaged or of another format."""
    try:
        facts: dict[str, Any] = json.loads(content)
        if facts["format"] != FORMAT:
            raise DataError(
                f"{place}: format {facts['format']}; this version reads format {FORMAT}: prepare the data again"
            )
        for name in ("tokenizer.json", "vocabulary.csv"):
            assert isinstance(facts["files"][name]["sha256"], str)
        for split in SPLITS:
            assert facts[split]["pairs"] == sum(shard["rows"] for shard in facts["shards"][split])
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise DataError(f"{place}: not a description of prepared data ({error!r}); prepare the data again") from error
    return facts


def unigram_entropy(counts: np.ndarray) -> float:
    """Return the entropy in nats of tokens with these counts: the loss of the unigram baseline on the same tokens."""
    shares = counts[counts > 0] / counts.sum()
    return abs(math.fsum((shares * np.log(shares)).tolist()))  # the sum is at most 0; a minus sign would give -0.0


def describe_only_label(split: str, label: int) -> str:
    """What follows if all pairs of a split have this `is_next`: a constant answer is right for each of them."""
    effect = "the model cannot learn NSP" if split == "train" else "NSP cannot be scored"
    return (
        f"all {split} pairs have is_next {label}: {effect}, and its results are left out; "
        "for both labels, more documents with different sentences are needed"
    )


def warn_of_only_label(split: str, examples: Examples) -> None:
    """Log a warning if all these pairs have one label."""
    if examples.only_label is not None:
        logger.warning(describe_only_label(split, examples.only_label))


def check_sha256(path: Path, expected: str) -> None:
    """Raise DataError unless `path` is a file with this SHA-256."""
    if not path.is_file():
        raise DataError(f"{path}: missing; prepare the data again")
    if sha256(path) != expected:
        raise differs(str(path))


def differs(place: str) -> DataError:
    """The error for a file or object that has another SHA-256 than it should have."""
    return DataError(f"{place}: differs from what dataset.json recorded; prepare the data again")
