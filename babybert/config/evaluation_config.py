"""The settings of the commands that look at data, models and runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from babybert.config.cache_options import DATA_HELP, CacheOptions, check_address
from babybert.config.fields import (
    option,
    require,
    require_at_least,
    require_seed,
    require_usable_numbers,
)

TOKENS_PER_PAIR = 64  # in a batch of minimal pairs
CHECKPOINT_HELP = "a run (its newest valid checkpoint) or one checkpoint"


@dataclass(frozen=True)
class EvaluateConfig(CacheOptions):
    """Score a checkpoint on held-out pairs or on BLiMP, next to baselines that need no model."""

    checkpoint: Path = option(Path("runs/demo"), CHECKPOINT_HELP)
    data: Path | str = option(
        Path("data/demo"),
        f"{DATA_HELP}; with --blimp, only for the unigram and bigram baselines, which are left out if there is no such "
        "folder",
    )
    blimp: str | None = option(
        None,
        "score BLiMP's minimal pairs instead of the held-out pairs: its folder, a .tar.gz or .zip of it, or an s3:// "
        "address",
    )
    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto",
        "of the encoder; auto: bf16 on GPUs that support it, and from width 128 on CPUs with AMX or AVX512-BF16. The "
        "heads are always in fp32",
    )
    max_pairs: int | None = option(None, "score only this many held-out pairs")
    batch_size: int = option(
        64,
        f"pairs per batch; with --blimp as many tokens as in such pairs ({TOKENS_PER_PAIR} each); changes the speed, "
        "not the result",
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: a GPU if there is one")
    plot: Path | None = option(
        None,
        "draw calibration, and loss by frequency and position, as PATH.png and PATH.svg; with --blimp, accuracy by "
        "phenomenon",
    )
    json: bool = option(False, "print JSON instead of tables")

    def __post_init__(self) -> None:
        require_usable_numbers(self)
        check_address(self.data)
        self.check_cache()
        require(self.max_pairs is None or self.max_pairs >= 1, f"max_pairs is {self.max_pairs}; it must be at least 1")
        require_at_least(self, 1, "batch_size")
        require(
            self.blimp is None or self.max_pairs is None,
            "max_pairs is for held-out pairs; --blimp scores all of its pairs: leave one of them out",
        )


@dataclass(frozen=True)
class ProbeConfig:
    """Classify labelled documents with a linear probe on frozen states, next to bag-of-words and an untrained model."""

    checkpoint: Path = option(Path("runs/demo"), CHECKPOINT_HELP)
    corpus: Literal["imdb", "csv"] = option(
        "imdb", "imdb: the archive or its folder, with labels pos and neg; csv: any two labels"
    )
    source: tuple[str, ...] = option(
        ("data/downloads/aclImdb_v1.tar.gz",),
        "files, folders, patterns or s3:// addresses; the default is where prepare puts IMDB",
    )
    text_column: str = option("text", "csv: the column with the documents", is_text=True)
    label_column: str = option("label", "csv: the column with the labels", is_text=True)
    documents: int = option(2000, "at most this many training documents, and as many test documents")
    positions: int = option(128, "tokens used of each document; the length of the pairs that prepare makes")
    seed: int = option(0, "seed of the sample, the untrained weights and the bootstrap")
    batch_size: int = option(64, "documents per batch; changes the speed, not the result")
    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto",
        "of the encoder; auto: bf16 on GPUs that support it, and from width 128 on CPUs with AMX or AVX512-BF16. The "
        "heads are always in fp32",
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: a GPU if there is one")
    json: bool = option(False, "print JSON instead of a table")

    def __post_init__(self) -> None:
        require_usable_numbers(self)
        require_at_least(self, 4, "documents")
        require(self.positions >= 3, f"positions is {self.positions}; it must be at least 3: [CLS], a word and [SEP]")
        require_at_least(self, 1, "batch_size")
        require_seed(self.seed)


@dataclass(frozen=True)
class LookConfig:
    """Show what a checkpoint fills into fixed sentences, which words are neighbours, and where it attends."""

    checkpoint: Path = option(Path("runs/demo"), CHECKPOINT_HELP)
    words: tuple[str, ...] = option(
        ("good", "terrible", "movie", "he", "was", "ten"), "words whose nearest neighbours are shown", is_text=True
    )
    among: int = option(
        10_000, "search neighbours among this many first words of the vocabulary; rarer ones hardly moved"
    )
    text: str = option(
        "the movie was not bad , but the book is better .", "text whose attention is drawn", is_text=True
    )
    plot: Path | None = option(None, "draw the attention of each layer and head, as PATH.png and PATH.svg")
    json: bool = option(False, "print JSON")

    def __post_init__(self) -> None:
        require_usable_numbers(self)
        require_at_least(self, 1, "among")


@dataclass(frozen=True)
class ExplainConfig:
    """Follow one pair of sentences from its tokens to its two losses, with every number in between."""

    checkpoint: Path | None = option(
        None, f"{CHECKPOINT_HELP}; without it, an untrained model of the reference's sizes"
    )
    preference: bool = option(
        False,
        "instead, score A and B as two versions of one sentence: which one the model prefers, and the "
        "log-probability of each token",
    )
    is_next: bool = option(True, "the label: B follows A")
    seed: int = option(0, "seed of the masks, and of the weights without a checkpoint")
    json: bool = option(False, "print JSON")

    def __post_init__(self) -> None:
        require_usable_numbers(self)
        require_seed(self.seed)


@dataclass(frozen=True)
class InfoConfig(CacheOptions):
    """Describe and check a dataset, table, tokenizer, checkpoint or run."""

    rows: int = option(3, "rows to show as text")
    tokenizer: Path | None = option(None, "for a single table: the tokenizer.json that its ids come from")
    skip_bad_rows: bool = option(False, "for a single table: count and skip bad rows; the default is to stop")
    ops: bool = option(False, "list which implementation of each operation is used on this machine, and why")
    json: bool = option(False, "print JSON")

    def __post_init__(self) -> None:
        require_usable_numbers(self)
        self.check_cache()
        require(self.rows >= 0, f"rows is {self.rows}; it must not be negative")


@dataclass(frozen=True)
class PlotConfig:
    """Draw the curves of runs: losses, accuracies, learning rate and throughput, as PNG and SVG."""

    out: Path = option(Path("runs/plot"), "path of the figure, without an ending")
