"""What a run says while it trains: Prometheus, `metrics.jsonl`, TensorBoard, `summary.json`, and that a loss is no number.

Everything that lies on the device is read here, every `log_every` steps and before a checkpoint: in between, a GPU is
never waited for.
"""

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from babybert.checkpoint.format import TrainState
from babybert.checkpoint.metrics_log import MetricsLog
from babybert.config import PretrainConfig
from babybert.data.loader import Loader
from babybert.errors import StorageError, UsageError, UserError
from babybert.evaluation.scores import Scores
from babybert.model.loss import LossSums
from babybert.progress import say
from babybert.training.distributed import DistributedContext
from babybert.training.metrics import RunMetrics


class NonFiniteGuard:
    """Notes the first step whose gradient is no number, without making a GPU wait; `check` reads the note."""

    def __init__(self, device: torch.device, loader: Loader, epoch_batches: int, report: Callable[[int], None]) -> None:
        self._bad_step = torch.full((), -1, device=device)
        self._loader, self._epoch_batches, self._report = loader, epoch_batches, report

    def look(self, gradient_norm: Tensor, step: int) -> None:
        """Look at the gradient of the step with this number (0 is the first)."""
        self._bad_step = torch.where((self._bad_step < 0) & ~gradient_norm.isfinite(), step, self._bad_step)
        if self._bad_step.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raise UserError, naming the step and its batch's rows, if any gradient was no number."""
        step = int(self._bad_step.item())
        if step < 0:
            return
        self._report(step + 1)
        epoch, batch = divmod(step, self._epoch_batches)
        size = self._loader.batch_size
        rows = self._loader.order(epoch)[batch * size : (batch + 1) * size]
        shown = ", ".join(map(str, rows[:8])) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        raise UserError(
            f"the loss or its gradient is no number at step {step + 1} (rows {shown} of the training table, from 0); "
            "the last checkpoint is untouched: go on from it with a lower --lr"
        )


class Reporter:
    """Adds up what the steps were made of, and publishes it every `log_every` of them."""

    def __init__(
        self,
        config: PretrainConfig,
        parallel: DistributedContext,
        metrics: RunMetrics,
        state: TrainState,
        total_steps: int,
    ) -> None:
        self._config, self._parallel, self._metrics, self._total_steps = config, parallel, metrics, total_steps
        self._log = MetricsLog(config.out)
        self._seen: LossSums | None = None
        self._begin, self._before, self._first_step = time.monotonic(), state.seconds, state.step
        self._last_read = self._begin
        metrics.restarts.set(state.restarts)
        self._bad_steps = self._log.bad_steps(state.step)
        metrics.bad_ends.set(len(self._bad_steps))
        if parallel.is_main and state.step:
            self._log.write("resume", step=state.step, restarts=state.restarts)
        self._board = _tensorboard(config.out) if config.tensorboard and parallel.is_main else None

    @property
    def seconds(self) -> float:
        """Of training, the processes before this one counted."""
        return self._before + time.monotonic() - self._begin

    @property
    def out_of_time(self) -> bool:
        """Whether `max_minutes` are over."""
        return self._config.max_minutes is not None and self.seconds >= 60 * self._config.max_minutes

    def now(self, state: TrainState) -> TrainState:
        """The state as a checkpoint keeps it."""
        return replace(state, seconds=round(self.seconds, 3))

    def step(
        self, totals: LossSums, state: TrainState, rate: float, gradient_norm: Tensor, watch: NonFiniteGuard
    ) -> dict[str, float]:
        """Add a step; every so often publish the means since the last time, and return them."""
        self._seen = totals if self._seen is None else self._seen + totals
        self._metrics.rate.set(rate)
        self._metrics.progress.set(state.step / self._total_steps)
        self._metrics.bad_ends.set(sum(bad > state.step for bad in self._bad_steps))
        if state.step % self._config.log_every and state.step != self._total_steps:
            return {}
        watch.check()
        seen, self._seen = self._seen.map(self._parallel.sum), None
        if not self._parallel.is_main:
            return {}
        now = time.monotonic()
        left = (self._total_steps - state.step) * (now - self._begin) / (state.step - self._first_step)
        found = {
            "mlm_loss": seen.mlm_loss.item(),
            "nsp_loss": seen.nsp_loss.item(),
            "nsp_accuracy": seen.nsp_accuracy.item(),
        }
        norm, pairs = float(gradient_norm), int(seen.nsp_count.item())
        self._metrics.count(seen)
        self._metrics.gradient.set(norm)
        self._metrics.left.set(left)
        rates = {"lr": rate, "gradient_norm": norm, "pairs_per_second": round(pairs / (now - self._last_read), 1)}
        self._last_read = now
        self._write("train", state, {**found, **rates})
        return {**found, "lr": rate}

    def nonfinite(self, step: int) -> None:
        """Leave a line for the process after this one: it ends too soon for Prometheus to see it."""
        if self._parallel.is_main:
            with contextlib.suppress(StorageError):
                self._log.write("nonfinite", step=step)

    def validated(self, scores: Scores, state: TrainState) -> None:
        """Publish held-out scores."""
        self._metrics.validated(scores)
        self._write("validation", state, scores.as_dict())
        self._last_read = time.monotonic()
        say(
            f"step {state.step:,}: held-out MLM {scores.mlm_loss:.3f} (unigram {scores.mlm_unigram_loss:.3f}), "
            f"NSP {scores.nsp_loss:.3f} (chance {scores.nsp_chance_loss:.3f}), NSP accuracy {scores.nsp_accuracy:.1%}"
        )

    def _write(self, split: str, state: TrainState, values: dict[str, float]) -> None:
        try:
            self._log.write(split, step=state.step, epoch=state.epoch, seconds=round(self.seconds, 3), **values)
        except StorageError as error:  # a gap in the curve is no reason to lose the run
            say(f"warning: {error}")
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(f"{split}/{name}", value, state.step)

    def summarize(self, ended_by: str, checkpoint: Path, state: TrainState, scores: Scores | None) -> None:
        """Write `summary.json`. Raises StorageError."""
        found = scores.as_dict() if scores else None
        summary = {
            "ended_by": ended_by,
            "checkpoint": str(checkpoint),
            **asdict(self.now(state)),
            "scores": found,
            "settings": self._config.as_json(),
        }
        partial = self._config.out / ".summary.json"
        try:
            partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
            partial.replace(self._config.out / "summary.json")
        except OSError as error:
            raise StorageError(f"{partial}: cannot be written: {error.strerror}; the checkpoint is whole") from error
        if self._board:
            self._board.close()


def _tensorboard(run: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("--tensorboard needs the package: pip install 'babybert-pretrain[tensorboard]'") from error
    return SummaryWriter(str(run / "tensorboard"))
