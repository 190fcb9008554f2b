"""Training for a given number of seconds, with held-out scores at regular times.

recipe.py, vocabulary.py, width.py and learning.py use it.

The learning rate follows the clock instead of the step count. So warm-up and decay fit the time, however fast the
machine and the model are. The clock stops during evaluation. Otherwise a step is the one of `babybert pretrain`. The
budget of a `PairClock` is a number of pairs: its results do not depend on what else the machine does.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from common import CPU, TrainingStep, lr_at, new_model, seed_step, training_loader

from babybert.config import PretrainConfig
from babybert.data.dataset import Dataset
from babybert.data.loader import Batch
from babybert.data.table import Examples
from babybert.evaluation.scores import Scores, evaluate_held_out
from babybert.model.bert import BabyBert

EVALUATION_BATCH_SIZE = 64
Curve = list[dict[str, Any]]  # one entry for each evaluation: seconds, seen (training pairs), and the fields of Scores


@dataclass
class Clock:
    """Seconds of training up to `budget`, with `evaluations` evenly spread over it. It can be stopped and restarted."""

    budget: float
    evaluations: int
    seconds_before: float = 0.0
    started_at: float = 0.0

    def start(self) -> None:
        """Start or continue to count."""
        self.started_at = time.monotonic()

    def stop(self) -> None:
        """Stop counting, and keep the time since `start`."""
        self.seconds_before = self.seconds

    def count_step(self, pairs: int) -> None:
        """Call it after each step."""

    @property
    def seconds(self) -> float:
        """Seconds of training so far, while the clock runs."""
        return self.seconds_before + time.monotonic() - self.started_at

    @property
    def progress(self) -> float:
        """The share of the budget that is used up: 1 or more at the end."""
        return self.seconds / self.budget

    def evaluation_due(self, evaluations_done: int) -> bool:
        """Whether the next evaluation is due. The last one is at the end of the budget."""
        return self.progress >= (evaluations_done + 1) / self.evaluations

    def lr(self, config: PretrainConfig) -> float:
        """The learning rate at this time."""
        return lr_at(config, min(self.progress, 1.0))


@dataclass
class PairClock(Clock):
    """A clock whose budget is a number of training pairs."""

    pairs: int = 0

    @property
    def progress(self) -> float:
        """The share of the pairs that have been used."""
        return self.pairs / self.budget

    def count_step(self, pairs: int) -> None:
        """Call it after each step."""
        self.pairs += pairs


def train_for(
    config: PretrainConfig,
    dataset: Dataset,
    held_out: Examples,
    clock: Clock,
    name: str,
    train: Examples | None = None,
    first_half_parts: int = 1,
) -> tuple[BabyBert, Curve]:
    """Train a new model on the dataset's pairs, or on `train`; return it and its curve of scores on `held_out`.

    In the first half of the budget, each batch is split into `first_half_parts` steps.
    """
    device = torch.device(config.device)
    torch.manual_seed(config.seed)
    bert = new_model(config, dataset).to(device)
    training_step = TrainingStep.of(bert, config, device)

    def step(batch: Batch, step_number: int) -> None:
        for group in training_step.optimizer.param_groups:
            group["lr"] = clock.lr(config) * group["factor"]
        seed_step(config.seed, step_number)
        training_step(batch.to(device))

    loader = training_loader(config, dataset, train, device)

    def batches(epoch: int) -> Iterator[Batch]:
        for batch in loader.epoch(epoch):
            yield from batch.split(first_half_parts if clock.progress < 0.5 else 1)

    return bert, run_steps(step, batches, evaluator(bert, dataset, held_out, device), clock, name)


def evaluator(bert: BabyBert, dataset: Dataset, held_out: Examples, device: torch.device = CPU) -> Callable[[], Scores]:
    """A function that scores `bert` on `held_out`."""
    counts_V = dataset.token_counts()
    return lambda: evaluate_held_out(bert, held_out, counts_V, EVALUATION_BATCH_SIZE, device)


def run_steps(
    step: Callable[[Batch, int], None],
    epoch_batches: Callable[[int], Iterator[Batch]],
    evaluate_model: Callable[[], Scores],
    clock: Clock,
    name: str,
) -> Curve:
    """Run steps until the budget is used up; return the scores of each evaluation, the first before any training."""
    curve: Curve = [curve_point(evaluate_model(), 0.0, 0, name)]
    steps_done = seen = 0
    clock.start()
    for epoch in itertools.count():
        for batch in epoch_batches(epoch):
            step(batch, steps_done)
            steps_done += 1
            seen += len(batch.is_next_B)
            clock.count_step(len(batch.is_next_B))
            if clock.evaluation_due(len(curve) - 1):
                clock.stop()
                curve.append(curve_point(evaluate_model(), clock.seconds_before, seen, name))
                clock.start()
                if len(curve) > clock.evaluations:
                    return curve
    raise AssertionError("the epochs never end")


def curve_point(scores: Scores, seconds: float, seen: int, name: str) -> dict[str, Any]:
    """Print one evaluation and return it; `seen` is the number of training pairs so far."""
    difference = scores.mlm_loss - scores.mlm_unigram_loss
    print(
        f"{name:<44}{seconds:7.1f} s{seen:>10,} pairs   "
        f"MLM {scores.mlm_loss:7.3f} ({difference:+.3f} relative to unigram)   "
        f"NSP {scores.nsp_loss:.4f} {scores.nsp_accuracy:.1%}",
        flush=True,
    )
    return {"seconds": round(seconds, 1), "seen": seen, **asdict(scores)}


def first_held_out(dataset: Dataset, pairs: int) -> Examples:
    """The first held-out pairs, which are the same for all models that are compared."""
    return dataset.examples("validation").first(pairs)


def unigram_loss(curve: Curve) -> float:
    """The unigram baseline on the pairs of this curve."""
    return float(np.mean([point["mlm_unigram_loss"] for point in curve]))
