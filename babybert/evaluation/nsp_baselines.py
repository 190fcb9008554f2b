"""Baselines for next sentence prediction: three logistic regressions on features that a person can name.

- `overlap`, the word-overlap baseline: how many words A and B share, as a number, as a share of all their words (the
  Jaccard index), and both with rare words counting more (by -log of their frequency); and the two lengths.
- `format`: length and punctuation of each sentence by itself. An accuracy above one half would mean that the pairs of
  the two labels are made differently, so that a model could be right without comparing the sentences.
- `style`: also how far A's and B's lengths and punctuation differ. That may be informative, because both sentences of a
  positive pair are by one author.

They read what the model reads (masked words are hidden from them too) and are fitted on training pairs.

Shapes: P pairs, F features.
"""

import importlib
from typing import Any

import numpy as np

from babybert.data.sentence_ends import OTHER_SENTENCE_ENDS
from babybert.data.table import Examples, take
from babybert.data.tokenizer import FIRST_ORDINARY, MASK, Tokenizer
from babybert.errors import DataError, UsageError
from babybert.evaluation.scores import unigram_log_probs

MOST_FITTED = 50_000  # training pairs, evenly spread over the table: plenty for some fifty weights
BASELINES = ("overlap", "style", "format")
PUNCTUATION = (".", ",", "!", "?", "'", "(", ")", '"', ":", ";", "-", *OTHER_SENTENCE_ENDS)
SEGMENTS = (1, 2)  # of A and of B


def scikit_learn(name: str) -> Any:
    """The module `sklearn.<name>`. Raises UsageError where scikit-learn is not installed."""
    try:
        return importlib.import_module(f"sklearn.{name}")
    except ImportError as error:
        raise UsageError("needs scikit-learn: pip install 'babybert-pretrain[evaluate]'") from error


def nsp_baselines(
    train: Examples, held_out: Examples, tokenizer: Tokenizer, counts_V: np.ndarray
) -> dict[str, np.ndarray]:
    """For each baseline, the probability (P) that B follows A in each held-out pair.

    `counts_V` are the token counts of the training pairs. Raises UsageError without scikit-learn, and DataError if all
    training pairs have one label, because a regression needs both.
    """
    linear_model = scikit_learn("linear_model")
    preprocessing = scikit_learn("preprocessing")
    pipeline = scikit_learn("pipeline")
    rows = np.linspace(0, len(train) - 1, min(len(train), MOST_FITTED)).astype(np.int64)
    fitted = take(train, rows)
    if fitted.only_label is not None:
        raise DataError(f"all training pairs have is_next {fitted.only_label}")
    mark_ids = [tokenizer.id_of(mark) for mark in PUNCTUATION]
    punctuation = np.array([mark_id for mark_id in mark_ids if mark_id is not None], np.int64)
    probabilities = {}
    for name in BASELINES:
        regression = pipeline.make_pipeline(
            preprocessing.StandardScaler(), linear_model.LogisticRegression(max_iter=1000)
        )
        regression.fit(_features(name, fitted, counts_V, punctuation), fitted.is_next)
        held_out_features = _features(name, held_out, counts_V, punctuation)
        probabilities[name] = regression.predict_proba(held_out_features)[:, 1]
    return probabilities


def _features(baseline: str, examples: Examples, counts_V: np.ndarray, punctuation: np.ndarray) -> np.ndarray:
    """The features (P, F) of one of the baselines."""
    if baseline == "overlap":
        return np.concatenate([lengths(examples), overlap(examples, counts_V, punctuation)], 1)
    features_PF = np.concatenate([lengths(examples), marks(examples, punctuation)], 1)
    if baseline == "format":
        return features_PF
    of_a, of_b = features_PF[:, 0::2], features_PF[:, 1::2]  # A and B alternate in both groups of columns
    return np.concatenate([features_PF, np.abs(of_a - of_b)], 1)


def lengths(examples: Examples) -> np.ndarray:
    """Tokens of A and of B, and their logarithms (P, 4)."""
    pair = _pair_index(examples)
    is_word = examples.ids >= MASK  # [MASK] and [UNK] stand for words
    a, b = (np.bincount(pair, is_word & (examples.segments == segment), len(examples)) for segment in SEGMENTS)
    return np.stack([a, b, np.log1p(a), np.log1p(b)], 1)


def overlap(examples: Examples, counts_V: np.ndarray, punctuation: np.ndarray) -> np.ndarray:
    """What A and B share of their distinct words, without punctuation (P, 4).

    The columns are the number of shared words, that as a share of all, and both weighted by the words' rarity.
    """
    vocab_size = len(counts_V)
    is_word = (examples.ids >= FIRST_ORDINARY) & ~np.isin(examples.ids, punctuation)
    # One number for each pair and word, so that sets of them are sets of words, pair by pair.
    code = _pair_index(examples) * vocab_size + examples.ids
    a, b = (np.unique(code[is_word & (examples.segments == segment)]) for segment in SEGMENTS)
    rarity_V = -unigram_log_probs(counts_V)

    def totals(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many words each pair has among the codes, and the sum of their rarities (P each)."""
        pair, word = np.divmod(codes, vocab_size)
        return np.bincount(pair, minlength=len(examples)), np.bincount(pair, rarity_V[word], len(examples))

    shared_words, shared_rarity = totals(np.intersect1d(a, b, assume_unique=True))
    all_words, all_rarity = totals(np.union1d(a, b))
    shared_share = shared_words / np.maximum(all_words, 1)
    shared_rarity_share = shared_rarity / np.maximum(all_rarity, 1e-9)
    return np.stack([shared_words, shared_share, shared_rarity, shared_rarity_share], 1)


def marks(examples: Examples, punctuation: np.ndarray) -> np.ndarray:
    """How often each punctuation mark occurs in A and in B (P, 2 x marks): A and B of the first mark, and so on."""
    pair = _pair_index(examples)
    columns = [
        np.bincount(pair, (examples.ids == mark) & (examples.segments == segment), len(examples))
        for mark in punctuation
        for segment in SEGMENTS
    ]
    return np.stack(columns, 1) if columns else np.zeros((len(examples), 0))


def _pair_index(examples: Examples) -> np.ndarray:
    """For each token, the index of its pair."""
    return np.repeat(np.arange(len(examples)), np.diff(examples.offsets))
