"""Prometheus metrics of a training process, served over HTTP while it trains.

Values that lie on the device are read where the loop reads them anyway (every `log_every` steps), so a scrape never
makes a GPU wait. A short job can end between two scrapes: a Pushgateway, if one is configured, gets the last values.
"""

import functools
import http.client
import logging
import time
from collections.abc import Iterator, Mapping

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
from babybert.checkpoint.checkpoint_metrics import CheckpointMetrics
from babybert.data.loader import Batch
from babybert.errors import UsageError, os_reason
from babybert.model.loss import LossSums, ObjectiveSums
from babybert.training.task import HeldOutScores

logger = logging.getLogger(__name__)

DEFAULT_PORT = 9109
ANY_FREE_PORT = 0
PUSH_SECONDS = 10.0  # for each answer of the Pushgateway
SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class RunMetrics:
    """The metrics of one run, in a separate registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self.checkpoints = CheckpointMetrics(self.registry)
        self._add_loss_metrics()
        self._add_progress_metrics()
        self._add_machine_metrics()

    def _gauge(self, name: str, description: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"babybert_pretrain_{name}", description, labels, registry=self.registry)

    def _counter(self, name: str, description: str) -> Counter:
        return Counter(f"babybert_pretrain_{name}", description, registry=self.registry)

    def _histogram(self, name: str, description: str) -> Histogram:
        return Histogram(f"babybert_pretrain_{name}", description, buckets=SECONDS_BUCKETS, registry=self.registry)

    def _add_loss_metrics(self) -> None:
        self.loss = self._gauge("loss", "Mean loss in nats", ("objective", "split"))
        self.mlm_accuracy = self._gauge(
            "mlm_accuracy", "Share of held-out masked tokens among the model's k most likely tokens", ("top",)
        )
        self.nsp_accuracy = self._gauge("nsp_accuracy", "Share of pairs classified correctly", ("split",))
        self.class_accuracy = self._gauge("class_accuracy", "Share of texts classified correctly", ("split",))
        self.learning_rate = self._gauge("learning_rate", "Learning rate of the last step")
        self.gradient_norm = self._gauge("gradient_norm", "Last logged gradient norm, before clipping")
        self.nonfinite_ends = self._gauge(
            "nonfinite_ends", "Times the run ended with a non-finite loss at a step that it has not passed since"
        )

    def _add_progress_metrics(self) -> None:
        self.steps = self._counter("steps", "Optimizer steps of this process")
        self.pairs = self._counter("pairs", "Sentence pairs this job has trained on")
        self.tokens = self._counter("tokens", "Tokens this job has trained on, without padding")
        self.masked_tokens = self._counter("masked_tokens", "Masked tokens this job has trained on")
        self.step_seconds = self._histogram("step_seconds", "Duration of a step, without waiting for its batch")
        self.wait_seconds = self._histogram("data_wait_seconds", "Time a step waited for its batch")
        self.epoch = self._gauge("epoch", "Current epoch, from 0")
        self.progress = self._gauge("progress_ratio", "Share of the run that is done")
        self.seconds_left = self._gauge("left_seconds", "Estimated time until the end of the run")
        self.restarts = self._gauge("restarts", "Times the run was resumed")

    def _add_machine_metrics(self) -> None:
        versions = {"version": __version__, "torch": torch.__version__}
        Info("babybert_build", "Versions", registry=self.registry).info(versions)
        used = Gauge("babybert_gpu_memory_bytes", "GPU memory reserved by PyTorch", ["gpu"], registry=self.registry)
        total = Gauge("babybert_gpu_memory_total_bytes", "Total GPU memory", ["gpu"], registry=self.registry)
        for gpu in range(torch.cuda.device_count()):
            used.labels(str(gpu)).set_function(functools.partial(torch.cuda.memory_reserved, gpu))
            total.labels(str(gpu)).set(torch.cuda.get_device_properties(gpu).total_memory)

    def serve(self, host: str, port: int | None) -> int:
        """Serve http://host:port/metrics from a background thread; returns the port.

        Without a port, 9109 is used, or a free port if it is taken: two runs on one machine must not disturb each other
        if nobody asked for a port. Raises UsageError if the port cannot be used.
        """
        candidates = (DEFAULT_PORT, ANY_FREE_PORT) if port is None else (port,)
        for candidate in candidates:
            try:
                server, _ = start_http_server(candidate, host, self.registry)
            except (OSError, UnicodeError) as error:  # UnicodeError: a host name with an empty or too long part
                reason = os_reason(error) if isinstance(error, OSError) else error
                if candidate != candidates[-1]:
                    logger.info(f"metrics: port {candidate} is taken ({reason}); using a free port")
                    continue
                raise UsageError(
                    f"metrics: cannot listen on {host}:{candidate} ({reason}); "
                    "choose another --metrics-host or --metrics-port, or --no-metrics"
                ) from error
            logger.info(f"metrics: http://{host}:{server.server_port}/metrics")
            return int(server.server_port)
        raise AssertionError("unreachable: the last candidate returns or raises")

    def push(self, gateway: str, run: str) -> None:
        """Push the last values to a Pushgateway, grouped by the run's name. If that fails, log a warning.

        The run is complete by then, so nothing that the server does may end it with an error.
        """
        try:
            group, job = {"run": run}, "babybert_pretrain"
            push_to_gateway(gateway, job, self.registry, grouping_key=group, timeout=PUSH_SECONDS)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning(f"{gateway}: the last metrics could not be pushed ({reason})")

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; observes how long each was waited for and how long the step on it took."""
        wait_start = time.perf_counter()
        for batch in batches:
            step_start = time.perf_counter()
            self.wait_seconds.observe(step_start - wait_start)
            try:
                yield batch
            finally:  # also when the loop ends with a break
                wait_start = time.perf_counter()
                self.step_seconds.observe(wait_start - step_start)
                self.steps.inc()

    def record_training(self, sums: ObjectiveSums, with_nsp: bool) -> None:
        """Count the steps' pairs and tokens, and set their mean losses, those of NSP only `with_nsp`."""
        self.pairs.inc(sums.labelled.item())
        self.tokens.inc(sums.tokens.item())
        if isinstance(sums, LossSums):
            self.masked_tokens.inc(sums.mlm_count.item())
        self._set_values("train", sums.means(with_nsp))

    def record_validation(self, scores: HeldOutScores) -> None:
        """Set the held-out scores."""
        self._set_values("validation", scores.as_dict())

    def _set_values(self, split: str, values: Mapping[str, float | None]) -> None:
        """Set the gauges of the values that have one. A value that is None has none."""
        gauges = {
            "mlm_loss": (self.loss, ("mlm", split)),
            "nsp_loss": (self.loss, ("nsp", split)),
            "class_loss": (self.loss, ("class", split)),
            "nsp_accuracy": (self.nsp_accuracy, (split,)),
            "class_accuracy": (self.class_accuracy, (split,)),
            "mlm_top1": (self.mlm_accuracy, ("1",)),
            "mlm_top5": (self.mlm_accuracy, ("5",)),
        }
        for name, value in values.items():
            if name in gauges and value is not None:
                gauge, labels = gauges[name]
                gauge.labels(*labels).set(value)
