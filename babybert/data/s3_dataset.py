"""A dataset in S3, fetched once for all processes of a machine.

`dataset.json` names the files and their SHA-256. A folder of the cache belongs to its content, so another dataset at
the same address has another folder. Files are fetched when they are needed: the shards of a split for its pairs,
`vocabulary.csv` for the counts. A file has its name only when it is complete and has the right digest, so a killed
process leaves complete files, with which the next one goes on. The first shard is converted to flat arrays while others
are fetched. A folder that was fetched completely is a dataset folder like any other.
"""

import contextlib
import hashlib
import logging
import os
import uuid
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar

import numpy as np

from babybert.corpus.files import BadRows
from babybert.data.cache import build_cache, open_cache
from babybert.data.dataset import Dataset, differs, open_dataset, parse_description
from babybert.data.digest import sha256
from babybert.data.s3_cache import CacheLimits, make_room, mark_used
from babybert.data.table import Examples, read_table
from babybert.data.tokenizer import Tokenizer
from babybert.errors import DataError, StorageError, os_reason
from babybert.folders import lock_folder, make_folder, write_file
from babybert.progress import Progress
from babybert.s3 import is_s3
from babybert.s3_prefix import S3Prefix
from babybert.s3_retry import RETRY_SECONDS

logger = logging.getLogger(__name__)

PARTIAL = ".fetch-"  # how the names of files begin that are being fetched
FILES_AT_ONCE = 4  # each in several parts, by boto3
ARRAY_BYTES = 9  # per token, and per pair; see `cache.py`


@dataclass(frozen=True)
class S3Dataset(Dataset):
    """Prepared data in S3. `open_s3_dataset` opens it.

    Attributes:
        prefix: where it is.
        cache: where it is kept.
        in_use: the open file that says that the folder is used.
    """

    prefix: S3Prefix
    cache: CacheLimits
    in_use: IO[bytes]

    per_node: ClassVar[bool] = True

    def examples(self, split: str) -> Examples:
        """Return the pairs of a split; see `Dataset.examples`. They are fetched if necessary;
        other processes of this machine wait for the first one.

        Raises DataError if a shard is missing or differs from what `dataset.json` recorded, UsageError if it does not
        fit into the cache, StorageError if it cannot be fetched.
        """
        arrays = self._cache_folder(split)
        examples = open_cache(arrays)
        if examples is not None:
            return examples
        with lock_folder(self.folder, "--cache", wait=True):
            examples = open_cache(arrays)  # another process may have built it meanwhile
            if examples is None:
                self._make_room(split)
                examples = build_cache(arrays, lambda: self._read(split), stamps={})
        return examples

    def token_counts(self) -> np.ndarray:
        """Return how often each token occurs; see `Dataset.token_counts`."""
        with lock_folder(self.folder, "--cache", wait=True):
            fetch_file(self.prefix, self.folder, "vocabulary.csv", self.facts["files"]["vocabulary.csv"]["sha256"])
        return super().token_counts()

    def verify(self, split: str) -> None:
        """Check the shards of a split; see `Dataset.verify`. Those that are not here are fetched."""
        with lock_folder(self.folder, "--cache", wait=True):
            self._make_room(split)
            for _ in self._fetch_shards(split):
                pass
        super().verify(split)

    def _make_room(self, split: str) -> None:
        facts, shards = self.facts[split], self.facts["shards"][split]
        arrays = ARRAY_BYTES * (facts["tokens_in_pairs"] + facts["pairs"])
        missing = sum(shard["bytes"] for shard in shards if not (self.folder / shard["file"]).exists())
        make_room(self.cache, self.folder, missing + arrays, self.prefix.address)

    def _read(self, split: str) -> Iterator[Examples]:
        """Yield the pairs of all shards, in order, as they are fetched."""
        shards = self.facts["shards"][split]
        total = sum(shard["bytes"] for shard in shards)
        with (
            Progress(f"fetch and read {split}", total, "bytes") as progress,
            contextlib.closing(self._fetch_shards(split)) as paths,
        ):
            for shard, path in zip(shards, paths, strict=True):
                for chunk in read_table(path, self.tokenizer.size, BadRows()):
                    yield chunk
                    progress.advance(shard["bytes"] * len(chunk) // shard["rows"])

    def _fetch_shards(self, split: str) -> Generator[Path]:
        """Yield the file of each shard, in order, as soon as it is here. Several are fetched at a time."""
        shards = self.facts["shards"][split]
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            try:
                yield from pool.map(
                    lambda shard: fetch_file(self.prefix, self.folder, shard["file"], shard["sha256"]), shards
                )
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def open_data(address: Path | str, cache: CacheLimits) -> Dataset:
    """Open prepared data in a folder or in S3; see `open_dataset` and `open_s3_dataset`."""
    return open_s3_dataset(str(address), cache) if is_s3(str(address)) else open_dataset(Path(address))


def open_s3_dataset(address: str, cache: CacheLimits, retry_seconds: float = RETRY_SECONDS) -> S3Dataset:
    """Open a dataset in S3.

    Raises DataError if there is no dataset or it is of another format, UsageError for a wrong address or a cache that
    cannot be written, StorageError if S3 is away.
    """
    prefix = S3Prefix(address, retry_seconds)
    content = prefix.get("dataset.json")
    if content is None:
        raise DataError(
            f"{prefix.address}: no dataset.json, so there is no dataset, or it is incomplete; "
            f"run `babybert prepare --out {prefix.address}`"
        )
    place = f"{prefix.address}/dataset.json"
    facts = parse_description(content, place)
    names = [*facts["files"], *(shard["file"] for shards in facts["shards"].values() for shard in shards)]
    for name in names:
        if name != os.path.basename(name) or name.startswith("."):  # noqa: PTH119 (a name, not a path)
            raise DataError(f"{place}: '{name}' is not the name of a file; prepare the data again")
    folder = cache.place / hashlib.sha256(content).hexdigest()[:32]
    make_folder(folder, "--cache")
    in_use = mark_used(folder)
    with lock_folder(folder, "--cache", wait=True):
        for partial in folder.glob(f"{PARTIAL}*"):  # of a process that was killed
            partial.unlink()
        write_file(folder / "dataset.json", content)
        tokenizer = fetch_file(prefix, folder, "tokenizer.json", facts["files"]["tokenizer.json"]["sha256"])
    return S3Dataset(folder, facts, Tokenizer.load(tokenizer), prefix, cache, in_use)


def fetch_file(prefix: S3Prefix, folder: Path, name: str, expected_sha256: str) -> Path:
    """Return the file of a dataset, which is fetched if it is not in `folder`.

    Raises DataError if there is no such object or it has another digest, StorageError if it cannot be fetched.
    """
    path = folder / name
    if path.exists():
        return path
    partial = folder / f"{PARTIAL}{uuid.uuid4().hex}"
    try:
        with partial.open("wb") as file:
            prefix.get_file(name, file)
        if sha256(partial) != expected_sha256:
            raise differs(f"{prefix.address}/{name}")
        partial.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {os_reason(error)}; make room, or choose --cache") from error
    finally:
        partial.unlink(missing_ok=True)
    return path
