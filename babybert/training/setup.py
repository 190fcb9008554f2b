"""What a run is made of before its first step: model, optimizer, loader, and the position to resume from."""

import io
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic

import numpy as np
import torch
from torch import nn

from babybert.checkpoint.format import TrainState, load_optimizer, read_state
from babybert.checkpoint.manager import CheckpointManager
from babybert.config import ModelConfig, PretrainConfig
from babybert.data.device_loader import DeviceLoader, fits_on_device
from babybert.data.loader import DynamicMasking, Loader
from babybert.data.table import Examples
from babybert.data.tokenizer import Tokenizer
from babybert.evaluation.scores import unigram_log_probs
from babybert.model.bert import BabyBert, BertEncoder
from babybert.training.distributed import DistributedContext
from babybert.training.plan import TrainingPlan
from babybert.training.resume import check_resumable, log_changes, resumed_state
from babybert.training.task import RunConfig, Scores_co, TrainingTask

logger = logging.getLogger(__name__)


@dataclass
class TrainingSetup(Generic[Scores_co]):
    """Everything that the loop works with."""

    config: RunConfig
    context: DistributedContext
    task: TrainingTask[Scores_co]
    bert: BertEncoder
    model: nn.Module  # `bert` with its losses, wrapped for the strategy
    optimizer: torch.optim.Optimizer
    loader: Loader
    plan: TrainingPlan
    state: TrainState
    resumed_from: Path | None  # the checkpoint's folder, on rank 0

    def rows_of(self, step: int) -> np.ndarray:
        """The rows of the training table in the batch of a step of this process."""
        epoch, batch, earlier_spans = self.plan.position(step)
        first = batch * self.config.batch_size
        return self.loader.order(epoch, earlier_spans)[first : first + self.config.batch_size]

    def describe(self) -> str:
        """The model, the data and the devices, for the log."""
        parameters = sum(parameter.numel() for parameter in self.bert.parameters())
        return (
            f"model: {self.task.model_name}, {parameters:,} parameters; {self.plan.pairs:,} pairs, "
            f"{self.plan.total_steps:,} steps; {self.context.describe()}"
        )


def set_up(
    config: RunConfig,
    context: DistributedContext,
    task: TrainingTask[Scores_co],
    manager: CheckpointManager | None,
) -> TrainingSetup[Scores_co]:
    """Build a new run, or the one of the checkpoint that rank 0's `manager` finds.

    Raises UsageError if the checkpoint has other sizes or another seed than the settings, or was trained on other data;
    DataError if it has another vocabulary.
    """
    folder = manager.find_resume_checkpoint() if manager else None
    torch.manual_seed(config.seed)  # for the initial weights
    bert = _resume_model(folder, config, task) if folder else task.new_model()
    bert.to(context.device)
    optimizer = task.make_optimizer(bert)
    state, saved_state = TrainState(), None
    if folder:
        load_optimizer(folder, optimizer)
        saved_state = read_state(folder)
        state = resumed_state(saved_state, config)
    state = _share_state(context, state, optimizer)
    if manager:
        manager.set_aside_newer_checkpoints()  # only now is it certain that the run can use the checkpoint
    model = context.wrap(task.with_loss(bert.set_kernels(config.kernels)))
    loader = task.make_loader(context.device)
    plan = TrainingPlan(len(loader.examples), config.batch_size, config.epochs, config.max_steps, start=replace(state))
    if saved_state and state.step < plan.total_steps:
        log_changes(saved_state, config, context.facts())
    return TrainingSetup(config, context, task, bert, model, optimizer, loader, plan, state, resumed_from=folder)


def _resume_model(folder: Path, config: RunConfig, task: TrainingTask[Scores_co]) -> BertEncoder:
    """The checkpoint's model, if the settings and the data fit it."""
    bert = task.load_model(folder)
    check_resumable(folder, read_state(folder), config, task)
    logger.info(f"resuming from {folder}")
    return bert


def new_model(config: PretrainConfig, sizes: ModelConfig, counts_V: np.ndarray) -> BabyBert:
    """A model with initial weights, drawn from PyTorch's generator."""
    bert = BabyBert(sizes)
    if config.initial_weights == "mimetic":
        bert.initialize_mimetic()
    elif config.initial_weights == "normal":
        bert.initialize_normal()
    if config.init_decoder_bias:
        bert.mlm_decoder.bias.data.copy_(torch.from_numpy(unigram_log_probs(counts_V)))
    return bert


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


def make_loader(config: PretrainConfig, train: Examples, tokenizer: Tokenizer, device: torch.device) -> Loader:
    """The training batches, made from arrays on the host or on the device."""
    masking = None
    if config.masking == "dynamic":
        shares = config.masked_share, config.masked_share_end
        continues_V = tokenizer.continuation_flags() if config.whole_word_masking else None
        masking = DynamicMasking(tokenizer.size, config.seed, *shares, config.epochs, continues_V)
    on_device = config.resident == "always" or (config.resident == "auto" and fits_on_device(train, device))
    if on_device:
        return DeviceLoader(train, config.batch_size, config.seed, config.bucketing, masking, device)
    return Loader(train, config.batch_size, config.seed, config.bucketing, masking)
