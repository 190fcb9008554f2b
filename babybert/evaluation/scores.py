"""Scores of a model on held-out pairs, next to those of baselines that need no model.

The masks of the held-out table are fixed, so the scores of two models are comparable. The baselines are computed on the
same tokens and pairs: chance (all words equally likely, ln V; both labels by their shares) and the unigram baseline
(the words' frequencies in the training pairs). A model whose MLM loss is above the unigram baseline's has not even
learned how frequent words are.

Training imports this module for validation: it must stay light (no pandas, scikit-learn or numba-compiled baselines).

Shapes: N masked tokens, P pairs, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from babybert.data.table import Examples
from babybert.data.tokenizer import FIRST_ORDINARY

# Re-exported: callers of `evaluate_held_out` catch it.
from babybert.evaluation.predictions import EvaluationStopped as EvaluationStopped
from babybert.evaluation.predictions import predict
from babybert.model.bert import BabyBert
from babybert.tables import format_table


@dataclass(frozen=True)
class Scores:
    """Means over held-out pairs and their masked tokens. Losses are in nats, accuracies are shares from 0 to 1.

    The scores of next sentence prediction are None if all pairs have one label: a constant answer would be perfect.
    """

    pairs: int
    masked_tokens: int
    mlm_loss: float
    mlm_unigram_loss: float
    mlm_chance_loss: float
    mlm_top1: float
    mlm_unigram_top1: float
    mlm_top5: float
    mlm_reciprocal_rank: float
    nsp_loss: float | None
    nsp_chance_loss: float | None
    nsp_accuracy: float | None
    nsp_chance_accuracy: float | None

    def as_dict(self) -> dict[str, float | None]:
        """The scores by name, rounded to six decimals, for JSON."""
        scores = dataclasses.asdict(self)
        return {name: None if value is None else round(value, 6) for name, value in scores.items()}

    def describe(self) -> str:
        """The losses and the accuracy of NSP as one phrase."""
        nsp = "NSP not scored (all pairs have one label)"
        if self.nsp_loss is not None:
            chance = f"chance {self.nsp_chance_loss:.3f}"
            nsp = f"NSP {self.nsp_loss:.3f} ({chance}), NSP accuracy {self.nsp_accuracy:.1%}"
        return f"MLM {self.mlm_loss:.3f} (unigram {self.mlm_unigram_loss:.3f}), {nsp}"


def evaluate_held_out(
    model: BabyBert,
    examples: Examples,
    counts_V: np.ndarray,
    batch_size: int,
    device: torch.device,
    task: str = "evaluate",
    should_stop: Callable[[], bool] = lambda: False,
) -> Scores:
    """Score `model` on `examples`; `counts_V` are the token counts of the training pairs. The model's mode is restored.

    Raises EvaluationStopped after the first batch at which `should_stop()` is true.
    """
    predictions = predict(model, examples, batch_size, device, task, should_stop)
    rank_N = predictions.rank_N
    has_both_labels = examples.only_label is None
    predicted_label_P = predictions.nsp_logits_P2.argmax(1)
    return Scores(
        pairs=len(examples),
        masked_tokens=len(rank_N),
        mlm_loss=predictions.mlm_loss_sum / max(len(rank_N), 1),
        mlm_top1=_share(rank_N < 1),
        mlm_top5=_share(rank_N < 5),
        mlm_reciprocal_rank=float((1 / (1 + rank_N)).mean()) if len(rank_N) else 0.0,
        nsp_loss=predictions.nsp_loss_sum / len(examples) if has_both_labels else None,
        nsp_accuracy=_share(predicted_label_P == examples.is_next) if has_both_labels else None,
        **baseline_scores(examples, counts_V),
    )


def unigram_log_probs(counts_V: np.ndarray) -> np.ndarray:
    """Natural logarithms of the words' shares (V, float64), after adding one to each count (Laplace smoothing).

    Smoothing gives every word a probability above 0. Special tokens have a count of 0.
    """
    smoothed_share_V = (counts_V + 1) / (counts_V.sum() + len(counts_V))
    log_prob_V: np.ndarray = np.log(smoothed_share_V)
    return log_prob_V


def baseline_scores(examples: Examples, counts_V: np.ndarray) -> dict[str, Any]:
    """The fields of `Scores` that need no model: chance and the unigram baseline on the same tokens and pairs."""
    target_N = examples.labels[examples.labels > 0]
    next_share = float(examples.is_next.mean())
    label_shares = (next_share, 1 - next_share)
    has_both_labels = min(label_shares) > 0
    return {
        "mlm_unigram_loss": -float(unigram_log_probs(counts_V)[target_N].mean()) if len(target_N) else 0.0,
        "mlm_unigram_top1": _share(target_N == counts_V.argmax()),
        "mlm_chance_loss": math.log(len(counts_V) - FIRST_ORDINARY),
        "nsp_chance_loss": -sum(share * math.log(share) for share in label_shares) if has_both_labels else None,
        "nsp_chance_accuracy": max(label_shares) if has_both_labels else None,
    }


def _share(flags: np.ndarray) -> float:
    return float(flags.mean()) if len(flags) else 0.0


def format_scores(scores: Scores) -> str:
    """The scores as a table of plain text: one row a score, with the baselines' columns next to the model's."""
    rows = [
        (
            "MLM loss (nats)",
            f"{scores.mlm_loss:.3f}",
            f"{scores.mlm_unigram_loss:.3f}",
            f"{scores.mlm_chance_loss:.3f}",
        ),
        ("MLM top-1", f"{scores.mlm_top1:.1%}", f"{scores.mlm_unigram_top1:.1%}", ""),
        ("MLM top-5", f"{scores.mlm_top5:.1%}", "", ""),
        ("MLM reciprocal rank", f"{scores.mlm_reciprocal_rank:.3f}", "", ""),
    ]
    note = "\nNSP is not scored: all pairs have one label"
    if scores.nsp_loss is not None:
        rows.append(("NSP loss (nats)", f"{scores.nsp_loss:.3f}", "", f"{scores.nsp_chance_loss:.3f}"))
        rows.append(("NSP accuracy", f"{scores.nsp_accuracy:.1%}", "", f"{scores.nsp_chance_accuracy:.1%}"))
        note = ""
    title = f"held out: {scores.pairs:,} pairs, {scores.masked_tokens:,} masked tokens"
    return f"{title}\n{format_table(('score', 'model', 'unigram', 'chance'), rows, text_headers=('score',))}{note}"
