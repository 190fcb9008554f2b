"""Helpers that the benchmarks share: configurations, models, whole training steps, timing, and JSON results.

The other benchmarks reach the training loop through this module, so that they do not depend on how it is split into
modules.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from babybert.config import PretrainConfig, model_config
from babybert.data.dataset import Dataset
from babybert.data.loader import Batch, Loader
from babybert.data.table import Examples
from babybert.model.bert import BabyBert
from babybert.model.loss import PretrainingModel
from babybert.model.ops import bf16_wins
from babybert.training.distributed import DistributedContext
from babybert.training.lr_schedule import learning_rate
from babybert.training.optimizer import make_optimizer
from babybert.training.setup import make_loader
from babybert.training.setup import new_model as initial_model
from babybert.training.step import clip_gradients, forward_backward

CPU = torch.device("cpu")


def recipe_config(data: Path, **overrides: Any) -> PretrainConfig:
    """The configuration of `babybert pretrain`: the preset's recipe, and `overrides` on top of it."""
    settings: dict[str, Any] = {"data": data, "metrics": False, "device": "cpu", **overrides}
    return PretrainConfig(**settings)


def preset_config(data: Path, preset: str, **overrides: Any) -> PretrainConfig:
    """A configuration with the sizes and the dropout of a preset, for measurements of speed.

    The recipe of `baby` has no dropout. The sizes have 0.1, as the reference and Hugging Face's model do. The wide
    recipes use Muon; here all models have AdamW. So all of them do the same work.
    """
    same = {"dropout": model_config(preset, vocab_size=6).dropout, "optimizer": "adamw", "metrics": False}
    return PretrainConfig(data=data, preset=preset, **{**same, **overrides})


def new_model(config: PretrainConfig, dataset: Dataset) -> BabyBert:
    """A model with initial weights, as `babybert pretrain` creates it."""
    bert = initial_model(config, config.sizes(dataset.tokenizer.size), dataset.token_counts())
    return bert.set_kernels(config.kernels)


def training_loader(
    config: PretrainConfig, dataset: Dataset, train: Examples | None = None, device: torch.device = CPU
) -> Loader:
    """The batches of `babybert pretrain`, of the dataset's training pairs or of `train`."""
    return make_loader(config, train or dataset.examples("train"), dataset.tokenizer, device)


def lr_at(config: PretrainConfig, progress: float) -> float:
    """The learning rate after this share of the training: the schedule by millionths."""
    return learning_rate(int(1e6 * progress), 10**6, config.lr, config.warmup_fraction, config.schedule)


def seed_step(seed: int, step: int) -> None:
    """Seed dropout for a step, as training on one device does."""
    DistributedContext("single", CPU, bf16=False).seed_step(seed, step)


@dataclass
class TrainingStep:
    """One training step of `babybert pretrain` on one device: forward, backward, clipping and optimizer."""

    bert: BabyBert
    model: nn.Module  # the loss of `bert`, possibly compiled
    optimizer: torch.optim.Optimizer
    context: DistributedContext
    config: PretrainConfig

    @classmethod
    def of(cls, bert: BabyBert, config: PretrainConfig, device: torch.device = CPU) -> "TrainingStep":
        """The step of `bert`, which is on `device`, with a new optimizer, in the precision that `config` asks for."""
        is_picked = config.precision == "auto" and bf16_wins(
            device, bert.config.width, config.batch_size, config.kernels
        )
        context = DistributedContext("single", device, bf16=config.precision == "bf16" or is_picked)
        return cls(bert, PretrainingModel(bert), make_optimizer(bert, config), context, config)

    def __call__(self, batch: Batch) -> None:
        forward_backward(self.model, batch, self.context, self.config.accumulate)
        clip_gradients(self.bert.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def seconds_of(action: Callable[[], object]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def write_json(path: Path, result: Any) -> Path:
    """Write a benchmark's figures, and return `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path
