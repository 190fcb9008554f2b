"""The settings of `babybert finetune`, in groups; those of every training run are in `run_options.py`."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from babybert.config.evaluation_config import CHECKPOINT_HELP
from babybert.config.fields import option, require, require_at_least, require_seed, require_usable_numbers
from babybert.config.pretrain_config import ScheduleOptions
from babybert.config.run_options import CheckpointOptions, DeviceOptions, MetricsOptions
from babybert.s3 import is_s3, split_address

SHORTEST = 8  # positions: [CLS], A, [SEP], B, [SEP] with a few tokens each


@dataclass(frozen=True)
class LabelledOptions:
    """The labelled texts, and how the model reads them."""

    corpus: Literal["imdb", "csv", "jsonl", "parquet"] = option(
        "imdb", "imdb: the archive or its folder, with classes pos and neg; csv, jsonl, parquet: any classes"
    )
    source: tuple[str, ...] = option(
        ("data/downloads/aclImdb_v1.tar.gz",),
        "files, folders, patterns or s3:// addresses; the default is where prepare puts IMDB",
    )
    validation_source: tuple[str, ...] = option(
        (), "texts that are scored after each epoch; none: a share of the training texts is held out"
    )
    test_source: tuple[str, ...] = option(
        (), "texts that are scored once, at the end; imdb: its own test half, if none are given"
    )
    text_column: str = option("text", "csv, jsonl, parquet: the column or key with the texts", is_text=True)
    pair_column: str | None = option(
        None, "the column or key with second texts: the model then reads pairs, [CLS] A [SEP] B [SEP]", is_text=True
    )
    label_column: str = option("label", "csv, jsonl, parquet: the column or key with the class names", is_text=True)
    delimiter: Literal["auto", ",", ";", "tab", "|"] = option(
        "auto", "csv: what separates the cells; auto: what the header uses"
    )
    skip_bad_rows: bool = option(
        False, "count and skip rows that are bad, such as those with an empty text; the default is to stop"
    )
    validation_fraction: float = option(0.1, "share of the training texts held out, by their digest")
    validation_texts: int = option(2000, "held-out texts scored after each epoch; the first in the order of digests")
    train_texts: int | None = option(
        None, "train on at most this many texts, chosen by their digest: how much do few labels give?"
    )
    test_texts: int | None = option(None, "score at most this many test texts, chosen by their digest, for a quick try")
    positions: int = option(
        256, "longest input in tokens; longer texts lose their middle, pairs the end of the longer text"
    )
    head_share: float = option(
        0.25, "of a text that is cut, the share kept from its start: the best of Sun et al. (2019), 128 of 510 tokens"
    )

    def check_labelled(self) -> None:
        """Raise UsageError for values that cannot work."""
        for source in (*self.source, *self.validation_source, *self.test_source):
            require(bool(source), "a source is an empty text; it must name a file, a folder or an s3:// address")
            if is_s3(source):
                split_address(source)
        require(bool(self.source), "--source is missing: name the labelled texts")
        require(
            self.corpus != "imdb" or self.pair_column is None,
            "pair_column is for csv, jsonl and parquet; IMDB's reviews are single texts",
        )
        require(
            0 < self.validation_fraction < 1,
            f"validation_fraction is {self.validation_fraction}; it must be between 0 and 1",
        )
        for name in ("train_texts", "test_texts"):
            value = getattr(self, name)
            require(value is None or value >= 2, f"{name} is {value}; it must be at least 2")
        require_at_least(self, SHORTEST, "positions")
        require_at_least(self, 1, "validation_texts")
        names = [self.text_column, self.label_column, *([self.pair_column] if self.pair_column else [])]
        require(len(set(names)) == len(names), f"columns {', '.join(names)}: each must be another one")
        require(0 <= self.head_share <= 1, f"head_share is {self.head_share}; it must be from 0 to 1")


@dataclass(frozen=True)
class ClassifierOptions:
    """The classifier and its optimizer."""

    dropout: float = option(0.1, "of the encoder and the head, the BERT paper's value: labelled texts are few")
    batch_size: int = option(32, "texts per step over all devices; of the BERT paper's 16 and 32 the faster one")
    accumulate: int = option(1, "split a step into this many micro-batches: less memory, the same gradient")
    bucketing: bool = option(True, "batch texts of similar length together: little padding")
    lr: float = option(
        5e-4, "peak learning rate; BERT's 2e-5 to 5e-5 are for networks a hundred times as large, which move faster"
    )
    weight_decay: float = option(0.01, "of matrices and tables; the BERT paper's value")
    clip_norm: float = option(1.0, "clip gradients to this norm; the BERT paper's value")
    balance_classes: bool = option(
        False, "weight the loss of each class by the inverse of its share, so that rare classes count as much"
    )
    from_scratch: bool = option(
        False, "start from random weights instead of the checkpoint's: shows what pretraining is worth"
    )
    seed: int = option(0, "seed of the head's weights, dropout, the held-out texts and the order of texts")

    def check_classifier(self) -> None:
        """Raise UsageError for values that cannot work."""
        require(0 <= self.dropout < 1, f"dropout is {self.dropout}; it must be at least 0 and below 1")
        require_at_least(self, 1, "batch_size", "accumulate")
        for name in ("lr", "clip_norm"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be a number above 0")
        require(self.weight_decay >= 0, f"weight_decay is {self.weight_decay}; it must not be negative")
        require_seed(self.seed)


@dataclass(frozen=True)
class FinetuneConfig(
    LabelledOptions,
    ClassifierOptions,
    ScheduleOptions,
    DeviceOptions,
    CheckpointOptions,
    MetricsOptions,
):
    """Train a pretrained model to classify texts or pairs of texts, on labelled examples."""

    checkpoint: str = option(
        "runs/demo", f"what to start from: {CHECKPOINT_HELP}, in a folder or at s3://bucket/prefix"
    )
    out: Path = option(Path("runs/classifier"), "folder of the run: checkpoints and metrics.jsonl")
    epochs: int = option(3, "passes over the texts; the BERT paper's 2 to 4: more only memorises few labels")
    compare: bool = option(
        False,
        "also score a bag of words, the same network from random weights, and a linear probe of the frozen model, on "
        "the same texts; needs scikit-learn, and the time of another run",
    )
    json: bool = option(False, "print the scores as JSON")

    def __post_init__(self) -> None:
        require_usable_numbers(self)
        self.check_labelled()
        self.check_classifier()
        self.check_schedule()
        self.check_checkpoints()
        self.check_metrics()
        if is_s3(self.checkpoint):
            split_address(self.checkpoint)

    def as_json(self) -> dict[str, Any]:
        """The settings as `state.json` and `summary.json` keep them."""
        settings = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
