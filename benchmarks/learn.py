"""One training under a budget of seconds, with held-out losses on the way: what recipe.py, width.py and learning.py share.

The learning rate follows the clock in place of the steps: warm-up and decay fit the budget, however fast the machine and the
model are. Measuring on held-out pairs stops the clock. Else a step is what `babybert pretrain` does.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from babybert.config import PretrainConfig
from babybert.data.dataset import Dataset
from babybert.data.loader import Batch
from babybert.data.table import Examples
from babybert.evaluation.scores import Scores, evaluate_held_out
from babybert.model.bert import BabyBert
from babybert.model.loss import PretrainingModel
from babybert.training.distributed import DistributedContext, backward
from babybert.training.lr_schedule import learning_rate
from babybert.training.train import load_or_create, make_loader, make_optimizer

CPU = torch.device("cpu")
Curve = list[dict[str, Any]]


@dataclass
class Clock:
    """Seconds of training, up to a budget; it says when to look at the held-out pairs, and stands still meanwhile."""

    budget: float
    looks: int
    trained: float = 0.0
    began: float = 0.0

    def start(self) -> None:
        """Go on counting."""
        self.began = time.monotonic()

    def stop(self) -> None:
        """Count what has passed since `start`."""
        self.trained += time.monotonic() - self.began

    @property
    def now(self) -> float:
        """Seconds of training so far."""
        return self.trained + time.monotonic() - self.began

    def due(self, looked: int) -> bool:
        """Whether look number `looked` is due; the looks are evenly spread, and the last is at the budget's end."""
        return self.now >= self.budget * (looked + 1) / self.looks

    def rate(self, config: PretrainConfig) -> float:
        """The learning rate of now."""
        return learning_rate(
            int(1000 * min(self.now, self.budget)),
            int(1000 * self.budget),
            config.lr,
            config.warmup_fraction,
            config.schedule,
        )


def settings(data: Path, **given: Any) -> PretrainConfig:
    """As the command line makes them: what the recipe implies, and over it what is given."""
    given = {"data": data, "metrics": False, "device": "cpu", **given}
    return PretrainConfig(**{**PretrainConfig.implied(given), **given})


def learn(
    config: PretrainConfig,
    dataset: Dataset,
    held_out: Examples,
    seconds: float,
    looks: int,
    name: str,
    train: Examples | None = None,
) -> tuple[BabyBert, Curve]:
    """Train for so long, on the dataset's pairs or on `train`; returns the model and its scores on `held_out` at evenly spread times."""
    torch.manual_seed(config.seed)
    counts_V = dataset.token_counts()
    bert = load_or_create(config, dataset, counts_V, None).set_kernels(config.kernels)
    model, optimizer, parallel = (
        PretrainingModel(bert),
        make_optimizer(bert, config),
        DistributedContext("single", CPU, bf16=False),
    )

    def step(batch: Batch, number: int, clock: Clock) -> None:
        for group in optimizer.param_groups:
            group["lr"] = clock.rate(config) * group["factor"]
        parallel.seed_step(config.seed, number)
        backward(model, batch, parallel, config.accumulate)
        nn.utils.clip_grad_norm_(bert.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    loader = make_loader(config, train or dataset.examples("train"), dataset.tokenizer.size, CPU)
    return bert, run(
        step,
        loader.epoch,
        lambda: evaluate_held_out(bert, held_out, counts_V, 64, CPU),
        Clock(seconds, looks),
        config.batch_size,
        name,
    )


def run(
    step: Callable[[Batch, int, Clock], None],
    epoch: Callable[[int], Any],
    look: Callable[[], Scores],
    clock: Clock,
    batch_size: int,
    name: str,
) -> Curve:
    """Take steps until the clock has run out; returns the scores of each look with its seconds and pairs."""
    curve: Curve = [point(look(), 0.0, 0, name)]
    number = 0
    clock.start()
    for count in range(10**6):
        for batch in epoch(count):
            step(batch, number, clock)
            number += 1
            if clock.due(len(curve) - 1):
                clock.stop()
                curve.append(point(look(), clock.trained, number * batch_size, name))
                clock.start()
                if clock.now >= clock.budget:
                    return curve
    raise AssertionError("a million epochs")


def point(scores: Scores, seconds: float, seen: int, name: str) -> dict[str, Any]:
    """One look, told and returned; `seen` are training pairs."""
    gain = scores.mlm_unigram_loss - scores.mlm_loss
    print(
        f"{name:<44}{seconds:7.1f} s{seen:>10,} pairs   MLM {scores.mlm_loss:7.3f} ({gain:+.3f} to word counts)   "
        f"NSP {scores.nsp_loss:.4f} {scores.nsp_accuracy:.1%}",
        flush=True,
    )
    return {"seconds": round(seconds, 1), "seen": seen, **asdict(scores)}


def some_pairs(dataset: Dataset, pairs: int) -> Examples:
    """The first held-out pairs: the same for all that are compared."""
    return dataset.examples("validation").first(pairs)


def unigram(curve: Curve) -> float:
    """The loss of word counts on the pairs of this curve."""
    return float(np.mean([at["mlm_unigram_loss"] for at in curve]))
