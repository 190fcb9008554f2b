"""The task of `babybert pretrain`: prepared pairs, a `BabyBert` and its two objectives."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from babybert.checkpoint.format import check_same_vocabulary, load_model
from babybert.checkpoint.source import CheckpointSource
from babybert.config import ModelConfig, PretrainConfig
from babybert.data.dataset import SPLITS, Dataset, warn_of_only_label
from babybert.data.loader import Loader
from babybert.data.s3_cache import CacheLimits
from babybert.data.s3_dataset import open_data
from babybert.data.table import Examples
from babybert.data.tokenizer import Tokenizer
from babybert.errors import DataError, UsageError
from babybert.evaluation.scores import Scores, evaluate_held_out
from babybert.folders import temporary_folder
from babybert.model.bert import BabyBert, BertEncoder
from babybert.model.loss import LossSums, ObjectiveSums, PretrainingModel
from babybert.training.distributed import DistributedContext
from babybert.training.optimizer import make_optimizer
from babybert.training.setup import make_loader, new_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainingTask:
    """See `TrainingTask`."""

    name: ClassVar[str] = "pretrain"
    sums_class: ClassVar[type[ObjectiveSums]] = LossSums

    config: PretrainConfig
    dataset: Dataset
    sizes: ModelConfig
    train: Examples
    held_out: Examples  # the pairs that are scored after each epoch
    counts_V: np.ndarray  # token counts of the training pairs (int64)

    @classmethod
    def open(cls, config: PretrainConfig, context: DistributedContext) -> "PretrainingTask":
        """Open the data on all ranks. Raises DataError, also if it has pairs that are too long for the model."""
        dataset = open_data(config.data, CacheLimits(config.cache, config.cache_gb))
        if context.is_main:
            logger.info(f"reading {config.data}")
        if context.is_main or dataset.per_node:
            for split in SPLITS:
                dataset.examples(split)  # writes the cache, which the other ranks then read
        context.barrier()
        sizes = config.sizes(dataset.tokenizer.size)
        _check_pair_lengths(config, dataset, sizes)
        train = dataset.examples("train")
        held_out = dataset.examples("validation").first(config.validation_pairs)
        if context.is_main:
            warn_of_only_label("train", train)
            warn_of_only_label("validation", held_out)
        return cls(config, dataset, sizes, train, held_out, dataset.token_counts())

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the data and the model."""
        return self.dataset.tokenizer

    @property
    def data_digest(self) -> str:
        """SHA-256 of the training rows and the tokenizer."""
        return self.dataset.digest

    @property
    def data_name(self) -> str:
        """Its folder or address."""
        return str(self.config.data)

    @property
    def with_nsp(self) -> bool:
        """Whether the training pairs have both labels."""
        return self.train.only_label is None

    @property
    def model_name(self) -> str:
        """The preset."""
        return self.config.preset

    def new_model(self) -> BabyBert:
        """A model with initial weights, or with those of `init_from`; see `setup.new_model`.

        Raises UsageError if that checkpoint has other sizes than the settings, DataError for another vocabulary.
        """
        if self.config.init_from is None:
            return new_model(self.config, self.sizes, self.counts_V)
        with temporary_folder("init-from") as folder:
            found = CheckpointSource(self.config.init_from).find(folder)
            source, tokenizer = load_model(found)
        self._check_fits(found, replace(source.config, dropout=self.sizes.dropout), tokenizer, "--init-from")
        logger.info(f"starting with the weights of {self.config.init_from}")
        bert = BabyBert(self.sizes)  # with the dropout of the settings
        bert.load_state_dict(source.state_dict())
        return bert

    def load_model(self, folder: Path) -> BabyBert:
        """The checkpoint's model, if the settings and the data fit it."""
        bert, tokenizer = load_model(folder)
        self._check_fits(folder, bert.config, tokenizer, "--out")
        return bert

    def _check_fits(self, folder: Path, sizes: ModelConfig, tokenizer: Tokenizer, flag: str) -> None:
        check_same_vocabulary(folder, tokenizer, self.dataset)
        if sizes != self.sizes:
            raise UsageError(f"{folder}: has sizes {sizes}, the settings ask for {self.sizes}; choose another {flag}")

    def with_loss(self, model: BertEncoder) -> nn.Module:
        """The model with both losses."""
        assert isinstance(model, BabyBert)
        return PretrainingModel(model)

    def make_optimizer(self, model: BertEncoder) -> torch.optim.Optimizer:
        """See `optimizer.make_optimizer`."""
        assert isinstance(model, BabyBert)
        return make_optimizer(model, self.config)

    def make_loader(self, device: torch.device) -> Loader:
        """See `setup.make_loader`."""
        return make_loader(self.config, self.train, self.dataset.tokenizer, device)

    def evaluate(self, model: BertEncoder, device: torch.device, should_stop: Callable[[], bool]) -> Scores:
        """Score the held-out pairs."""
        assert isinstance(model, BabyBert)
        return evaluate_held_out(
            model,
            self.held_out,
            self.counts_V,
            self.config.batch_size,
            device,
            task="validate",
            should_stop=should_stop,
        )


def _check_pair_lengths(config: PretrainConfig, dataset: Dataset, sizes: ModelConfig) -> None:
    longest = max(dataset.facts[split]["longest"] for split in SPLITS)
    if longest > sizes.max_positions:
        raise DataError(
            f"{config.data}: has a pair of {longest} tokens; the model supports at most {sizes.max_positions}: "
            "prepare the data with shorter pairs"
        )
