"""What a run tells Prometheus, over HTTP while it trains, and leaves behind in `metrics.jsonl`.

Numbers that lie on the device are read where the loop reads them anyway (every `log_every` steps), so a scrape never
makes a GPU wait. A short job's end would fall between two scrapes: a Pushgateway, where one is configured, gets the
last values.
"""

import functools
import time
from collections.abc import Iterator

import torch
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    push_to_gateway,
    start_http_server,
)

from babybert import __version__
from babybert.data.loader import Batch
from babybert.errors import UsageError
from babybert.evaluation.scores import Scores
from babybert.model.loss import LossSums
from babybert.progress import say

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class RunMetrics:
    """The metrics of one run, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self.loss = Gauge("babybert_pretrain_loss", "Mean loss in nats", ["objective", "split"], registry=registry)
        self.mlm_accuracy = Gauge(
            "babybert_pretrain_mlm_accuracy",
            "Share of held-out words among the k likeliest",
            ["top"],
            registry=registry,
        )
        self.nsp_accuracy = Gauge(
            "babybert_pretrain_nsp_accuracy", "Share of pairs told right", ["split"], registry=registry
        )
        self.steps = Counter("babybert_pretrain_steps", "Optimizer steps by this process", registry=registry)
        self.pairs = Counter("babybert_pretrain_pairs", "Sentence pairs trained on by this job", registry=registry)
        self.tokens = Counter(
            "babybert_pretrain_tokens", "Tokens trained on by this job, padding not counted", registry=registry
        )
        self.masked = Counter("babybert_pretrain_masked_tokens", "Tokens predicted by this job", registry=registry)
        self.step_seconds = Histogram(
            "babybert_pretrain_step_seconds",
            "From one batch to the next, the wait for it not counted",
            buckets=SECONDS,
            registry=registry,
        )
        self.wait_seconds = Histogram(
            "babybert_pretrain_data_wait_seconds",
            "How long a step waited for its batch",
            buckets=SECONDS,
            registry=registry,
        )
        self.epoch = Gauge("babybert_pretrain_epoch", "Epoch in progress, from 0", registry=registry)
        self.progress = Gauge("babybert_pretrain_progress_ratio", "Share of the run's steps done", registry=registry)
        self.left = Gauge("babybert_pretrain_left_seconds", "Time left at this job's rate", registry=registry)
        self.rate = Gauge("babybert_pretrain_learning_rate", "Learning rate of the last step", registry=registry)
        self.gradient = Gauge(
            "babybert_pretrain_gradient_norm", "Gradient norm before clipping, at the last reading", registry=registry
        )
        self.bad_ends = Gauge(
            "babybert_pretrain_nonfinite_ends",
            "How often the run has ended at a loss that is no number, at a step it has not passed since",
            registry=registry,
        )
        self.restarts = Gauge(
            "babybert_pretrain_restarts", "How often the run has been gone on with", registry=registry
        )
        self.fallbacks = Counter(
            "babybert_checkpoint_fallbacks", "Checkpoints that were not whole and passed over", registry=registry
        )
        self.saves = Counter("babybert_checkpoint_saves", "Whole checkpoints written", registry=registry)
        self.failures = Counter(
            "babybert_checkpoint_failures", "Checkpoints that could not be written", registry=registry
        )
        self.bytes = Counter("babybert_checkpoint_bytes", "Bytes of checkpoints written", registry=registry)
        self.saved_at = Gauge(
            "babybert_checkpoint_last_success_timestamp_seconds",
            "When the last whole one was written",
            registry=registry,
        )
        self.age = Gauge(
            "babybert_checkpoint_age_seconds",
            "Age of the last whole one, or of this process if there is none",
            registry=registry,
        )
        self.save_seconds = Gauge("babybert_checkpoint_save_seconds", "How long the last one took", registry=registry)
        self.uploads = Counter("babybert_checkpoint_uploads", "Checkpoints brought to the store", registry=registry)
        self.upload_failures = Counter(
            "babybert_checkpoint_upload_failures", "Tries to upload that failed; each is made again", registry=registry
        )
        self.uploaded_bytes = Counter(
            "babybert_checkpoint_upload_bytes", "Bytes brought to the store", registry=registry
        )
        self.upload_seconds = Gauge(
            "babybert_checkpoint_upload_seconds", "How long the last upload took", registry=registry
        )
        Info("babybert_build", "Versions", registry=registry).info({"version": __version__, "torch": torch.__version__})
        self._last_good = time.time()
        self.age.set_function(lambda: time.time() - self._last_good)
        memory = Gauge("babybert_gpu_memory_bytes", "Memory PyTorch holds", ["gpu"], registry=registry)
        whole = Gauge("babybert_gpu_memory_total_bytes", "Memory the GPU has", ["gpu"], registry=registry)
        for number in range(torch.cuda.device_count()):
            memory.labels(str(number)).set_function(functools.partial(torch.cuda.memory_reserved, number))
            whole.labels(str(number)).set(torch.cuda.get_device_properties(number).total_memory)

    def serve(self, host: str, port: int) -> int:
        """Answer at http://host:port/metrics from a thread of its own; returns the port. Raises UsageError if taken."""
        try:
            server, _ = start_http_server(port, host, self.registry)
        except OSError as error:
            raise UsageError(
                f"metrics: cannot listen on {host}:{port} ({error.strerror}); choose another --metrics-port, or --no-metrics"
            ) from error
        say(f"metrics: http://{host}:{server.server_port}/metrics")
        return server.server_port

    def push(self, gateway: str, run: str) -> None:
        """Leave the last values at a Pushgateway, under the run's name; a gateway that is away is only a warning."""
        try:
            push_to_gateway(
                gateway, job="babybert_pretrain", grouping_key={"run": run}, registry=self.registry, timeout=10
            )
        except (OSError, ValueError) as error:
            say(f"warning: {gateway}: the last metrics could not be pushed ({error})")

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, observing how long each was waited for and how long it was worked on."""
        asked = time.perf_counter()
        for batch in batches:
            got = time.perf_counter()
            self.wait_seconds.observe(got - asked)
            try:
                yield batch
            finally:  # an epoch's last step may be left by a break
                asked = time.perf_counter()
                self.step_seconds.observe(asked - got)
                self.steps.inc()

    def count(self, seen: LossSums) -> None:
        """Count what the steps since the last reading were made of, and set their means."""
        self.pairs.inc(seen.nsp_count.item())
        self.tokens.inc(seen.tokens.item())
        self.masked.inc(seen.mlm_count.item())
        self.loss.labels("mlm", "train").set(seen.mlm_loss.item())
        self.loss.labels("nsp", "train").set(seen.nsp_loss.item())
        self.nsp_accuracy.labels("train").set(seen.nsp_accuracy.item())

    def validated(self, scores: Scores) -> None:
        """Set what was found on held-out pairs."""
        self.loss.labels("mlm", "validation").set(scores.mlm_loss)
        self.loss.labels("nsp", "validation").set(scores.nsp_loss)
        self.nsp_accuracy.labels("validation").set(scores.nsp_accuracy)
        self.mlm_accuracy.labels("1").set(scores.mlm_top1)
        self.mlm_accuracy.labels("5").set(scores.mlm_top5)

    def saved(self, size: int, seconds: float) -> None:
        """Count a whole checkpoint."""
        self.saves.inc()
        self.bytes.inc(size)
        self.saved_at.set_to_current_time()
        self.save_seconds.set(seconds)
        self._last_good = time.time()

    def uploaded(self, size: int, seconds: float) -> None:
        """Count a checkpoint that has reached the store."""
        self.uploads.inc()
        self.uploaded_bytes.inc(size)
        self.upload_seconds.set(seconds)
