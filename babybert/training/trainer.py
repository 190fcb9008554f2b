"""The pretraining loop, from top to bottom: set up, then for each epoch train, validate, save.

A run is a function of its settings and data. The order of pairs depends on (seed, epoch) alone, and a checkpoint holds
the optimizer, the random states and the number of the next batch: a run that was stopped and started again ends, on
the CPU, with the same bits as one that was not (a test compares them).
"""

import dataclasses
import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

import numpy as np
import torch
from torch import nn

from babybert.config import PretrainConfig, model_config
from babybert.data.dataset import SPLITS, Dataset, open_dataset
from babybert.data.loader import Loader, Remask, batches_in_epoch, pairs_before
from babybert.data.resident import ResidentLoader, fits
from babybert.data.table import Examples
from babybert.errors import DataError, StorageError, UsageError, UserError
from babybert.model.bert import BabyBert
from babybert.model.objectives import PretrainingModel, Totals
from babybert.model.saved import load_model
from babybert.progress import Progress, say
from babybert.training.checkpoint import RunState, checkpoints, newest_whole, prune, restore, save_checkpoint
from babybert.training.evaluation import Scores, as_dict, check_vocabulary, evaluate, unigram_log_probabilities
from babybert.training.metrics import MetricsLog, RunMetrics
from babybert.training.parallel import describe, parallelize, pick_device
from babybert.training.schedule import learning_rate


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its newest checkpoint, its last scores, and the signal that cut it short (None: it is done)."""

    checkpoint: Path
    scores: Scores | None
    stopped_by: signal.Signals | None


def pretrain(config: PretrainConfig) -> Outcome:
    """Train until the epochs (or `max_steps`) are done, or a SIGTERM or SIGINT asks for a checkpoint and an end.

    Raises UsageError, DataError and StorageError as their docstrings say; the checkpoints written so far stay.
    """
    device = pick_device(config.device)
    dataset = open_dataset(config.data)
    metrics = RunMetrics()
    if config.metrics:
        metrics.serve(config.metrics_host, config.metrics_port)
    say(f"reading {config.data}")
    train, held_out = dataset.examples("train"), dataset.examples("validation").first(config.validation_pairs)
    counts_V = dataset.token_counts()

    torch.manual_seed(config.seed)
    bert, resumed_from = load_or_create(config, dataset, counts_V)
    model = parallelize(PretrainingModel(bert), device)
    optimizer = make_optimizer(bert, config)
    state = restore(resumed_from, optimizer) if resumed_from else RunState()
    log = MetricsLog(config.out)

    loader = make_loader(config, train, dataset.tokenizer.size, device)
    epoch_batches = batches_in_epoch(len(train), config.batch_size)
    total_steps = min(config.epochs * epoch_batches, config.max_steps or math.inf)
    assert isinstance(total_steps, int)
    parameters = sum(parameter.numel() for parameter in bert.parameters())
    say(f"model: {config.preset}, {parameters:,} parameters; {len(train):,} pairs, {total_steps:,} steps; {describe(device)}")
    saved, scores = resumed_from, None
    seen: Totals | None = None
    total_pairs = pairs_before(total_steps, epoch_batches, len(train), config.batch_size)
    done_pairs = pairs_before(state.step, epoch_batches, len(train), config.batch_size)
    with StopOnSignal() as stop, Progress("pretrain", total_pairs, "pairs", done_pairs) as progress:
        while state.step < total_steps and not stop.signal:
            metrics.epoch.set(state.epoch)
            for batch in loader.epoch(state.epoch, start=state.batch):
                rate = learning_rate(state.step, total_steps, config.lr, config.warmup_fraction)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                totals = Totals.of(model(*batch.to(device)))
                optimizer.zero_grad()
                totals.loss.backward()
                gradient_norm = nn.utils.clip_grad_norm_(bert.parameters(), config.clip_norm)
                optimizer.step()

                state.step += 1
                state.batch += 1
                seen = totals.detach() if seen is None else seen + totals.detach()
                metrics.count_step(batch, rate, state.step / total_steps)
                note = ""
                if state.step % config.log_every == 0 or state.step == total_steps:
                    note = report(seen, state, rate, float(gradient_norm), metrics, log)
                    seen = None
                progress.advance(len(batch.is_next_B), note)
                if stop.signal or state.step == total_steps:
                    break
            if state.batch == epoch_batches:
                state.epoch, state.batch = state.epoch + 1, 0
            scores = None
            if not stop.signal:
                scores = evaluate(bert, held_out, counts_V, config.batch_size, device, task="validate")
                report_scores(scores, state, metrics, log)
            saved = save(config, dataset, state, bert, optimizer, scores, metrics)
    assert saved is not None
    return Outcome(saved, scores, stop.signal)


def load_or_create(config: PretrainConfig, dataset: Dataset, counts_V: np.ndarray) -> tuple[BabyBert, Path | None]:
    """The model of the run's newest whole checkpoint and that checkpoint, or a new model and None.

    Raises UsageError if the run has checkpoints that `resume: never` would mix with, or of other sizes; DataError
    if they are of another vocabulary.
    """
    sizes = model_config(
        config.preset,
        dataset.tokenizer.size,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        feed_forward=config.feed_forward,
        dropout=config.dropout,
    )
    longest = max(dataset.facts[split]["longest"] for split in SPLITS)
    if longest > sizes.max_positions:
        raise DataError(f"{config.data}: has a pair of {longest} tokens; the model takes at most {sizes.max_positions}: prepare the data with shorter pairs")
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{config.out}: cannot be made: {error.strerror}; choose another --out") from error
    if config.resume == "never" and checkpoints(config.out):
        raise UsageError(f"{config.out}: has checkpoints already; choose another --out, or drop --resume never to go on from them")
    folder = newest_whole(config.out)
    if folder is None:
        bert = BabyBert(sizes)
        if config.init_decoder_bias:
            bert.mlm_decoder.bias.data.copy_(torch.from_numpy(unigram_log_probabilities(counts_V)))
        return bert, None
    bert, tokenizer = load_model(folder)
    check_vocabulary(folder, tokenizer, dataset)
    if bert.config != sizes:
        raise UsageError(f"{folder}: has sizes {bert.config}, the settings ask for {sizes}; choose another --out")
    say(f"resuming from {folder}")
    return bert, folder


def make_loader(config: PretrainConfig, train: Examples, vocab_size: int, device: torch.device) -> Loader:
    """The training batches, from arrays on the host or on the device."""
    remask = Remask(vocab_size, config.seed) if config.masking == "dynamic" else None
    if config.resident == "always" or (config.resident == "auto" and fits(train, device)):
        return ResidentLoader(train, config.batch_size, config.seed, config.bucketing, remask, device)
    return Loader(train, config.batch_size, config.seed, config.bucketing, remask)


def make_optimizer(bert: BabyBert, config: PretrainConfig) -> torch.optim.Optimizer:
    """Adam or AdamW, in its fused form: the loop over parameters runs in C++.

    Tables and matrices decay; biases and norms do not. To pull the decoder's bias toward zero would undo, step by
    step, the word frequencies that it starts from.
    """
    optimizer_class = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    matrices = [parameter for parameter in bert.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in bert.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return optimizer_class(groups, lr=config.lr, fused=True)


def report(seen: Totals, state: RunState, rate: float, gradient_norm: float, metrics: RunMetrics, log: MetricsLog) -> str:
    """Publish the means since the last report; returns them in short. Raises UserError once the loss is no number."""
    mlm, nsp, accuracy = seen.mlm_loss.item(), seen.nsp_loss.item(), seen.nsp_accuracy.item()
    if not math.isfinite(mlm + nsp):
        raise UserError(f"the loss is {mlm + nsp} at step {state.step}; the last checkpoint is untouched: go on from it with a lower --lr")
    metrics.loss.labels("mlm", "train").set(mlm)
    metrics.loss.labels("nsp", "train").set(nsp)
    metrics.nsp_accuracy.labels("train").set(accuracy)
    metrics.gradient.set(gradient_norm)
    log.write("train", step=state.step, epoch=state.epoch, mlm_loss=mlm, nsp_loss=nsp, nsp_accuracy=accuracy, lr=rate, gradient_norm=gradient_norm)
    return f"MLM {mlm:.3f}  NSP {nsp:.3f}"


def report_scores(scores: Scores, state: RunState, metrics: RunMetrics, log: MetricsLog) -> None:
    """Publish held-out scores."""
    metrics.loss.labels("mlm", "validation").set(scores.mlm_loss)
    metrics.loss.labels("nsp", "validation").set(scores.nsp_loss)
    metrics.nsp_accuracy.labels("validation").set(scores.nsp_accuracy)
    log.write("validation", step=state.step, epoch=state.epoch, **as_dict(scores))
    say(
        f"step {state.step:,}: held-out MLM {scores.mlm_loss:.3f} (unigram {scores.mlm_unigram_loss:.3f}), "
        f"NSP {scores.nsp_loss:.3f} (chance {scores.nsp_chance_loss:.3f}), NSP accuracy {scores.nsp_accuracy:.1%}"
    )


def save(
    config: PretrainConfig, dataset: Dataset, state: RunState, bert: BabyBert, optimizer: torch.optim.Optimizer, scores: Scores | None, metrics: RunMetrics
) -> Path:
    """Write the checkpoint, count it, and delete the oldest."""
    start = time.monotonic()
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(config).items()}
    facts = {"settings": settings, "scores": as_dict(scores) if scores else None}
    try:
        folder = save_checkpoint(config.out, state, bert, dataset.tokenizer, optimizer, facts)
    except StorageError:
        metrics.failures.inc()
        raise
    metrics.saves.inc()
    metrics.saved_at.set_to_current_time()
    metrics.save_seconds.set(time.monotonic() - start)
    prune(config.out, config.keep_checkpoints)
    return folder


class StopOnSignal:
    """While entered, the first SIGTERM or SIGINT is only noted in `signal`; a second one acts as usual."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "StopOnSignal":
        self._former = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        say(f"{self.signal.name}: finishing the step and saving a checkpoint")
        for known, handler in self._former.items():
            signal.signal(known, handler)
