"""The settings of the commands that look at data, models and runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from babybert.config.fields import (
    option,
    require,
    require_at_least,
    require_seed,
    require_usable_numbers,
)

CHECKPOINT_HELP = "a run (its newest valid checkpoint) or one checkpoint"


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a checkpoint on held-out pairs, next to chance and the unigram, bigram and word-overlap baselines."""

    checkpoint: Path = option(Path("runs/demo"), CHECKPOINT_HELP)
    data: Path = option(Path("data/demo"), "folder that `babybert prepare` wrote")
    max_pairs: int | None = option(None, "score only this many held-out pairs")
    batch_size: int = option(64, "pairs per batch; changes the speed, not the result")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: a GPU if there is one")
    plot: Path | None = option(None, "draw calibration, and loss by frequency and position, as PATH.png and PATH.svg")
    json: bool = option(False, "print JSON instead of tables")

    def __post_init__(self) -> None:
        require_usable_numbers(self)
        require(self.max_pairs is None or self.max_pairs >= 1, f"max_pairs is {self.max_pairs}; it must be at least 1")
        require_at_least(self, 1, "batch_size")


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
    is_next: bool = option(True, "the label: B follows A")
    seed: int = option(0, "seed of the masks, and of the weights without a checkpoint")
    json: bool = option(False, "print JSON")

    def __post_init__(self) -> None:
        require_usable_numbers(self)
        require_seed(self.seed)


@dataclass(frozen=True)
class InfoConfig:
    """Describe and check a dataset, table, tokenizer, checkpoint or run."""

    rows: int = option(3, "rows to show as text")
    tokenizer: Path | None = option(None, "for a single table: the tokenizer.json that its ids come from")
    skip_bad_rows: bool = option(False, "for a single table: count and skip bad rows; the default is to stop")
    ops: bool = option(False, "list which implementation of each operation is used on this machine, and why")
    json: bool = option(False, "print JSON")

    def __post_init__(self) -> None:
        require_usable_numbers(self)
        require(self.rows >= 0, f"rows is {self.rows}; it must not be negative")


@dataclass(frozen=True)
class PlotConfig:
    """Draw the curves of runs: losses, accuracies, learning rate and throughput, as PNG and SVG."""

    out: Path = option(Path("runs/plot"), "path of the figure, without an ending")
