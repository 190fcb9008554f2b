"""Whether a run can continue from a checkpoint, where in the data, and whether its results stay the same to the bit."""

import logging
from pathlib import Path
from typing import Any

from babybert.checkpoint.format import CheckpointState, TrainState
from babybert.data.epoch_order import BatchSpan
from babybert.errors import UsageError
from babybert.training.task import RunConfig, TrainingTask

logger = logging.getLogger(__name__)

# Settings that the results of a step depend on. Sizes, seed and data are not among them: they cannot change.
RESULT_SETTINGS = (
    "batch_size",
    "bucketing",
    "accumulate",
    "masking",
    "masked_share",
    "masked_share_end",
    "whole_word_masking",
    "optimizer",
    "lr",
    "decoder_lr_factor",
    "embedding_lr_factor",
    "decoder_epsilon",
    "weight_decay",
    "decay_vectors",
    "clip_norm",
    "epochs",
    "max_steps",
    "schedule",
    "warmup_fraction",
    "kernels",
    "balance_classes",
)


def check_resumable(folder: Path, state: CheckpointState, config: RunConfig, task: TrainingTask[Any]) -> None:
    """Raise UsageError if the checkpoint's position means other pairs with this seed or these data."""
    seed = state.settings["seed"]
    if seed != config.seed:
        raise UsageError(
            f"{folder}: was trained with seed {seed}, the settings say {config.seed}: pairs would be skipped or "
            "repeated; keep the value, or choose another --out"
        )
    if state.data_digest != task.data_digest:
        raise UsageError(
            f"{folder}: was trained on other data than {task.data_name}; use the same data, or choose another --out"
        )


def resumed_state(state: CheckpointState, config: RunConfig) -> TrainState:
    """Where the run continues: with the pairs that are left of the epoch, also if they are now batched differently."""
    resumed = state.train_state()
    batch_size, bucketing = state.settings["batch_size"], state.settings["bucketing"]
    if resumed.batch and (batch_size, bucketing) != (config.batch_size, config.bucketing):
        resumed.earlier_spans = [*resumed.earlier_spans, BatchSpan(batch_size, bucketing, resumed.batch)]
        resumed.batch = 0
    return resumed


def log_changes(state: CheckpointState, config: RunConfig, devices: dict[str, Any]) -> None:
    """Log what has changed since the checkpoint and makes the results differ; nothing if they stay the same.

    Args:
        state: of the checkpoint.
        config: the settings now.
        devices: `DistributedContext.facts` now.
    """
    names = [*RESULT_SETTINGS, *(state.devices or {})]
    before = {**state.settings, **(state.devices or {})}
    now = {**config.as_json(), **devices}
    changes = [
        f"{name} changed from {before[name]} to {now[name]}"
        for name in names
        if name in before and name in now and before[name] != now[name]
    ]
    if not changes:
        return
    message = f"results are not bit-identical to an uninterrupted run because {', '.join(changes)}"
    if state.settings["batch_size"] != config.batch_size:
        message += f"; the learning rate is not scaled with the batch size: its peak is {config.lr:g}"
    logger.info(message)
