"""The settings of `babybert prepare`."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from babybert.config.fields import (
    UNSET,
    option,
    require,
    require_at_least,
    require_seed,
    require_usable_numbers,
    unset_option,
)
from babybert.s3 import is_s3, split_address

RAY_ADDRESS = re.compile(r"auto|[^\s/]+:\d{1,5}")
TOKENIZER_TRAINING = ("tokenizer_kind", "vocab_size", "min_frequency")  # have no meaning with --tokenizer


@dataclass(frozen=True)
class PrepareConfig:
    """Turn a corpus into a tokenizer, a training table and a validation table."""

    corpus: Literal["demo", "imdb", "text", "csv", "jsonl", "parquet", "table"] = option(
        "demo",
        "demo: generated reviews; imdb: the public reviews; text, csv, jsonl, parquet: your own documents; "
        "table: pairs that are masked already",
    )
    source: tuple[str, ...] = option(
        (), "files, folders, patterns or s3:// addresses; for imdb, the public archive is downloaded if none is given"
    )
    validation_source: tuple[str, ...] = option((), "table: the held-out rows")
    out: Path | str = option(Path("data/demo"), "folder or s3:// address for the prepared data")
    text_column: str = option("text", "csv, jsonl, parquet: the column or key that holds the documents", is_text=True)
    delimiter: Literal["auto", ",", ";", "tab", "|"] = option(
        "auto", "csv, table: what separates the cells; auto: what the header uses"
    )
    documents: Literal["files", "blank-lines"] = option(
        "files", "text: a document is a whole file, or a paragraph between blank lines"
    )
    limit: int | None = option(
        None,
        "use at most this many documents, for a quick try: the first ones (imdb, sorted by rating: evenly spaced ones)",
    )
    demo_documents: int = option(4000, "demo: reviews to generate; enough for a tiny model to learn NSP")
    skip_bad_rows: bool = option(
        False, "count and skip rows that are bad, and files from where they are damaged; the default is to stop"
    )
    download_folder: Path = option(Path("data/downloads"), "folder for the public archive")
    tokenizer: Path | None = option(
        None,
        "a tokenizer.json to reuse, so that the data fits an existing model; excludes the settings of its training",
    )
    train_tokenizer: bool = option(
        False, "build the tokenizer from this corpus; the default unless --tokenizer is given"
    )
    tokenizer_kind: Literal["basic-english", "wordpiece"] = unset_option(
        "basic-english", "basic-english: whole words, as the reference; wordpiece: BERT's subwords, few unknown words"
    )
    vocab_size: int | None = option(
        None,
        "vocabulary limit, special tokens included; none: all words (basic-english) or 30,522 (wordpiece, as BERT)",
    )
    min_frequency: int = unset_option(1, "rarer words become [UNK]; 1 keeps all, as the reference does")
    validation_fraction: float = option(0.05, "share of documents held out; copies of a text are all on one side")
    segments: Literal["sentences", "runs"] = option(
        "sentences",
        "what A and B are; sentences: one sentence each, as the reference; runs: as many consecutive sentences as fit "
        "into max_positions, as BERT",
    )
    max_positions: int = option(128, "longest pair in tokens; 95 % of IMDB's pairs of sentences are shorter than 80")
    duplicates: int = option(
        1, "copies of each training pair with different masks; BERT used 10, --masking dynamic needs only 1"
    )
    format: Literal["csv", "csv.gz", "csv.zst", "parquet"] = option(
        "csv", "format of the table; every tool opens csv, the others are smaller"
    )
    shard_mb: int = option(
        64,
        "about how large each file of the table is, in MB, if there are more than eight; it has at least one block of "
        "two million tokens",
    )
    engine: Literal["local", "ray"] = option(
        "local",
        "where the work is done; local: processes on this machine; ray: a Ray cluster. The data is the same",
    )
    workers: int | None = option(
        None,
        "processes that prepare the data, which does not depend on it; none: one for each usable core, with "
        "ray_address all CPUs of the cluster",
    )
    ray_address: str | None = option(
        None, "ray: the address of a running cluster; none: one is started on this machine and stopped at the end"
    )
    seed: int = option(0, "seed of the split, the pairs and the masks; the same seed writes the same files")
    overwrite: bool = option(False, "replace data that is already there")

    def __post_init__(self) -> None:
        require_usable_numbers(self)
        if is_s3(str(self.out)):
            split_address(str(self.out))
        self._check_sources()
        self._check_tokenizer()
        require(self.limit is None or self.limit >= 2, f"limit is {self.limit}; it must be at least 2 documents")
        require_at_least(self, 2, "demo_documents")
        require(
            0 < self.validation_fraction < 1,
            f"validation_fraction is {self.validation_fraction}; it must be between 0 and 1",
        )
        require(
            8 <= self.max_positions <= 512,
            f"max_positions is {self.max_positions}; it must be from 8 to 512, the model's positions",
        )
        require_at_least(self, 1, "duplicates", "shard_mb")
        require(
            self.ray_address is None or self.engine == "ray",
            "--ray-address is for --engine ray: add it, or leave the address out",
        )
        require(
            self.ray_address is None or bool(RAY_ADDRESS.fullmatch(self.ray_address)),
            f"ray_address is {self.ray_address!r}; it must be HOST:PORT, or auto for the cluster of this machine",
        )
        require(self.workers is None or self.workers >= 1, f"workers is {self.workers}; it must be at least 1")
        require_seed(self.seed)

    def _check_tokenizer(self) -> None:
        """Give the settings of the tokenizer's training their values; with `tokenizer`, refuse them if they were given.

        Raises UsageError for these and for values that cannot work.
        """
        if self.tokenizer:
            require(not self.train_tokenizer, "--tokenizer and --train-tokenizer exclude each other")
            for name in TOKENIZER_TRAINING:
                require(
                    getattr(self, name) in (UNSET, None),
                    f"{name} is for training a tokenizer; --tokenizer has a vocabulary already: leave one of them out",
                )
            return
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is UNSET:
                object.__setattr__(self, field.name, field.metadata["default"])  # the dataclass is frozen
        require(
            self.vocab_size is None or 5 < self.vocab_size < 10**7,
            f"vocab_size is {self.vocab_size}; it must be above 5 and below 10,000,000",
        )
        require_at_least(self, 1, "min_frequency")

    def _check_sources(self) -> None:
        """Raise UsageError unless the sources fit the kind of corpus."""
        for source in (*self.source, *self.validation_source):
            require(bool(source), "a source is an empty text; it must name a file, a folder or an s3:// address")
        require(self.corpus in ("demo", "imdb") or bool(self.source), f"--corpus {self.corpus} needs --source")
        require(
            self.corpus != "demo" or not self.source,
            "--corpus demo does not support --source; name the kind of your files with --corpus",
        )
        if self.corpus == "table":
            require(
                bool(self.validation_source),
                "--corpus table needs --validation-source: pairs can no longer be held out by document",
            )
            require(self.segments == "sentences", "--segments is for documents; the pairs of --corpus table are made")
            require(self.tokenizer is not None, "--corpus table needs --tokenizer: the one that its ids come from")
        else:
            require(
                not self.validation_source,
                f"--validation-source is for --corpus table; --corpus {self.corpus} holds out documents itself",
            )
