"""`babybert evaluate --blimp`: how often a model finds the acceptable sentence of a minimal pair the likelier one.

BLiMP (Warstadt et al., 2020) has 67 paradigms in twelve phenomena of English grammar. A sentence's score is its
pseudo-log-likelihood (`pseudo_log_likelihood.py`); each sentence is scored once, however many pairs have it. Two equal
scores count as half a correct answer. The accuracy of a phenomenon, and of all, is the mean over its paradigms.

The baselines need no network: the sums of the words' log-probabilities under the unigram and the bigram baseline of the
masked words, and the length, which prefers the sentence with fewer tokens.

Shapes: P pairs, S distinct sentences, N tokens of all of them, K predictors, R resamples, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from babybert.corpus.minimal_pairs import MinimalPair
from babybert.data.table import Examples
from babybert.data.tokenizer import CLS, MASK, SEP, UNK, Tokenizer
from babybert.errors import DataError
from babybert.evaluation.bigram_baseline import BigramBaseline, Targets
from babybert.evaluation.pseudo_log_likelihood import score_sentences
from babybert.evaluation.report import json_number
from babybert.evaluation.scores import unigram_log_probs
from babybert.evaluation.statistics import LEVEL, percentile_interval, resample_count, resampled_means
from babybert.model.bert import BabyBert
from babybert.model.precision import PRECISIONS

SPECIALS = 2  # [CLS] and [SEP]
BOOTSTRAP_SEED = 0
MODEL_PREDICTORS = ("within_word", "plain")
COUNT_PREDICTORS = ("bigram", "unigram")


@dataclass(frozen=True)
class TokenizedPairs:
    """Minimal pairs as indices into their distinct sentences."""

    pairs: list[MinimalPair]
    sentences: list[np.ndarray]
    """S arrays of ids, without special tokens."""
    good_P: np.ndarray
    bad_P: np.ndarray


def tokenize_pairs(pairs: Sequence[MinimalPair], tokenizer: Tokenizer, max_positions: int) -> TokenizedPairs:
    """Tokenize both sentences of each pair as those of a request.

    Raises DataError, naming the file and the line, for a sentence that has no words or is too long for the model.
    """
    texts = [text for pair in pairs for text in (pair.good, pair.bad)]
    index_of: dict[bytes, int] = {}
    sentences: list[np.ndarray] = []
    indices = []
    # Special tokens in the text, such as `[MASK]`, are read as ordinary text: they would not be scored as such.
    for number, ids in enumerate(tokenizer.encode_documents(texts)):
        _check_length(pairs[number // 2], len(ids), max_positions)
        index = index_of.setdefault(ids.tobytes(), len(sentences))
        if index == len(sentences):
            sentences.append(ids)
        indices.append(index)
    return TokenizedPairs(list(pairs), sentences, np.array(indices[0::2]), np.array(indices[1::2]))


def _check_length(pair: MinimalPair, tokens: int, max_positions: int) -> None:
    if not tokens:
        raise DataError(f"{pair.name}: a sentence has no words in it")
    if tokens + SPECIALS > max_positions:
        raise DataError(
            f"{pair.name}: a sentence is {tokens + SPECIALS} tokens long, [CLS] and [SEP] included; the model takes at "
            f"most {max_positions}: remove the pair"
        )


def evaluate_blimp(
    model: BabyBert,
    tokenizer: Tokenizer,
    pairs: Sequence[MinimalPair],
    train: Examples | None,
    device: torch.device,
    bf16: bool,
    batch_positions: int,
) -> dict[str, Any]:
    """All that `babybert evaluate --blimp --json` prints; docs/evaluation.md explains every key.

    `model` must be on `device`. `train` are the training pairs, for the unigram and the bigram baseline; None leaves
    them out.
    """
    tokenized = tokenize_pairs(pairs, tokenizer, model.config.max_positions)
    sentences = tokenized.sentences
    flags_V = tokenizer.continuation_flags()
    scores = score_sentences(model, sentences, flags_V, device, bf16, batch_positions)
    score_S = {
        "within_word": np.array([score.within_word_sum for score in scores]),
        "plain": np.array([score.plain_sum for score in scores]),
        **({} if train is None else _count_scores(sentences, train, tokenizer.size)),
        "length": -np.array([float(len(sentence)) for sentence in sentences]),
    }
    correct_PK = np.stack([_correct(score[tokenized.good_P], score[tokenized.bad_P]) for score in score_S.values()], 1)
    tokens_S = np.array([len(sentence) for sentence in sentences])
    unknown_S = np.array([np.count_nonzero(sentence == UNK) for sentence in sentences])
    return {
        "pairs": len(pairs),
        "sentences": len(sentences),
        "tokenizer": tokenizer.kind,
        "precision": PRECISIONS[bf16],
        **_accuracies(tokenized, correct_PK, list(score_S), tokens_S, unknown_S),
        "intervals_hold": LEVEL,
        "intervals_resample": "pairs of each paradigm",
    }


def _correct(good_P: np.ndarray, bad_P: np.ndarray) -> np.ndarray:
    """1 where the acceptable sentence has the higher score, 0.5 where both scores are equal, else 0 (P, float64)."""
    correct_P: np.ndarray = (good_P > bad_P) + 0.5 * (good_P == bad_P)
    return correct_P


def _count_scores(sentences: list[np.ndarray], train: Examples, vocab_size: int) -> dict[str, np.ndarray]:
    """The sum (S) of each sentence's log-probabilities under the bigram and the unigram baseline."""
    counts_V = train.token_counts(vocab_size)
    targets = sentence_targets(sentences)
    bigram_N = np.log(BigramBaseline(train, counts_V).probabilities(targets))
    unigram_N = unigram_log_probs(counts_V)[targets.word_N]
    ends = np.cumsum([len(sentence) for sentence in sentences])[:-1]
    return {
        name: np.array([math.fsum(of_sentence) for of_sentence in np.split(value_N, ends)])
        for name, value_N in zip(COUNT_PREDICTORS, (bigram_N, unigram_N), strict=True)
    }


def sentence_targets(sentences: list[np.ndarray]) -> Targets:
    """Each token of each sentence as if it alone were masked, with its neighbours in `[CLS] sentence [SEP]`."""
    lengths = np.array([len(sentence) for sentence in sentences])
    word_N = np.concatenate(sentences)
    first = np.cumsum(lengths) - lengths
    left_N = np.concatenate([[CLS], word_N[:-1]])
    left_N[first] = CLS
    right_N = np.concatenate([word_N[1:], [SEP]])
    right_N[first + lengths - 1] = SEP
    return Targets(
        pair_N=np.repeat(np.arange(len(sentences)), lengths),
        position_N=np.arange(len(word_N)) - np.repeat(first, lengths) + 1,
        word_N=word_N,
        shown_N=np.full(len(word_N), MASK),
        left_N=left_N,
        right_N=right_N,
    )


def _accuracies(
    tokenized: TokenizedPairs, correct_PK: np.ndarray, names: list[str], tokens_S: np.ndarray, unknown_S: np.ndarray
) -> dict[str, Any]:
    """The accuracies of the K predictors, with intervals: overall, by phenomenon and by paradigm."""
    paradigm_of_P = np.array([pair.paradigm for pair in tokenized.pairs])
    phenomena = {pair.paradigm: pair.phenomenon for pair in tokenized.pairs}
    tokens_P, unknown_P = (value_S[tokenized.good_P] + value_S[tokenized.bad_P] for value_S in (tokens_S, unknown_S))
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    resamples = resample_count(len(paradigm_of_P))
    rows_of = {paradigm: np.flatnonzero(paradigm_of_P == paradigm) for paradigm in sorted(phenomena)}
    mean_K = {paradigm: correct_PK[rows].mean(0) for paradigm, rows in rows_of.items()}
    mean_RK = {paradigm: resampled_means(correct_PK[rows], resamples, rng) for paradigm, rows in rows_of.items()}

    def summary(paradigms: list[str]) -> dict[str, Any]:
        rows = np.concatenate([rows_of[paradigm] for paradigm in paradigms])
        value_K = np.mean([mean_K[paradigm] for paradigm in paradigms], 0)
        value_RK = np.mean([mean_RK[paradigm] for paradigm in paradigms], 0)
        intervals = [
            percentile_interval(float(value), value_R) for value, value_R in zip(value_K, value_RK.T, strict=True)
        ]
        return {
            "pairs": len(rows),
            **{name: json_number(interval.value) for name, interval in zip(names, intervals, strict=True)},
            "ties": int(np.count_nonzero(correct_PK[rows, 0] == 0.5)),
            "unknown_share": json_number(unknown_P[rows].sum() / tokens_P[rows].sum()),
            "intervals": {
                name: [json_number(interval.low), json_number(interval.high)]
                for name, interval in zip(names, intervals, strict=True)
            },
        }

    by_phenomenon = []
    for phenomenon in sorted(set(phenomena.values())):
        paradigms = [paradigm for paradigm in rows_of if phenomena[paradigm] == phenomenon]
        by_phenomenon.append({"phenomenon": phenomenon, "paradigms": len(paradigms), **summary(paradigms)})
    return {
        "overall": {"paradigms": len(rows_of), **summary(list(rows_of))},
        "by_phenomenon": by_phenomenon,
        "by_paradigm": [
            {"paradigm": paradigm, "phenomenon": phenomena[paradigm], **summary([paradigm])} for paradigm in rows_of
        ],
    }
