"""Counts over the pairs of one split: a sum over its blocks, in any order."""

import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from babybert.data.dataset import describe_only_label
from babybert.data.table import Examples
from babybert.data.tokenizer import UNK

logger = logging.getLogger(__name__)

SUMS = ("sentences", "pairs", "positive_pairs", "without_negative", "tokens", "masked_tokens", "unknown_tokens")


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

    def merge(self, others: "SplitStatistics") -> None:
        """Add the counts over other pairs of the split. The number of documents stays."""
        for name in SUMS:
            setattr(self, name, getattr(self, name) + getattr(others, name))
        self.longest = max(self.longest, others.longest)
        self.token_counts_V += others.token_counts_V

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
