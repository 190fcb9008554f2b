"""Prometheus metrics of a run's checkpoints: saves, uploads, failures and the age of the last one."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge


class CheckpointMetrics:
    """The `babybert_checkpoint_*` metrics in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, description: str) -> Counter:
            return Counter(f"babybert_checkpoint_{name}", description, registry=registry)

        def gauge(name: str, description: str) -> Gauge:
            return Gauge(f"babybert_checkpoint_{name}", description, registry=registry)

        self.fallbacks = counter("fallbacks", "Corrupt checkpoints that were skipped")
        self.save_failures = counter("failures", "Checkpoints that could not be written")
        self.upload_failures = counter("upload_failures", "Failed upload attempts; each is retried")
        self._saves = counter("saves", "Checkpoints written")
        self._saved_bytes = counter("bytes", "Bytes of checkpoints written")
        self._saved_at = gauge("last_success_timestamp_seconds", "When the last checkpoint was written")
        self._save_seconds = gauge("save_seconds", "Duration of the last save")
        self._uploads = counter("uploads", "Checkpoints uploaded to the store")
        self._uploaded_bytes = counter("upload_bytes", "Bytes uploaded to the store")
        self._upload_seconds = gauge("upload_seconds", "Duration of the last upload")
        self._last_save = time.time()  # until the first save, the start of this process
        age = gauge("age_seconds", "Age of the last checkpoint, or of this process if it has written none")
        age.set_function(lambda: time.time() - self._last_save)

    def record_save(self, size: int, seconds: float) -> None:
        """Count a checkpoint of `size` bytes that was written in `seconds`."""
        self._saves.inc()
        self._saved_bytes.inc(size)
        self._saved_at.set_to_current_time()
        self._save_seconds.set(seconds)
        self._last_save = time.time()

    def record_upload(self, size: int, seconds: float) -> None:
        """Count a checkpoint of `size` bytes that was uploaded in `seconds`."""
        self._uploads.inc()
        self._uploaded_bytes.inc(size)
        self._upload_seconds.set(seconds)
