"""What next sentence prediction owes to words in common, and to form alone: three logistic regressions.

`overlap` sees how many words A and B share, also as a share of all (Jaccard) and with rare words counting more (by
-log of their frequency), and the two lengths. `format` sees the length and punctuation of each sentence for itself:
above one half, it would have found that pairs of the two labels are made differently. `style` also sees how far A's
and B's lengths and punctuation are apart, which may tell, because one author wrote both. All read what the
model reads, so masked words are not there, and are fitted on training pairs.

Shapes: P pairs, F features.
"""

from typing import Any

import numpy as np

from babybert.data.pairs import ranges
from babybert.data.table import Examples
from babybert.data.tokenizer import FIRST_ORDINARY, MASK, Tokenizer
from babybert.errors import UsageError
from babybert.evaluation.scores import unigram_log_probs

MOST_FITTED = 50_000  # training pairs, spread evenly: plenty for some fifty weights
KINDS = ("overlap", "style", "format")
PUNCTUATION = (".", ",", "!", "?", "'", "(", ")", '"', ":", ";", "-")


def scikit_learn(name: str) -> Any:
    """The module `sklearn.NAME`. Raises UsageError where it is not installed."""
    try:
        import importlib

        return importlib.import_module(f"sklearn.{name}")
    except ImportError as error:
        raise UsageError("needs scikit-learn: pip install 'babybert-pretrain[evaluate]'") from error


def take(examples: Examples, rows: np.ndarray) -> Examples:
    """The pairs with these indices."""
    own = np.diff(examples.offsets)[rows]
    flat = ranges(examples.offsets[rows], own)
    offsets = np.concatenate([[0], np.cumsum(own)])
    return Examples(examples.ids[flat], examples.labels[flat], examples.segments[flat], offsets, examples.is_next[rows])


def nsp_baselines(
    train: Examples, held_out: Examples, tokenizer: Tokenizer, counts_V: np.ndarray
) -> dict[str, np.ndarray]:
    """By name, the probability (P) that B follows A in each held-out pair. Raises UsageError without scikit-learn."""
    linear, preprocessing, pipeline = (scikit_learn(name) for name in ("linear_model", "preprocessing", "pipeline"))
    fitted = take(train, np.linspace(0, len(train) - 1, min(len(train), MOST_FITTED)).astype(np.int64))
    punctuation = np.array([i for i in map(tokenizer.id_of, PUNCTUATION) if i is not None], np.int64)
    found = {}
    for name in KINDS:
        features = [_features(name, examples, counts_V, punctuation) for examples in (fitted, held_out)]
        if len(np.unique(fitted.is_next)) < 2:  # of one class alone nothing can be fitted
            found[name] = np.full(len(held_out), float(fitted.is_next[0]))
            continue
        model = pipeline.make_pipeline(preprocessing.StandardScaler(), linear.LogisticRegression(max_iter=1000))
        model.fit(features[0], fitted.is_next)
        found[name] = model.predict_proba(features[1])[:, 1]
    return found


def _features(name: str, examples: Examples, counts_V: np.ndarray, punctuation: np.ndarray) -> np.ndarray:
    if name == "overlap":
        return np.concatenate([lengths(examples), overlap(examples, counts_V, punctuation)], 1)
    alone = np.concatenate([lengths(examples), marks(examples, punctuation)], 1)
    return alone if name == "format" else np.concatenate([alone, np.abs(alone[:, 0::2] - alone[:, 1::2])], 1)


def _pair_of(examples: Examples) -> np.ndarray:
    return np.repeat(np.arange(len(examples)), np.diff(examples.offsets))


def lengths(examples: Examples) -> np.ndarray:
    """Tokens of A and of B, and their logarithms (P, 4)."""
    pair, words = _pair_of(examples), examples.ids >= MASK  # [MASK] and [UNK] stand for words
    a, b = (np.bincount(pair, words & (examples.segments == segment), len(examples)) for segment in (1, 2))
    return np.stack([a, b, np.log1p(a), np.log1p(b)], 1)


def overlap(examples: Examples, counts_V: np.ndarray, punctuation: np.ndarray) -> np.ndarray:
    """Distinct words in common: their number, share, weight by rarity, and that as a share (P, 4). No punctuation."""
    pair, size = _pair_of(examples), len(counts_V)
    word = (examples.ids >= FIRST_ORDINARY) & ~np.isin(examples.ids, punctuation)
    code = pair * size + examples.ids
    a, b = (np.unique(code[word & (examples.segments == segment)]) for segment in (1, 2))
    shared, either = np.intersect1d(a, b, assume_unique=True), np.union1d(a, b)
    rarity_V = -unigram_log_probs(counts_V)

    def tally(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.bincount(codes // size, minlength=len(examples)), np.bincount(
            codes // size, rarity_V[codes % size], len(examples)
        )

    (number, weight), (all_number, all_weight) = tally(shared), tally(either)
    return np.stack([number, number / np.maximum(all_number, 1), weight, weight / np.maximum(all_weight, 1e-9)], 1)


def marks(examples: Examples, punctuation: np.ndarray) -> np.ndarray:
    """How often each punctuation mark stands in A and in B (P, 2 x marks)."""
    pair = _pair_of(examples)
    columns = [
        np.bincount(pair, (examples.ids == mark) & (examples.segments == segment), len(examples))
        for mark in punctuation
        for segment in (1, 2)
    ]
    return np.stack(columns, 1) if columns else np.zeros((len(examples), 0))
