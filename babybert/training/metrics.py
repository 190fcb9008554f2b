"""What a run tells Prometheus, over HTTP while it trains, and leaves behind in `metrics.jsonl`.

Losses are set where the loop reads them anyway (every `log_every` steps), so a scrape never makes a GPU wait.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Info, PlatformCollector, ProcessCollector, start_http_server

from babybert import __version__
from babybert.data.loader import Batch
from babybert.data.tokenizer import PAD
from babybert.errors import StorageError, UsageError
from babybert.model.objectives import IGNORED
from babybert.progress import say


class RunMetrics:
    """The metrics of one run, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self.loss = Gauge("babybert_pretrain_loss", "Mean loss in nats", ["objective", "split"], registry=registry)
        self.nsp_accuracy = Gauge("babybert_pretrain_nsp_accuracy", "Share of pairs told right", ["split"], registry=registry)
        self.steps = Counter("babybert_pretrain_steps", "Optimizer steps by this process", registry=registry)
        self.pairs = Counter("babybert_pretrain_pairs", "Sentence pairs trained on by this process", registry=registry)
        self.tokens = Counter("babybert_pretrain_tokens", "Tokens trained on by this process, padding not counted", registry=registry)
        self.masked = Counter("babybert_pretrain_masked_tokens", "Tokens predicted by this process", registry=registry)
        self.epoch = Gauge("babybert_pretrain_epoch", "Epoch in progress, from 0", registry=registry)
        self.progress = Gauge("babybert_pretrain_progress_ratio", "Share of the run's steps done", registry=registry)
        self.rate = Gauge("babybert_pretrain_learning_rate", "Learning rate of the last step", registry=registry)
        self.gradient = Gauge("babybert_pretrain_gradient_norm", "Gradient norm before clipping, at the last reading", registry=registry)
        self.saves = Counter("babybert_checkpoint_saves", "Whole checkpoints written", registry=registry)
        self.failures = Counter("babybert_checkpoint_failures", "Checkpoints that could not be written", registry=registry)
        self.saved_at = Gauge("babybert_checkpoint_last_success_timestamp_seconds", "When the last whole one was written", registry=registry)
        self.save_seconds = Gauge("babybert_checkpoint_save_seconds", "How long the last one took", registry=registry)
        Info("babybert_build", "Versions", registry=registry).info({"version": __version__, "torch": torch.__version__})

    def serve(self, host: str, port: int) -> int:
        """Answer at http://host:port/metrics from a thread of its own; returns the port. Raises UsageError if taken."""
        try:
            server, _ = start_http_server(port, host, self.registry)
        except OSError as error:
            raise UsageError(f"metrics: cannot listen on {host}:{port} ({error.strerror}); choose another --metrics-port, or --no-metrics") from error
        say(f"metrics: http://{host}:{server.server_port}/metrics")
        return server.server_port

    def count_step(self, batch: Batch, rate: float, progress: float) -> None:
        """Count one step on `batch`, which is still on the CPU, so that counting it makes no GPU wait."""
        self.steps.inc()
        self.pairs.inc(len(batch.is_next_B))
        self.tokens.inc(int((batch.ids_BT != PAD).sum()))
        self.masked.inc(int((batch.labels_BT != IGNORED).sum()))
        self.rate.set(rate)
        self.progress.set(progress)


class MetricsLog:
    """`metrics.jsonl` in the run's folder: one JSON object a line, appended."""

    def __init__(self, run: Path) -> None:
        self._path = run / "metrics.jsonl"
        self._start = time.monotonic()

    def write(self, split: str, **values: Any) -> None:
        """Append one line with the seconds since this process began. Raises StorageError."""
        line = json.dumps({"split": split, "seconds": round(time.monotonic() - self._start, 3), **values})
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise StorageError(f"{self._path}: cannot be written: {error.strerror}; the run goes on from its last checkpoint once there is room") from error
