"""The training loop of `babybert pretrain` and `finetune`: set up, then for each epoch train, validate and save.

A run is a function of its settings and its data. The pairs, masks and dropout of a step depend on (seed, step) alone,
and a checkpoint holds the weights, the optimizer and the index of the next batch. So a run that was stopped or killed
and then resumed ends, on the CPU, with the same bits as one that was never stopped. A test compares the two. A resume
may also change the batch size or the devices: each pair still comes once an epoch, but the bits differ.

What is trained, on which data, is the task's part (see `task.py`). When a text is classified, it counts as a pair.
"""

import contextlib
import logging
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, TypeVar

from babybert.checkpoint.format import CheckpointState
from babybert.checkpoint.manager import CheckpointManager
from babybert.config import PretrainConfig
from babybert.evaluation.predictions import EvaluationStopped
from babybert.evaluation.scores import Scores
from babybert.progress import Progress
from babybert.training.distributed import DistributedContext, start_distributed
from babybert.training.free_memory import FreeMemory
from babybert.training.lr_schedule import learning_rate
from babybert.training.metrics import RunMetrics
from babybert.training.metrics_reporter import MetricsReporter
from babybert.training.nonfinite_guard import NonFiniteGuard
from babybert.training.optimizer import set_learning_rate
from babybert.training.pretraining import PretrainingTask
from babybert.training.setup import TrainingSetup, set_up
from babybert.training.step import clip_gradients, forward_backward
from babybert.training.stop_signal import StopSignal
from babybert.training.task import HeldOutScores, RunConfig, TrainingTask

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=HeldOutScores)
Run = TypeVar("Run", bound=RunConfig)


@dataclass(frozen=True)
class RunResult(Generic[S]):
    """How a run ended."""

    checkpoint: Path  # the newest one
    scores: S | None  # the last held-out scores; None if the run was stopped before them
    stopped_by: signal.Signals | None  # None if the run is complete


TrainingResult = RunResult[Scores]


def pretrain(config: PretrainConfig) -> TrainingResult | None:
    """Pretrain; see `train`."""
    width = config.sizes(vocab_size=6).width
    return train(config, width, PretrainingTask.open)


def train(
    config: Run, width: int, open_task: Callable[[Run, DistributedContext], TrainingTask[S]]
) -> RunResult[S] | None:
    """Train until `epochs`, `max_steps` or `max_minutes` are done, or until SIGTERM or SIGINT asks for an early end.

    Returns None on all ranks except rank 0. Raises UserError and its subclasses (see `errors.py`); the checkpoints
    written so far stay.

    Args:
        config: the settings.
        width: of the model; the choice of the precision depends on it.
        open_task: reads the data, on all ranks.
    """
    pairs = config.batch_size // config.accumulate
    with (
        start_distributed(config.parallel, config.device, config.precision, width, pairs, config.kernels) as context,
        contextlib.ExitStack() as stack,
    ):
        metrics = RunMetrics()
        if config.metrics and context.is_main:
            metrics.serve(config.metrics_host, config.metrics_port)
        manager = None
        if context.is_main:
            manager = stack.enter_context(CheckpointManager(config, metrics.checkpoints))
        setup = set_up(config, context, open_task(config, context), manager)
        if manager:
            logger.info(setup.describe())
        result = _train(setup, manager, metrics)
        if result and config.pushgateway_url:
            metrics.push(config.pushgateway_url, config.out.name)
        return result


def _train(run: TrainingSetup[S], manager: CheckpointManager | None, metrics: RunMetrics) -> RunResult[S] | None:
    config, context, plan, state, optimizer = run.config, run.context, run.plan, run.state, run.optimizer
    sums_class = run.task.sums_class
    reporter = MetricsReporter(config, context, metrics, state, plan, run.task.with_nsp)
    free_memory = FreeMemory()
    guard = NonFiniteGuard(context.device, run.rows_of, reporter.record_nonfinite)
    scores: S | None = None
    newest_checkpoint = run.resumed_from
    ends_early = False  # because of a signal, or because `max_minutes` are over
    if manager:
        manager.start_interval(state.step)

    with StopSignal() as stop, _progress(run) as progress:
        while state.step < plan.total_steps and not ends_early:
            metrics.epoch.set(state.epoch)
            epoch_batches = plan.batches_in_epoch(state.earlier_spans)
            batches = run.loader.epoch(state.epoch, state.batch, context.rank, context.world_size, state.earlier_spans)
            for batch in metrics.timed(batches):
                # Learning rate and dropout are functions of the step, so a resume restores no schedule and no seed.
                lr = learning_rate(*plan.schedule_step(state.step), config.lr, config.warmup_fraction, config.schedule)
                set_learning_rate(optimizer, lr)
                context.seed_step(config.seed, state.step)
                sums = forward_backward(run.model, batch.to(context.device), context, config.accumulate, sums_class)
                gradient_norm = clip_gradients(run.bert.parameters(), config.clip_norm)
                guard.record(gradient_norm, state.step)
                optimizer.step()
                optimizer.zero_grad()

                free_memory.return_if_due()
                pairs = plan.pairs_of(state.step)
                state.step += 1
                state.batch += 1
                progress.advance(pairs, reporter.record_step(sums, state, lr, gradient_norm, guard))
                # All ranks must leave the loop after the same step, or the next collective operation would hang.
                ends_early = context.any_rank(bool(stop) or reporter.out_of_time)
                if ends_early or state.step == plan.total_steps or state.batch == epoch_batches:
                    break
                if manager and manager.is_due(state.step):
                    guard.check()  # never save a model with non-finite weights
                    newest_checkpoint = _save(run, manager, reporter, None) or newest_checkpoint

            if state.batch == epoch_batches:
                state.epoch, state.batch, state.earlier_spans = state.epoch + 1, 0, []
            guard.check()
            if manager:  # rank 0 validates and saves; the others wait at the next collective operation
                scores = _validate(run, reporter, stop)
                is_last = ends_early or bool(stop) or state.step == plan.total_steps
                newest_checkpoint = _save(run, manager, reporter, scores, is_last) or newest_checkpoint
            ends_early = context.any_rank(ends_early or bool(stop))
        if context.any_rank(bool(stop)) and not stop:
            stop.received = signal.SIGTERM  # of another process: the run is not complete here, either

    if not manager:
        return None
    assert newest_checkpoint is not None, "the last save of a run succeeds or raises"
    if newest_checkpoint != run.resumed_from:  # a complete run that was started again is left as it is
        ended_by = _describe_end(run, stop)
        reporter.write_summary(ended_by, newest_checkpoint, state, scores)
    return RunResult(newest_checkpoint, scores, stop.received)


def _progress(run: TrainingSetup[S]) -> Progress:
    """The progress of the whole run in pairs; JSON lines where there is no terminal."""
    done = run.plan.pairs_before(run.state.step)
    return Progress(run.task.name, run.plan.total_pairs, "pairs", done, show=run.context.is_main, json_lines=True)


def _validate(run: TrainingSetup[S], reporter: MetricsReporter, stop: StopSignal) -> S | None:
    """Score the held-out data; None if a signal asks for the end before that is done."""
    if stop:
        return None
    try:
        scores = run.task.evaluate(run.bert, run.context.device, lambda: bool(stop))
    except EvaluationStopped:
        return None
    reporter.record_validation(scores, run.state)
    return scores


def _save(
    run: TrainingSetup[S],
    manager: CheckpointManager,
    reporter: MetricsReporter,
    scores: S | None,
    is_last: bool = False,
) -> Path | None:
    """Save a checkpoint of the current state; None if the disk cannot take it. See `CheckpointManager.save`."""
    state = CheckpointState(
        **asdict(reporter.with_seconds(run.state)),
        tokenizer_digest=run.task.tokenizer.digest,
        settings=run.config.as_json(),
        data_digest=run.task.data_digest,
        devices=run.context.facts(),
        scores=scores.as_dict() if scores else None,
    )
    return manager.save(state, run.bert, run.task.tokenizer, run.optimizer, is_last)


def _describe_end(run: TrainingSetup[S], stop: StopSignal) -> str:
    """Why the run ended, for `summary.json`."""
    if stop.received:
        return stop.received.name
    return "done" if run.state.step == run.plan.total_steps else "max_minutes"
