"""What the training loop asks of a task: `pretraining.py` and `finetuning.py` are the two.

The loop, the checkpoints and the metrics are the same for both. A task knows its model, its data and its scores.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from babybert.config import FinetuneConfig, PretrainConfig
from babybert.data.loader import Loader
from babybert.data.tokenizer import Tokenizer
from babybert.model.bert import BertEncoder
from babybert.model.loss import ObjectiveSums

RunConfig = PretrainConfig | FinetuneConfig


class HeldOutScores(Protocol):
    """Scores on held-out data."""

    def as_dict(self) -> dict[str, Any]:
        """The scores by name, for JSON."""

    def describe(self) -> str:
        """The most important ones as one phrase, for the log."""


Scores_co = TypeVar("Scores_co", bound=HeldOutScores, covariant=True)


class TrainingTask(Protocol[Scores_co]):
    """One kind of training, with its data and settings."""

    @property
    def name(self) -> str:
        """Of the command."""

    @property
    def sums_class(self) -> type[ObjectiveSums]:
        """What the module of `with_loss` returns the fields of."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the data and the model."""

    @property
    def data_digest(self) -> str:
        """SHA-256 of what the order and the content of the batches depend on."""

    @property
    def data_name(self) -> str:
        """Where the data is, for messages."""

    @property
    def with_nsp(self) -> bool:
        """Whether the training data has both labels of next sentence prediction."""

    @property
    def model_name(self) -> str:
        """What the log calls the model."""

    def new_model(self) -> BertEncoder:
        """A model with its initial weights, drawn from PyTorch's generator."""

    def load_model(self, folder: Path) -> BertEncoder:
        """The model of a checkpoint of this run. Raises UsageError or DataError if settings or data do not fit it."""

    def with_loss(self, model: BertEncoder) -> nn.Module:
        """`model` with its loss inside: its forward takes a `Batch` and returns sums."""

    def make_optimizer(self, model: BertEncoder) -> torch.optim.Optimizer:
        """The optimizer. Each parameter group has a `factor` of the scheduled learning rate."""

    def make_loader(self, device: torch.device) -> Loader:
        """The training batches."""

    def evaluate(self, model: BertEncoder, device: torch.device, should_stop: Callable[[], bool]) -> Scores_co:
        """Score the held-out data. Raises EvaluationStopped soon after `should_stop()` becomes true."""
