"""What a run is made of before its first step: data, model, optimizer, loader, and the position to resume from."""

import io
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from babybert.checkpoint.format import (
    CheckpointState,
    TrainState,
    check_same_vocabulary,
    load_model,
    load_optimizer,
    read_state,
)
from babybert.checkpoint.manager import CheckpointManager
from babybert.config import ModelConfig, PretrainConfig
from babybert.data.dataset import SPLITS, Dataset
from babybert.data.device_loader import DeviceLoader, fits_on_device
from babybert.data.loader import DynamicMasking, Loader, batches_in_epoch, pairs_before
from babybert.data.table import Examples
from babybert.errors import DataError, UsageError
from babybert.evaluation.scores import unigram_log_probs
from babybert.model.bert import BabyBert
from babybert.model.loss import PretrainingModel
from babybert.training.distributed import DistributedContext
from babybert.training.optimizer import make_optimizer

logger = logging.getLogger(__name__)

# Settings that decide which pairs a batch holds: a resumed run must have the same.
ORDER_SETTINGS = ("batch_size", "seed", "bucketing")


@dataclass
class TrainingSetup:
    """Everything that the loop works with."""

    config: PretrainConfig
    context: DistributedContext
    dataset: Dataset
    held_out: Examples  # the pairs that are scored after each epoch
    counts_V: np.ndarray  # token counts of the training pairs (int64)
    bert: BabyBert
    model: nn.Module  # `bert` with its losses, wrapped for the strategy
    optimizer: torch.optim.Optimizer
    loader: Loader
    state: TrainState
    resumed_from: Path | None  # the checkpoint's folder, on rank 0

    @property
    def training_pairs(self) -> int:
        """Pairs of an epoch."""
        return len(self.loader.examples)

    @property
    def batches_per_epoch(self) -> int:
        """Steps of an epoch; the last batch may be smaller."""
        return batches_in_epoch(self.training_pairs, self.config.batch_size)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        steps = self.config.epochs * self.batches_per_epoch
        return min(steps, self.config.max_steps) if self.config.max_steps else steps

    def pairs_before(self, step: int) -> int:
        """Pairs of all steps before `step`."""
        return pairs_before(step, self.batches_per_epoch, self.training_pairs, self.config.batch_size)

    def pairs_in_batch(self, batch: int) -> int:
        """Pairs of an epoch's batch with this index."""
        return min(self.config.batch_size, self.training_pairs - batch * self.config.batch_size)

    def describe(self) -> str:
        """The model, the data and the devices, for the log."""
        parameters = sum(parameter.numel() for parameter in self.bert.parameters())
        return (
            f"model: {self.config.preset}, {parameters:,} parameters; {self.training_pairs:,} pairs, "
            f"{self.total_steps:,} steps; {self.context.describe()}"
        )


def set_up(
    config: PretrainConfig, context: DistributedContext, dataset: Dataset, manager: CheckpointManager | None
) -> TrainingSetup:
    """Build a new run, or the one of the checkpoint that rank 0's `manager` finds.

    Raises UsageError if the checkpoint has other sizes or another order of pairs than the settings; DataError if it has
    another vocabulary, or if the data has pairs that are too long for the model.
    """
    train = dataset.examples("train")
    held_out = dataset.examples("validation").first(config.validation_pairs)
    counts_V = dataset.token_counts()
    sizes = config.sizes(dataset.tokenizer.size)
    folder = manager.find_resume_checkpoint() if manager else None
    _check_pair_lengths(config, dataset, sizes)
    torch.manual_seed(config.seed)  # for the initial weights
    bert = _resume_model(folder, config, dataset, sizes) if folder else new_model(config, sizes, counts_V)
    bert.to(context.device)
    optimizer = make_optimizer(bert, config)
    state = TrainState()
    if folder:
        load_optimizer(folder, optimizer)
        state = read_state(folder).train_state()
    state = _share_state(context, state, optimizer)
    if manager:
        manager.set_aside_newer_checkpoints()  # only now is it certain that the run can use the checkpoint
    model = context.wrap(PretrainingModel(bert.set_kernels(config.kernels)))
    loader = make_loader(config, train, dataset.tokenizer.size, context.device)
    return TrainingSetup(
        config, context, dataset, held_out, counts_V, bert, model, optimizer, loader, state, resumed_from=folder
    )


def new_model(config: PretrainConfig, sizes: ModelConfig, counts_V: np.ndarray) -> BabyBert:
    """A model with initial weights, drawn from PyTorch's generator."""
    bert = BabyBert(sizes)
    if config.initial_weights == "mimetic":
        bert.initialize_mimetic()
    if config.init_decoder_bias:
        bert.mlm_decoder.bias.data.copy_(torch.from_numpy(unigram_log_probs(counts_V)))
    return bert


def _resume_model(folder: Path, config: PretrainConfig, dataset: Dataset, sizes: ModelConfig) -> BabyBert:
    """The checkpoint's model, if the settings and the data fit it."""
    bert, tokenizer = load_model(folder)
    check_same_vocabulary(folder, tokenizer, dataset)
    _check_same_order(folder, read_state(folder), config, dataset)
    if bert.config != sizes:
        raise UsageError(f"{folder}: has sizes {bert.config}, the settings ask for {sizes}; choose another --out")
    logger.info(f"resuming from {folder}")
    return bert


def _check_pair_lengths(config: PretrainConfig, dataset: Dataset, sizes: ModelConfig) -> None:
    longest = max(dataset.facts[split]["longest"] for split in SPLITS)
    if longest > sizes.max_positions:
        raise DataError(
            f"{config.data}: has a pair of {longest} tokens; the model supports at most {sizes.max_positions}: "
            "prepare the data with shorter pairs"
        )


def _check_same_order(folder: Path, state: CheckpointState, config: PretrainConfig, dataset: Dataset) -> None:
    """Raise UsageError if the checkpoint's position means other pairs under these settings."""
    for name in ORDER_SETTINGS:
        before, now = state.settings[name], getattr(config, name)
        if before != now:
            raise UsageError(
                f"{folder}: was trained with {name} {before}, the settings say {now}: pairs would be skipped or "
                "repeated; keep the value, or choose another --out"
            )
    if state.data_digest != dataset.digest:
        raise UsageError(
            f"{folder}: was trained on other data than {config.data}; use the same data, or choose another --out"
        )


def _share_state(context: DistributedContext, state: TrainState, optimizer: torch.optim.Optimizer) -> TrainState:
    """Rank 0's position on all ranks, counted as a restart, with its optimizer state loaded into `optimizer`.

    DistributedDataParallel itself shares the weights.
    """
    if context.world_size > 1:
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        state, content = context.broadcast_object((state, buffer.getvalue()))
        if not context.is_main and state.step:
            optimizer.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    return replace(state, restarts=state.restarts + 1) if state.step else state


def make_loader(config: PretrainConfig, train: Examples, vocab_size: int, device: torch.device) -> Loader:
    """The training batches, made from arrays on the host or on the device."""
    masking = DynamicMasking(vocab_size, config.seed, config.masked_share) if config.masking == "dynamic" else None
    on_device = config.resident == "always" or (config.resident == "auto" and fits_on_device(train, device))
    if on_device:
        return DeviceLoader(train, config.batch_size, config.seed, config.bucketing, masking, device)
    return Loader(train, config.batch_size, config.seed, config.bucketing, masking)
