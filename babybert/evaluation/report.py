"""`babybert evaluate`: scores of a model with confidence intervals, next to baselines that need no model.

The masks are fixed: those of the held-out table, which cover 15 % of its words, however training masks. An externally
prepared table that masks another share of its words is masked anew with a fixed seed. The baselines predict the same
tokens and pairs: chance, the unigram and bigram baselines (`bigram_baseline.py`) and, for next sentence prediction,
logistic regressions (`nsp_baselines.py`). Among words of equal probability each counts as ranked first, for the model
and for the baselines.

Cost: one pass of the model over the held-out pairs, one of the bigram baseline over the training pairs, and up to 1,000
resamples of about 30 statistics, each of which reads one or two numbers for each pair.

Shapes: P pairs, N masked tokens, V vocabulary, G groups.
"""

import logging
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from babybert.data.dataset import Dataset, describe_only_label, warn_of_only_label
from babybert.data.masking import MASKED_SHARE, mask_tokens
from babybert.data.table import Examples
from babybert.data.tokenizer import FIRST_ORDINARY, MASK
from babybert.errors import UserError
from babybert.evaluation.bigram_baseline import BigramBaseline, Targets, targets_of
from babybert.evaluation.nsp_baselines import nsp_baselines
from babybert.evaluation.predictions import Predictions, predict
from babybert.evaluation.scores import baseline_scores, unigram_log_probs
from babybert.evaluation.statistics import (
    LEVEL,
    Interval,
    Statistic,
    auc_of,
    bootstrap,
    calibration_bins,
    calibration_error_of,
    mean_of,
)
from babybert.model.bert import BabyBert
from babybert.model.precision import PRECISIONS

logger = logging.getLogger(__name__)

MASK_SEED = 0
MASK_EPOCH = 1  # as `prepare` masks held-out pairs
# A table's masked share is deliberate, not a matter of chance, if it is this many standard deviations from 15 %.
MOST_DEVIATIONS = 6.0
FREQUENCIES = (0, 1, 10, 100, 1000, 10_000, 100_000)  # first count of each group of training counts
POSITIONS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # first position of each group
NSP_SCORES = ("loss", "accuracy", "auc", "calibration_error")
NOT_SCORED = Interval(math.nan, math.nan, math.nan)
SMALLEST_PROBABILITY = 1e-300  # keeps the logarithm of a probability that was rounded to 0 finite


def report(
    model: BabyBert,
    dataset: Dataset,
    max_pairs: int | None,
    batch_size: int,
    device: torch.device,
    bf16: bool = False,
) -> dict[str, Any]:
    """All that `babybert evaluate --json` prints; docs/evaluation.md explains every key.

    `model` must be on `device`. `max_pairs` limits the held-out pairs to the first ones. `bf16` runs the
    encoder in bf16.
    """
    counts_V = dataset.token_counts()
    examples, masks_origin = with_fixed_masks(dataset.examples("validation"), dataset.tokenizer.size)
    examples = examples.first(max_pairs)
    warn_of_only_label("train", dataset.examples("train"))
    warn_of_only_label("validation", examples)
    predictions = predict(model, examples, batch_size, device, token_losses=True, bf16=bf16)
    targets = targets_of(examples)

    logger.info("baselines: unigram, bigram")
    token_scores = {
        **_token_scores("mlm", predictions.loss_N, predictions.rank_N),
        **_token_scores("mlm_unigram", *unigram_losses_and_ranks(counts_V, targets)),
        **_token_scores("mlm_bigram", *bigram_losses_and_ranks(dataset.examples("train"), counts_V, targets)),
    }
    logger.info("baselines: next sentence")
    probabilities, left_out = _nsp_probabilities(predictions, examples, dataset, counts_V)

    logger.info("intervals")
    intervals = _intervals(token_scores, targets, probabilities, examples)
    return {
        "pairs": len(examples),
        "masked_tokens": len(targets),
        "masks": masks_origin,
        "precision": PRECISIONS[bf16],
        **{name: json_number(interval.value) for name, interval in intervals.items()},
        **_chance_scores(examples, counts_V),
        "intervals": {
            name: [json_number(interval.low), json_number(interval.high)] for name, interval in intervals.items()
        },
        "intervals_hold": LEVEL,
        "intervals_resample": "pairs",
        **slices(token_scores, targets, counts_V),
        "calibration": calibration_bins(probabilities["nsp"], examples.is_next) if probabilities else [],
        "left_out": left_out,
    }


def with_fixed_masks(examples: Examples, vocab_size: int) -> tuple[Examples, str]:
    """The examples with 15 % of their words masked, the same in every call, and where these masks are from."""
    original = examples.original_ids()
    words_P = np.add.reduceat(original >= FIRST_ORDINARY, examples.offsets[:-1], dtype=np.int64)
    words = int(words_P.sum())
    masked = int(np.count_nonzero(examples.labels))
    # Masking chooses one word of a pair even where chance chose none, which happens with probability 0.85 ^ words.
    chosen_anyway = float(((1 - MASKED_SHARE) ** words_P[words_P > 0]).sum())
    expected = MASKED_SHARE * words + chosen_anyway
    deviation = math.sqrt(words * MASKED_SHARE * (1 - MASKED_SHARE))
    if abs(masked - expected) <= MOST_DEVIATIONS * deviation:
        return examples, "the table's"
    rows = np.arange(len(examples))
    ids, labels = mask_tokens(original, np.asarray(examples.offsets), vocab_size, MASK_SEED, MASK_EPOCH, rows)
    share = masked / max(words, 1)
    origin = f"drawn anew at {MASKED_SHARE:.0%}: the table masks {share:.1%} of its words"
    return replace(examples, ids=ids, labels=labels), origin


def _nsp_probabilities(
    predictions: Predictions, examples: Examples, dataset: Dataset, counts_V: np.ndarray
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The probability (P) that B follows A, by predictor, and what is left out and why.

    If all held-out pairs have one label, all is left out: a constant answer would be perfect.
    """
    if examples.only_label is not None:
        return {}, [f"next sentence: {describe_only_label('validation', examples.only_label)}"]
    probabilities = {"nsp": predictions.is_next_probabilities()}
    try:
        baselines = nsp_baselines(dataset.examples("train"), examples, dataset.tokenizer, counts_V)
    except UserError as error:
        return probabilities, [f"next sentence by word overlap, style and format: {error}"]
    return {**probabilities, **{f"nsp_{name}": probability_P for name, probability_P in baselines.items()}}, []


def unigram_losses_and_ranks(counts_V: np.ndarray, targets: Targets) -> tuple[np.ndarray, np.ndarray]:
    """Cross entropy (nats) and rank of each target (N) under the words' frequencies in the training pairs."""
    rank_N = len(counts_V) - np.searchsorted(np.sort(counts_V), counts_V[targets.word_N], side="right")
    return -unigram_log_probs(counts_V)[targets.word_N], rank_N


def bigram_losses_and_ranks(train: Examples, counts_V: np.ndarray, targets: Targets) -> tuple[np.ndarray, np.ndarray]:
    """Cross entropy (nats) and rank of each target (N) under the bigram baseline, fitted on `train`."""
    baseline = BigramBaseline(train, counts_V)
    return -np.log(baseline.probabilities(targets)), baseline.ranks(targets)


def _token_scores(predictor: str, loss_N: np.ndarray, rank_N: np.ndarray) -> dict[str, np.ndarray]:
    """The scores of each masked token (N, float64), named `<predictor>_<score>`."""
    scores = {"loss": loss_N, "top1": rank_N < 1, "top5": rank_N < 5, "reciprocal_rank": 1 / (1 + rank_N)}
    return {f"{predictor}_{score}": value_N.astype(float) for score, value_N in scores.items()}


def _intervals(
    token_scores: dict[str, np.ndarray],
    targets: Targets,
    probabilities: dict[str, np.ndarray],
    examples: Examples,
) -> dict[str, Interval]:
    """All scores that have a confidence interval, by name."""
    statistics = {
        **_mlm_statistics(token_scores, targets, len(examples)),
        **_nsp_statistics(probabilities, examples.is_next),
    }
    intervals = bootstrap(statistics, len(examples))
    for predictor in ("mlm", "mlm_unigram", "mlm_bigram"):
        loss = intervals[f"{predictor}_loss"]
        with np.errstate(over="ignore"):  # the loss of a model that has diverged is in the thousands
            perplexity = Interval(float(np.exp(loss.value)), float(np.exp(loss.low)), float(np.exp(loss.high)))
        intervals[f"{predictor}_perplexity"] = perplexity
    if not probabilities:
        intervals.update({f"nsp_{score}": NOT_SCORED for score in NSP_SCORES})
    return intervals


def _mlm_statistics(token_scores: dict[str, np.ndarray], targets: Targets, pairs: int) -> dict[str, Statistic]:
    """Means over the masked tokens, as functions of the pairs' weights."""
    tokens_P = np.bincount(targets.pair_N, minlength=pairs)

    def mean(value_N: np.ndarray) -> Statistic:
        return mean_of(np.bincount(targets.pair_N, value_N, pairs), tokens_P)

    statistics = {name: mean(value_N) for name, value_N in token_scores.items()}
    # The difference of two losses on the same tokens varies less than each of them, so it gets a separate interval.
    for baseline in ("unigram", "bigram"):
        difference_N = token_scores[f"mlm_{baseline}_loss"] - token_scores["mlm_loss"]
        statistics[f"mlm_loss_below_{baseline}"] = mean(difference_N)
    return statistics


def _nsp_statistics(probabilities: dict[str, np.ndarray], is_next_P: np.ndarray) -> dict[str, Statistic]:
    """The scores of each predictor's probabilities that B follows A, as functions of the pairs' weights."""
    statistics = {}
    for name, probability_P in probabilities.items():
        label_probability_P = np.where(is_next_P == 1, probability_P, 1 - probability_P)
        # Of two equal probabilities the label 0 counts as predicted, as in training.
        correct_P = (probability_P > 0.5) == is_next_P
        statistics[f"{name}_loss"] = mean_of(-np.log(np.maximum(label_probability_P, SMALLEST_PROBABILITY)))
        statistics[f"{name}_accuracy"] = mean_of(correct_P.astype(float))
        statistics[f"{name}_auc"] = auc_of(probability_P, is_next_P)
        statistics[f"{name}_calibration_error"] = calibration_error_of(probability_P, is_next_P)
    return statistics


def _chance_scores(examples: Examples, counts_V: np.ndarray) -> dict[str, float | None]:
    words = len(counts_V) - FIRST_ORDINARY
    scores = baseline_scores(examples, counts_V)
    return {
        "mlm_chance_loss": json_number(scores["mlm_chance_loss"]),
        "mlm_chance_perplexity": words,
        "mlm_chance_top1": json_number(1 / words),
        "mlm_chance_top5": json_number(min(1, 5 / words)),
        "mlm_chance_reciprocal_rank": json_number((1 / np.arange(1, words + 1)).mean()),
        "nsp_chance_loss": json_number(scores["nsp_chance_loss"]),
        "nsp_chance_accuracy": json_number(scores["nsp_chance_accuracy"]),
        "nsp_chance_auc": None if scores["nsp_chance_loss"] is None else 0.5,
    }


def slices(
    token_scores: dict[str, np.ndarray], targets: Targets, counts_V: np.ndarray
) -> dict[str, list[dict[str, Any]]]:
    """Means of the token scores by the word's training count, by position, and by the token the model is shown."""
    frequency_N = np.searchsorted(FREQUENCIES, counts_V[targets.word_N], side="right") - 1
    position_N = np.searchsorted(POSITIONS, np.maximum(targets.position_N, POSITIONS[0]), side="right") - 1
    shown_N = np.where(targets.shown_N == MASK, 0, np.where(targets.shown_N == targets.word_N, 1, 2))
    shown_groups = [{"shown": "[MASK]"}, {"shown": "the word itself"}, {"shown": "a random word"}]
    return {
        "by_frequency": _group_means(token_scores, frequency_N, _bounds(FREQUENCIES)),
        "by_position": _group_means(token_scores, position_N, _bounds(POSITIONS)),
        "by_shown": _group_means(token_scores, shown_N, shown_groups),
    }


def _group_means(
    token_scores: dict[str, np.ndarray], group_N: np.ndarray, groups: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """For each of the G groups that has tokens: its description, its number of tokens and the means of their scores."""
    tokens_G = np.bincount(group_N, minlength=len(groups))
    sums_G = {name: np.bincount(group_N, value_N, len(groups)) for name, value_N in token_scores.items()}
    means = []
    for index, group in enumerate(groups):
        tokens = int(tokens_G[index])
        if tokens:
            scores = {name: json_number(sum_G[index] / tokens) for name, sum_G in sums_G.items()}
            means.append({**group, "tokens": tokens, **scores})
    return means


def _bounds(starts: tuple[int, ...]) -> list[dict[str, Any]]:
    """The first and last number (None: no limit) of each group that begins at `starts`."""
    ends = [start - 1 for start in starts[1:]]
    return [{"from": low, "to": high} for low, high in zip(starts, [*ends, None], strict=True)]


def json_number(value: float | None) -> float | None:
    """The value rounded to six decimals, or None (JSON's null) where there is none or it is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return round(float(value), 6) + 0.0  # + 0.0 turns -0.0 into 0.0
