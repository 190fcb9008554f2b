"""What a classifier reads for a text or a pair: one function for training and serving, so that both are the same.

A text that is too long keeps its start and its end. Sun et al. (2019) compared what to keep of IMDB's reviews: 128
tokens of the start and 382 of the end were better than the start or the end alone. A pair loses the end of its longer
text, as in pretraining.
"""

import numpy as np

from babybert.config import ClassifierConfig
from babybert.data.pairs import SPECIALS_IN_A_PAIR, truncate_longest_first
from babybert.data.tokenizer import CLS, SEP

SPECIALS_IN_A_TEXT = 2  # [CLS] text [SEP]


def input_length(length_a: int, length_b: int | None) -> int:
    """The tokens of the input for texts of these lengths, special ones included, before it is cut."""
    return length_a + SPECIALS_IN_A_TEXT if length_b is None else length_a + length_b + SPECIALS_IN_A_PAIR


def classifier_input(a: np.ndarray, b: np.ndarray | None, classifier: ClassifierConfig) -> tuple[np.ndarray, int]:
    """Return the ids of `[CLS] A [SEP]` or `[CLS] A [SEP] B [SEP]`, and how many of them are of segment 1.

    The others are of segment 2. The input is cut to `classifier.positions`.
    """
    if b is None:
        kept = _without_middle(a, classifier.positions - SPECIALS_IN_A_TEXT, classifier.head_share)
        return np.concatenate([[CLS], kept, [SEP]]).astype(np.int32), len(kept) + 2
    length_a, length_b = truncate_longest_first(len(a), len(b), classifier.positions - SPECIALS_IN_A_PAIR)
    return np.concatenate([[CLS], a[:length_a], [SEP], b[:length_b], [SEP]]).astype(np.int32), length_a + 2


def _without_middle(ids: np.ndarray, longest: int, head_share: float) -> np.ndarray:
    if len(ids) <= longest:
        return ids
    head = round(longest * head_share)
    return np.concatenate([ids[:head], ids[len(ids) - (longest - head) :]])
