"""Publishes a run's metrics: Prometheus, `metrics.jsonl`, TensorBoard and `summary.json`.

Values on the device are read here, every `log_every` steps. Between these reads, nothing waits for the GPU.
"""

import contextlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from babybert.checkpoint.format import TrainState
from babybert.checkpoint.metrics_log import MetricsLog
from babybert.errors import StorageError, UsageError, os_reason
from babybert.model.loss import ObjectiveSums
from babybert.training.distributed import DistributedContext
from babybert.training.metrics import RunMetrics
from babybert.training.nonfinite_guard import NonFiniteGuard
from babybert.training.plan import TrainingPlan
from babybert.training.task import HeldOutScores, RunConfig

logger = logging.getLogger(__name__)


class MetricsReporter:
    """Sums the steps' losses and publishes their means every `log_every` steps.

    `with_nsp` is False if all training pairs have one label. The loss and accuracy of NSP are then null: an accuracy of
    100 % would only mean that the model gives a constant answer.
    """

    def __init__(
        self,
        config: RunConfig,
        context: DistributedContext,
        metrics: RunMetrics,
        state: TrainState,
        plan: TrainingPlan,
        with_nsp: bool,
    ) -> None:
        self._config = config
        self._context = context
        self._metrics = metrics
        self._plan = plan
        self._with_nsp = with_nsp
        self._log = MetricsLog(config.out)
        self._sums: ObjectiveSums | None = None  # since the last publication
        self._start_time = self._last_publication = time.monotonic()
        self._start_step = state.step
        self._earlier_seconds = state.seconds
        self._nonfinite_steps = self._log.nonfinite_steps(after=state.step)
        metrics.restarts.set(state.restarts)
        metrics.nonfinite_ends.set(len(self._nonfinite_steps))
        if context.is_main and state.step:
            self._log.write("resume", step=state.step, restarts=state.restarts)
        self._tensorboard = _open_tensorboard(config.out) if config.tensorboard and context.is_main else None

    @property
    def seconds(self) -> float:
        """Seconds of training, earlier processes included."""
        return self._earlier_seconds + time.monotonic() - self._start_time

    @property
    def out_of_time(self) -> bool:
        """Whether `max_minutes` are over."""
        return self._config.max_minutes is not None and self.seconds >= 60 * self._config.max_minutes

    def with_seconds(self, state: TrainState) -> TrainState:
        """`state` with the seconds of training up to now."""
        return replace(state, seconds=round(self.seconds, 3))

    def record_step(
        self, sums: ObjectiveSums, state: TrainState, lr: float, gradient_norm: Tensor, guard: NonFiniteGuard
    ) -> dict[str, float]:
        """Add a step. Every `log_every` steps, publish the means since the last time and return them."""
        self._sums = sums if self._sums is None else self._sums + sums
        self._metrics.learning_rate.set(lr)
        self._metrics.progress.set(self._plan.share_done(state.step))
        # A failure counts until the run has passed the step at which it happened.
        self._metrics.nonfinite_ends.set(sum(step > state.step for step in self._nonfinite_steps))
        if state.step % self._config.log_every and state.step != self._plan.total_steps:
            return {}
        guard.check()
        global_sums = self._sums.map(self._context.all_reduce_sum)
        self._sums = None
        return self._publish(global_sums, state, lr, float(gradient_norm)) if self._context.is_main else {}

    def _publish(self, sums: ObjectiveSums, state: TrainState, lr: float, gradient_norm: float) -> dict[str, float]:
        now = time.monotonic()
        seconds_per_step = (now - self._start_time) / (state.step - self._start_step)
        pairs = int(sums.labelled.item())
        means = sums.means(self._with_nsp)
        speeds = {
            "lr": lr,
            "gradient_norm": gradient_norm,
            "pairs_per_second": round(pairs / (now - self._last_publication), 1),
        }
        self._last_publication = now
        self._metrics.record_training(sums, self._with_nsp)
        self._metrics.gradient_norm.set(gradient_norm)
        self._metrics.seconds_left.set((self._plan.total_steps - state.step) * seconds_per_step)
        self._write("train", state, {**means, **speeds})
        return {name: value for name, value in {**means, "lr": lr}.items() if value is not None}

    def record_nonfinite(self, step: int) -> None:
        """Leave a line for the next process: this one ends too soon for Prometheus to notice."""
        if self._context.is_main:
            with contextlib.suppress(StorageError):
                self._log.write("nonfinite", step=step)

    def record_validation(self, scores: HeldOutScores, state: TrainState) -> None:
        """Publish held-out scores."""
        self._metrics.record_validation(scores)
        self._write("validation", state, scores.as_dict())
        self._last_publication = time.monotonic()
        logger.info(f"step {state.step:,}: held-out {scores.describe()}")

    def _write(self, split: str, state: TrainState, values: Mapping[str, Any]) -> None:
        trained_pairs = self._plan.pairs_before(state.step)
        seconds = round(self.seconds, 3)
        try:
            self._log.write(
                split, step=state.step, epoch=state.epoch, trained_pairs=trained_pairs, seconds=seconds, **values
            )
        except StorageError as error:  # a gap in the curve is no reason to end the run
            logger.warning(str(error))
        if self._tensorboard:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._tensorboard.add_scalar(f"{split}/{name}", value, state.step)

    def write_summary(self, ended_by: str, checkpoint: Path, state: TrainState, scores: HeldOutScores | None) -> None:
        """Write `summary.json`. Raises StorageError."""
        summary = {
            "ended_by": ended_by,
            "checkpoint": str(checkpoint),
            **asdict(self.with_seconds(state)),
            "trained_pairs": self._plan.pairs_before(state.step),
            "scores": scores.as_dict() if scores else None,
            "settings": self._config.as_json(),
        }
        partial = self._config.out / ".summary.json"
        try:
            partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
            partial.replace(self._config.out / "summary.json")
        except OSError as error:
            raise StorageError(f"{partial}: cannot be written: {os_reason(error)}; the checkpoint is valid") from error
        if self._tensorboard:
            self._tensorboard.close()


def _open_tensorboard(run: Path) -> Any:
    """TensorBoard's writer. Raises UsageError where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("--tensorboard needs the package: pip install 'babybert-pretrain[tensorboard]'") from error
    return SummaryWriter(str(run / "tensorboard"))
