"""The pretraining loop, from top to bottom: set up, then for each epoch train, validate, save.

A run is a function of its settings and data. Which pairs, masks and dropout a step has depends on (seed, step) alone,
and a checkpoint holds the weights, the optimizer and the number of the next batch: a run that was stopped, or killed,
and started again ends, on the CPU, with the same bits as one that was not (a test compares them).
"""

import contextlib
import inspect
import io
import math
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from babybert.checkpoint.format import TrainState, check_same_vocabulary, load_model, read_state, restore
from babybert.checkpoint.manager import CheckpointManager
from babybert.config import PretrainConfig, model_config
from babybert.data.dataset import SPLITS, Dataset, open_dataset
from babybert.data.device_loader import DeviceLoader, fits
from babybert.data.loader import DynamicMasking, Loader, batches_in_epoch, pairs_before
from babybert.data.table import Examples
from babybert.errors import DataError, UsageError
from babybert.evaluation.scores import EvaluationStopped, Scores, evaluate_held_out, unigram_log_probs
from babybert.model.bert import BabyBert
from babybert.model.loss import PretrainingModel
from babybert.progress import Progress, say
from babybert.training.distributed import DistributedContext, backward, start
from babybert.training.lr_schedule import learning_rate
from babybert.training.metrics import RunMetrics
from babybert.training.reporter import NonFiniteGuard, Reporter


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended: its newest checkpoint, its last scores, and the signal that cut it short (None: it is done)."""

    checkpoint: Path
    scores: Scores | None
    stopped_by: signal.Signals | None


def pretrain(config: PretrainConfig) -> TrainingResult | None:
    """Train until the epochs (or `max_steps`, `max_minutes`) are done, or a SIGTERM or SIGINT asks for a checkpoint and an end.

    Returns None in all processes but the first. Raises UsageError, DataError and StorageError as their docstrings say;
    the checkpoints written so far stay.
    """
    with start(config.parallel, config.device, config.precision) as parallel, contextlib.ExitStack() as stack:
        metrics = RunMetrics()
        if config.metrics and parallel.is_main:
            metrics.serve(config.metrics_host, config.metrics_port)
        dataset = open_dataset(config.data)
        keeper = stack.enter_context(CheckpointManager(config, metrics)) if parallel.is_main else None
        if keeper:
            say(f"reading {config.data}")
            dataset.examples("train"), dataset.examples("validation")  # caches them before the others look
        parallel.tell(None)
        outcome = _train(config, parallel, dataset, keeper, metrics)
        if outcome and config.pushgateway:
            metrics.push(config.pushgateway, config.out.name)
        return outcome


def _train(
    config: PretrainConfig,
    parallel: DistributedContext,
    dataset: Dataset,
    keeper: CheckpointManager | None,
    metrics: RunMetrics,
) -> TrainingResult | None:
    train, held_out = dataset.examples("train"), dataset.examples("validation").first(config.validation_pairs)
    counts_V = dataset.token_counts()
    bert, optimizer, state, resumed_from = set_up(config, parallel, dataset, counts_V, keeper)
    model = parallel.wrap(PretrainingModel(bert.set_kernels(config.kernels)))
    loader = make_loader(config, train, dataset.tokenizer.size, parallel.device)
    epoch_batches = batches_in_epoch(len(train), config.batch_size)
    total_steps = min(config.epochs * epoch_batches, config.max_steps or math.inf)
    assert isinstance(total_steps, int)
    reporter = Reporter(config, parallel, metrics, state, total_steps)
    watch = NonFiniteGuard(parallel.device, loader, epoch_batches, reporter.nonfinite)
    if keeper:
        keeper.started_at(state.step)
        parameters = sum(parameter.numel() for parameter in bert.parameters())
        say(
            f"model: {config.preset}, {parameters:,} parameters; {len(train):,} pairs, {total_steps:,} steps; {parallel.describe()}"
        )

    scores, saved, ended = None, resumed_from, False
    total_pairs = pairs_before(total_steps, epoch_batches, len(train), config.batch_size)
    done_pairs = pairs_before(state.step, epoch_batches, len(train), config.batch_size)
    with (
        StopOnSignal() as stop,
        Progress("pretrain", total_pairs, "pairs", done_pairs, show=parallel.is_main, json_lines=True) as progress,
    ):
        while state.step < total_steps and not ended:
            metrics.epoch.set(state.epoch)
            for batch in metrics.timed(loader.epoch(state.epoch, state.batch, parallel.rank, parallel.world)):
                rate = learning_rate(state.step, total_steps, config.lr, config.warmup_fraction, config.schedule)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["factor"]
                parallel.seed_step(config.seed, state.step)
                totals = backward(model, batch.to(parallel.device), parallel, config.accumulate)
                gradient_norm = nn.utils.clip_grad_norm_(bert.parameters(), config.clip_norm)
                watch.look(gradient_norm, state.step)
                optimizer.step()
                optimizer.zero_grad()

                state.step += 1
                state.batch += 1
                note = reporter.step(totals, state, rate, gradient_norm, watch)
                progress.advance(min(config.batch_size, len(train) - (state.batch - 1) * config.batch_size), note)
                ended = parallel.any(bool(stop.signal) or reporter.out_of_time)
                if ended or state.step == total_steps or state.batch == epoch_batches:
                    break
                if keeper and keeper.due(state.step):
                    watch.check()
                    saved = keeper.save(reporter.now(state), bert, dataset, optimizer, None) or saved
            if state.batch == epoch_batches:
                state.epoch, state.batch = state.epoch + 1, 0
            watch.check()
            if keeper:
                with contextlib.suppress(EvaluationStopped):
                    scores = None
                    if not stop.signal:
                        scores = evaluate_held_out(
                            bert,
                            held_out,
                            counts_V,
                            config.batch_size,
                            parallel.device,
                            "validate",
                            lambda: bool(stop.signal),
                        )
                        reporter.validated(scores, state)
                last = ended or bool(stop.signal) or state.step == total_steps
                saved = keeper.save(reporter.now(state), bert, dataset, optimizer, scores, last) or saved
            ended = parallel.any(ended or bool(stop.signal))
    if not keeper:
        return None
    assert saved is not None
    if saved != resumed_from:
        ended_by = stop.signal.name if stop.signal else "done" if state.step == total_steps else "max_minutes"
        reporter.summarize(ended_by, saved, state, scores)
    return TrainingResult(saved, scores, stop.signal)


def set_up(
    config: PretrainConfig,
    parallel: DistributedContext,
    dataset: Dataset,
    counts_V: np.ndarray,
    keeper: CheckpointManager | None,
) -> tuple[BabyBert, torch.optim.Optimizer, TrainState, Path | None]:
    """The model, its optimizer and where the run is: new, or those of the checkpoint that the first process finds."""
    folder = keeper.find() if keeper else None
    torch.manual_seed(config.seed)
    bert = load_or_create(config, dataset, counts_V, folder).to(parallel.device)
    optimizer = make_optimizer(bert, config)
    state = restore(folder, optimizer) if folder else TrainState()
    if parallel.world > 1:  # the weights are told by DistributedDataParallel itself
        state, content = parallel.tell((state, _as_bytes(optimizer)))
        if not keeper and state.step:
            optimizer.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    if state.step:
        state = replace(state, restarts=state.restarts + 1)
    return bert, optimizer, state, folder


def _as_bytes(optimizer: torch.optim.Optimizer) -> bytes:
    content = io.BytesIO()
    torch.save(optimizer.state_dict(), content)
    return content.getvalue()


def load_or_create(config: PretrainConfig, dataset: Dataset, counts_V: np.ndarray, folder: Path | None) -> BabyBert:
    """The model of a checkpoint, or a new one.

    Raises UsageError if the checkpoint is of other sizes; DataError if it is of another vocabulary, or the data has
    pairs that the model cannot take.
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
        raise DataError(
            f"{config.data}: has a pair of {longest} tokens; the model takes at most {sizes.max_positions}: prepare the data with shorter pairs"
        )
    if folder is None:
        bert = BabyBert(sizes)
        if config.initial_weights == "mimetic":
            bert.initialize_mimetic()
        if config.init_decoder_bias:
            bert.mlm_decoder.bias.data.copy_(torch.from_numpy(unigram_log_probs(counts_V)))
        return bert
    bert, tokenizer = load_model(folder)
    check_same_vocabulary(folder, tokenizer, dataset)
    check_order(folder, config, dataset)
    if bert.config != sizes:
        raise UsageError(f"{folder}: has sizes {bert.config}, the settings ask for {sizes}; choose another --out")
    say(f"resuming from {folder}")
    return bert


def check_order(folder: Path, config: PretrainConfig, dataset: Dataset) -> None:
    """Raise UsageError if the checkpoint's position means another place in the order of pairs that the settings give."""
    state = read_state(folder)
    for name in ("batch_size", "seed", "bucketing"):
        before, now = state["settings"][name], getattr(config, name)
        if before != now:
            raise UsageError(
                f"{folder}: was trained with {name} {before}, the settings say {now}: pairs would be left out or come twice; keep it, or choose another --out"
            )
    if state["data_digest"] != dataset.digest:
        raise UsageError(
            f"{folder}: was trained on other data than {config.data}; use the same, or choose another --out"
        )


def make_loader(config: PretrainConfig, train: Examples, vocab_size: int, device: torch.device) -> Loader:
    """The training batches, from arrays on the host or on the device."""
    remask = DynamicMasking(vocab_size, config.seed, config.masked_share) if config.masking == "dynamic" else None
    if config.resident == "always" or (config.resident == "auto" and fits(train, device)):
        return DeviceLoader(train, config.batch_size, config.seed, config.bucketing, remask, device)
    return Loader(train, config.batch_size, config.seed, config.bucketing, remask)


def make_optimizer(bert: BabyBert, config: PretrainConfig) -> torch.optim.Optimizer:
    """Adam or AdamW, in its fused form: the loop over parameters runs in C++. Each group has its `factor` of the learning rate.

    Tables and matrices decay; biases and norms do not, unless asked for. To pull the decoder's bias toward zero would
    undo, step by step, the word frequencies that it starts from.

    The MLM decoder has an epsilon of its own. Adam divides a gradient by its usual size, so with an epsilon near 0 a
    row moves a whole learning rate each step, however small its gradient is. The rows of rare words have gradients of 1e-7, which
    say next to nothing: they would be moved as far as those of common words, and lost. An epsilon above such gradients
    leaves them where they are (Kingma and Ba, 2015, algorithm 1). Its rows, not its bias, have a rate of their own as well,
    and so have the token vectors.
    """
    decoder, embedding = bert.mlm_decoder, bert.embedding.token_embedding.embedding
    own = {decoder.weight, decoder.bias, embedding.weight}
    rest = [parameter for parameter in bert.parameters() if parameter not in own]
    groups: list[dict[str, Any]] = [
        {"params": [decoder.weight], "factor": config.decoder_lr_factor, "eps": config.decoder_epsilon},
        {"params": [decoder.bias], "factor": 1.0, "eps": config.decoder_epsilon},
        {"params": [embedding.weight], "factor": config.embedding_lr_factor, "eps": 1e-8},
        {"params": [parameter for parameter in rest if parameter.dim() > 1], "factor": 1.0, "eps": 1e-8},
        {"params": [parameter for parameter in rest if parameter.dim() == 1], "factor": 1.0, "eps": 1e-8},
    ]
    for group in groups:
        vectors = group["params"][0].dim() == 1
        group.update(
            lr=config.lr * group["factor"],
            weight_decay=0.0 if vectors and not config.decay_vectors else config.weight_decay,
        )
    return EagerAdam(groups, lr=config.lr, decoupled_weight_decay=config.optimizer == "adamw", fused=True)


class EagerAdam(torch.optim.Adam):
    """PyTorch's own Adam, or AdamW, without the wrappers around its methods that import PyTorch's compiler.

    Nothing is compiled here, and the import supports two seconds and 0.13 GiB: half a model of the reference's sizes, with all
    that its training needs.
    """

    add_param_group = inspect.unwrap(torch.optim.Adam.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Adam.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Adam.state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))
    zero_grad = inspect.unwrap(torch.optim.Adam.zero_grad)


class StopOnSignal:
    """While entered, the first SIGTERM or SIGINT is only noted in `signal`; a second one acts as usual."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "StopOnSignal":
        self._former = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        say(f"{self.signal.name}: finishing the step and saving a checkpoint")
        for known, handler in self._former.items():
            signal.signal(known, handler)
