"""How much a model has learned: its losses on held-out pairs, beside what needs no model.

The masks of the held-out table are fixed, so two evaluations compare. The baselines are computed on the same tokens:
chance (every word alike: ln V; a coin: ln 2) and the unigram (the training pairs' word frequencies, each count one
higher so that no word is impossible). A model above the unigram's loss has learned less than word counts.

Shapes: B pairs, T positions, D width, N chosen positions.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from babybert.data.loader import ordered_batches
from babybert.data.table import Examples
from babybert.data.tokenizer import FIRST_ORDINARY
from babybert.model.bert import BabyBert
from babybert.model.loss import mlm_loss, nsp_loss
from babybert.progress import Progress


class EvaluationStopped(Exception):
    """An evaluation was asked to stop before it had its scores."""


@dataclass(frozen=True)
class Scores:
    """Means over held-out pairs and their masked tokens; losses in nats."""

    pairs: int
    masked_tokens: int
    mlm_loss: float
    mlm_unigram_loss: float
    mlm_chance_loss: float
    mlm_top1: float
    mlm_unigram_top1: float
    mlm_top5: float
    mlm_reciprocal_rank: float
    nsp_loss: float
    nsp_chance_loss: float
    nsp_accuracy: float
    nsp_chance_accuracy: float

    def as_dict(self) -> dict[str, float]:
        """The scores by name, for JSON."""
        return {name: round(value, 6) for name, value in dataclasses.asdict(self).items()}

    def table(self) -> str:
        """The scores for people, the model's beside the baselines'."""
        rows = [
            ("", "model", "unigram", "chance"),
            ("MLM loss (nats)", f"{self.mlm_loss:.3f}", f"{self.mlm_unigram_loss:.3f}", f"{self.mlm_chance_loss:.3f}"),
            ("MLM top-1", f"{self.mlm_top1:.1%}", f"{self.mlm_unigram_top1:.1%}", ""),
            ("MLM top-5", f"{self.mlm_top5:.1%}", "", ""),
            ("MLM reciprocal rank", f"{self.mlm_reciprocal_rank:.3f}", "", ""),
            ("NSP loss (nats)", f"{self.nsp_loss:.3f}", "", f"{self.nsp_chance_loss:.3f}"),
            ("NSP accuracy", f"{self.nsp_accuracy:.1%}", "", f"{self.nsp_chance_accuracy:.1%}"),
        ]
        lines = [f"{name:<20}{model:>9}{unigram:>9}{chance:>9}" for name, model, unigram, chance in rows]
        return "\n".join([f"held out: {self.pairs:,} pairs, {self.masked_tokens:,} masked tokens", *lines])


def unigram_log_probs(counts_V: np.ndarray) -> np.ndarray:
    """Natural logs of the words' shares (float64, V), each count one higher; special tokens count as never seen."""
    return np.log((counts_V + 1) / (counts_V.sum() + len(counts_V)))


@torch.inference_mode()
def evaluate_held_out(
    model: BabyBert,
    examples: Examples,
    counts_V: np.ndarray,
    batch_size: int,
    device: torch.device,
    task: str = "evaluate",
    should_stop: Callable[[], bool] = lambda: False,
) -> Scores:
    """Score `model` on `examples`; `counts_V` are the training pairs' token counts. The model's mode is restored.

    Raises EvaluationStopped as soon as `should_stop` says so.
    """
    was_training = model.training
    model.eval()
    try:
        return _evaluate(model, examples, counts_V, batch_size, device, task, should_stop)
    finally:
        model.train(was_training)


def _evaluate(
    model: BabyBert,
    examples: Examples,
    counts_V: np.ndarray,
    batch_size: int,
    device: torch.device,
    task: str,
    should_stop: Callable[[], bool],
) -> Scores:
    nsp_sum = mlm_sum = 0.0
    nsp_correct = 0
    ranks = []
    with Progress(task, len(examples), "pairs") as progress:
        for batch in ordered_batches(examples, batch_size):
            batch = batch.to(device)
            hidden_BTD = model(batch.ids_BT, batch.segments_BT)
            mlm = mlm_loss(model, hidden_BTD, batch.labels_BT, with_rank=True)
            assert mlm.rank_N is not None
            nsp_logits_B2 = model.nsp_logits(hidden_BTD)
            mlm_sum += mlm.loss_sum.item()
            ranks.append(mlm.rank_N.cpu().numpy())
            nsp_sum += nsp_loss(nsp_logits_B2, batch.is_next_B).item()
            nsp_correct += int((nsp_logits_B2.argmax(-1) == batch.is_next_B).sum())
            progress.advance(len(batch.is_next_B))
            if should_stop():
                raise EvaluationStopped
    rank_N = np.concatenate(ranks)
    return Scores(
        pairs=len(examples),
        masked_tokens=len(rank_N),
        mlm_loss=mlm_sum / max(len(rank_N), 1),
        mlm_top1=_share(rank_N < 1),
        mlm_top5=_share(rank_N < 5),
        mlm_reciprocal_rank=float((1 / (1 + rank_N)).mean()) if len(rank_N) else 0.0,
        nsp_loss=nsp_sum / len(examples),
        nsp_accuracy=nsp_correct / len(examples),
        **baselines(examples, counts_V),
    )


def baselines(examples: Examples, counts_V: np.ndarray) -> dict[str, float]:
    """The fields of `Scores` that need no model: chance and the unigram on these very tokens and pairs."""
    target_N = examples.labels[examples.labels > 0]
    next_share = float(examples.is_next.mean())
    return {
        "mlm_unigram_loss": -float(unigram_log_probs(counts_V)[target_N].mean()) if len(target_N) else 0.0,
        "mlm_unigram_top1": _share(target_N == counts_V.argmax()),
        "mlm_chance_loss": math.log(len(counts_V) - FIRST_ORDINARY),
        "nsp_chance_loss": -sum(share * math.log(share) for share in (next_share, 1 - next_share) if share > 0),
        "nsp_chance_accuracy": max(next_share, 1 - next_share),
    }


def _share(flags: np.ndarray) -> float:
    return float(flags.mean()) if len(flags) else 0.0


def format_scores(scores: Scores) -> str:
    """The scores as a table."""
    return scores.table()
