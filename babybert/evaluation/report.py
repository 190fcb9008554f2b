"""`babybert evaluate`: how much a model has learned, in numbers with intervals, beside what needs no model.

The masks are fixed: those of the held-out table, at 15 % of its words, whatever masks the training drew. A table of
another hand with another share is masked anew, by a fixed seed. The baselines answer for the same tokens and pairs:
chance, the unigram, the bigram with both neighbours (`bigram.py`) and, for next sentence, regressions
(`nsp_baselines.py`). Of words that several hold equally likely, each counts as ranked first, for model and baselines.

Logits are computed a few rows at a time; what is kept is a loss and a rank a masked token.

Shapes: P pairs, N masked tokens, V vocabulary.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from babybert.data.dataset import Dataset
from babybert.data.loader import ordered_batches
from babybert.data.masking import MASKED_SHARE, mask_tokens
from babybert.data.table import Examples
from babybert.data.tokenizer import FIRST_ORDINARY, MASK
from babybert.errors import UsageError
from babybert.evaluation.bigram_baseline import Bigram, Targets, targets_of
from babybert.evaluation.nsp_baselines import nsp_baselines
from babybert.evaluation.scores import baselines, unigram_log_probs
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
from babybert.model.loss import IGNORED
from babybert.model.ops import mlm_head_token_losses
from babybert.progress import Progress, say

MASK_SEED = 0
SURELY = 6.0  # standard deviations: a share of masked tokens so far from 15 % was meant
FREQUENCIES = (0, 1, 10, 100, 1000, 10_000, 100_000)  # where the bands of training counts begin
POSITIONS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Answers:
    """What a model said of every masked token and pair."""

    loss_N: np.ndarray
    rank_N: np.ndarray
    is_next_P: np.ndarray  # the probability that B follows A


def with_fixed_masks(examples: Examples, vocab_size: int) -> tuple[Examples, str]:
    """The examples with 15 % of their words masked, the same at every call, and whose masks they are."""
    original = examples.original_ids()
    words_P = np.add.reduceat(original >= FIRST_ORDINARY, examples.offsets[:-1], dtype=np.int64)
    chosen, words = int(np.count_nonzero(examples.labels)), int(words_P.sum())
    # A row in which no word came up has one masked all the same.
    expected = MASKED_SHARE * words + float(((1 - MASKED_SHARE) ** words_P[words_P > 0]).sum())
    if abs(chosen - expected) <= SURELY * math.sqrt(words * MASKED_SHARE * (1 - MASKED_SHARE)):
        return examples, "the table's"
    ids, labels = mask_tokens(
        original, np.asarray(examples.offsets), vocab_size, MASK_SEED, 1, np.arange(len(examples))
    )
    return replace(
        examples, ids=ids, labels=labels
    ), f"drawn anew at {MASKED_SHARE:.0%}: the table masks {chosen / max(words, 1):.1%} of its words"


@torch.inference_mode()
def ask(model: BabyBert, examples: Examples, batch_size: int, device: torch.device) -> Answers:
    """The model's answers, in the order of the examples; it must be in evaluation mode."""
    losses, ranks, is_next = [np.zeros(0)], [np.zeros(0, np.int64)], []
    with Progress("evaluate", len(examples), "pairs") as progress:
        for batch in ordered_batches(examples, batch_size):
            batch = batch.to(device)
            hidden_BTD = model(batch.ids_BT, batch.segments_BT)
            chosen_BT = batch.labels_BT != IGNORED
            transformed_ND = model.mlm_transform(hidden_BTD[chosen_BT])
            loss_N, rank_N = mlm_head_token_losses(
                transformed_ND,
                model.mlm_decoder.weight,
                model.mlm_decoder.bias,
                batch.labels_BT[chosen_BT],
                model.kernels,
            )
            losses.append(loss_N.double().cpu().numpy())
            ranks.append(rank_N.cpu().numpy())
            is_next.append(model.nsp_logits(hidden_BTD).double().softmax(-1)[:, 1].cpu().numpy())
            progress.advance(len(batch.is_next_B))
    return Answers(np.concatenate(losses), np.concatenate(ranks), np.concatenate(is_next))


def report(
    model: BabyBert, dataset: Dataset, max_pairs: int | None, batch_size: int, device: torch.device
) -> dict[str, Any]:
    """Everything that `babybert evaluate --json` prints. `mlm_loss` and its like are flat; docs/evaluation.md has them all."""
    counts_V = dataset.token_counts()
    examples, masks = with_fixed_masks(dataset.examples("validation"), dataset.tokenizer.size)
    examples = examples.first(max_pairs)
    answers = ask(model.eval(), examples, batch_size, device)
    targets = targets_of(examples)
    say("baselines: unigram, bigram")
    token_scores = {
        **_token_scores("mlm", answers.loss_N, answers.rank_N),
        **_token_scores("mlm_unigram", *unigram_answers(counts_V, targets)),
        **_token_scores("mlm_bigram", *bigram_answers(dataset.examples("train"), counts_V, targets)),
    }
    next_sentence, left_out = {"nsp": answers.is_next_P}, []
    try:
        say("baselines: next sentence")
        found = nsp_baselines(dataset.examples("train"), examples, dataset.tokenizer, counts_V)
        next_sentence.update({f"nsp_{name}": probability_P for name, probability_P in found.items()})
    except UsageError as error:
        left_out.append(f"next sentence by word overlap, style and format: {error}")
    say("intervals")
    intervals = bootstrap(
        {**_mlm_statistics(token_scores, targets, len(examples)), **_nsp_statistics(next_sentence, examples.is_next)},
        len(examples),
    )
    for name in ("mlm", "mlm_unigram", "mlm_bigram"):
        loss = intervals[f"{name}_loss"]
        with np.errstate(over="ignore"):  # of a model that has diverged
            intervals[f"{name}_perplexity"] = Interval(
                *(float(np.exp(bound)) for bound in (loss.value, loss.low, loss.high))
            )
    return {
        "pairs": len(examples),
        "masked_tokens": len(targets),
        "masks": masks,
        **{name: _number(interval.value) for name, interval in intervals.items()},
        **_chance(examples, counts_V),
        "intervals": {name: [_number(interval.low), _number(interval.high)] for name, interval in intervals.items()},
        "intervals_hold": LEVEL,
        "intervals_resample": "pairs",
        **slices(token_scores, targets, counts_V),
        "calibration": calibration_bins(answers.is_next_P, examples.is_next),
        "left_out": left_out,
    }


def unigram_answers(counts_V: np.ndarray, targets: Targets) -> tuple[np.ndarray, np.ndarray]:
    """Losses and ranks (N) by the training pairs' word frequencies alone."""
    above = len(counts_V) - np.searchsorted(np.sort(counts_V), counts_V[targets.word_N], side="right")
    return -unigram_log_probs(counts_V)[targets.word_N], above


def bigram_answers(train: Examples, counts_V: np.ndarray, targets: Targets) -> tuple[np.ndarray, np.ndarray]:
    """Losses and ranks (N) by the two neighbours."""
    bigram = Bigram(train, counts_V)
    return -np.log(bigram.probabilities(targets)), bigram.ranks(targets)


def _token_scores(name: str, loss_N: np.ndarray, rank_N: np.ndarray) -> dict[str, np.ndarray]:
    scores = {"loss": loss_N, "top1": rank_N < 1, "top5": rank_N < 5, "reciprocal_rank": 1 / (1 + rank_N)}
    return {f"{name}_{key}": values.astype(float) for key, values in scores.items()}


def _mlm_statistics(token_scores: dict[str, np.ndarray], targets: Targets, pairs: int) -> dict[str, Statistic]:
    tokens_P = np.bincount(targets.pair_N, minlength=pairs)

    def mean(values_N: np.ndarray) -> Statistic:
        return mean_of(np.bincount(targets.pair_N, values_N, pairs), tokens_P)

    statistics = {name: mean(values_N) for name, values_N in token_scores.items()}
    for other in ("unigram", "bigram"):  # of the same tokens, so its interval is narrower than those of the two
        statistics[f"mlm_loss_below_{other}"] = mean(token_scores[f"mlm_{other}_loss"] - token_scores["mlm_loss"])
    return statistics


def _nsp_statistics(next_sentence: dict[str, np.ndarray], is_next_P: np.ndarray) -> dict[str, Statistic]:
    statistics = {}
    for name, probability_P in next_sentence.items():
        own_P = np.where(is_next_P == 1, probability_P, 1 - probability_P)
        statistics[f"{name}_loss"] = mean_of(-np.log(np.maximum(own_P, 1e-300)))
        # As in training: of two that are equal, the label 0.
        statistics[f"{name}_accuracy"] = mean_of(((probability_P > 0.5) == is_next_P).astype(float))
        statistics[f"{name}_auc"] = auc_of(probability_P, is_next_P)
        statistics[f"{name}_calibration_error"] = calibration_error_of(probability_P, is_next_P)
    return statistics


def _chance(examples: Examples, counts_V: np.ndarray) -> dict[str, float | None]:
    words = len(counts_V) - FIRST_ORDINARY
    known = baselines(examples, counts_V)
    return {
        "mlm_chance_loss": _number(known["mlm_chance_loss"]),
        "mlm_chance_perplexity": words,
        "mlm_chance_top1": _number(1 / words),
        "mlm_chance_top5": _number(min(1, 5 / words)),
        "mlm_chance_reciprocal_rank": _number((1 / np.arange(1, words + 1)).mean()),
        "nsp_chance_loss": _number(known["nsp_chance_loss"]),
        "nsp_chance_accuracy": _number(known["nsp_chance_accuracy"]),
        "nsp_chance_auc": 0.5,
    }


def slices(
    token_scores: dict[str, np.ndarray], targets: Targets, counts_V: np.ndarray
) -> dict[str, list[dict[str, Any]]]:
    """The token scores' means by how often training has the word, by position, and by what is shown in its place."""
    frequency = np.searchsorted(FREQUENCIES, counts_V[targets.word_N], side="right") - 1
    position = np.searchsorted(POSITIONS, np.maximum(targets.position_N, POSITIONS[0]), side="right") - 1
    shown = np.where(targets.shown_N == MASK, 0, np.where(targets.shown_N == targets.word_N, 1, 2))

    def means(group_N: np.ndarray, names: list[Any]) -> list[dict[str, Any]]:
        size = np.bincount(group_N, minlength=len(names))
        sums = {key: np.bincount(group_N, values, len(names)) for key, values in token_scores.items()}
        return [
            {**names[g], "tokens": int(size[g]), **{key: _number(sums[key][g] / size[g]) for key in sums}}
            for g in range(len(names))
            if size[g]
        ]

    return {
        "by_frequency": means(frequency, [{"from": low, "to": high} for low, high in _ranges(FREQUENCIES)]),
        "by_position": means(position, [{"from": low, "to": high} for low, high in _ranges(POSITIONS)]),
        "by_shown": means(shown, [{"shown": "[MASK]"}, {"shown": "the word itself"}, {"shown": "a random word"}]),
    }


def _ranges(starts: tuple[int, ...]) -> list[tuple[int, int | None]]:
    return [(low, high - 1 if high else None) for low, high in zip(starts, (*starts[1:], None), strict=True)]


def _number(value: float) -> float | None:
    """As JSON has it: six digits, and nothing for what cannot be computed (an AUC of one class)."""
    return round(float(value), 6) if math.isfinite(value) else None
