"""Settings of every training run, whatever it trains: devices, checkpoints, and what it reports while it trains."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from babybert.config.fields import (
    option,
    require,
    require_at_least,
    require_between,
    require_host,
    require_http_address,
)
from babybert.s3 import split_address

MOST_STEPS = 99_999_999  # the names of checkpoints have eight digits
LONGEST_UPLOAD = 1_000_000  # minutes; timers of the operating system end at much more


@dataclass(frozen=True)
class DeviceOptions:
    """Where and how the training is computed."""

    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: all visible GPUs (DataParallel), else the CPU")
    parallel: Literal["auto", "single", "dp", "ddp"] = option(
        "auto", "auto: DDP under torchrun, else DataParallel with several GPUs, else one device"
    )
    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto",
        "auto: bf16 on GPUs that support it, and on CPUs with AMX or AVX512-BF16 from a width of 128 and 8 pairs on; "
        "the log says which",
    )
    kernels: Literal["auto", "plain", "triton"] = option(
        "auto",
        "auto: the fastest implementation measured on this kind of device; plain: PyTorch's operations only; "
        "triton: the Triton kernels on a GPU, for all widths that they support",
    )


@dataclass(frozen=True)
class CheckpointOptions:
    """The run's folder, its checkpoints and where they are stored."""

    out: Path = option(Path("runs/demo"), "folder of the run: checkpoints and metrics.jsonl")
    store: str | None = option(
        None, "s3://bucket/prefix: checkpoints are uploaded there in the background, and looked for at the start"
    )
    resume: str = option(
        "auto",
        "auto: the newest valid checkpoint of the run, local or in the store; never; a step; "
        "or another run's folder or s3:// address",
    )
    checkpoint_every: str | None = option(
        None, "save after this many steps (500) or minutes (10m), in addition to each epoch's end"
    )
    keep_checkpoints: int = option(3, "newest checkpoints to keep; the best one is always kept, older ones are deleted")
    upload_minutes: float = option(
        5.0, "wait this long at the end for the upload, then exit 1; the local copy is valid"
    )

    @property
    def checkpoint_interval(self) -> tuple[int | None, float | None]:
        """`checkpoint_every` as (steps, minutes); at most one of them is set."""
        every = self.checkpoint_every
        if every is None:
            return None, None
        if every.endswith("m"):
            return None, float(every[:-1])
        return int(every), None

    @property
    def resume_step(self) -> int | None:
        """The step of `--resume STEP`; None for the other forms."""
        return int(self.resume) if re.fullmatch("[0-9]+", self.resume) else None

    def check_checkpoints(self) -> None:
        """Raise UsageError for values that cannot work."""
        require_at_least(self, 1, "keep_checkpoints")
        require_between(self, 0, LONGEST_UPLOAD, "upload_minutes")
        require(
            not re.fullmatch("[0-9]{9,}", self.resume),
            f"resume is '{self.resume[:20]}'; a step has at most {len(str(MOST_STEPS))} digits",
        )
        if self.store is not None:
            split_address(self.store)
        every = self.checkpoint_every
        require(
            every is None
            or bool(re.fullmatch(r"[1-9][0-9]{0,8}|([1-9][0-9]{0,8}(\.[0-9]*)?|0?\.[0-9]*[1-9][0-9]*)m", every)),
            f"checkpoint_every is '{every}'; it must be steps (500) or minutes (10m)",
        )


@dataclass(frozen=True)
class MetricsOptions:
    """What a run reports while it trains."""

    log_every: int = option(20, "steps between two lines of metrics.jsonl; reading the loss makes a GPU wait")
    metrics: bool = option(True, "serve Prometheus metrics while training")
    metrics_host: str = option(
        "127.0.0.1", "address of the metrics; in a container 0.0.0.0, so that Prometheus reaches it"
    )
    metrics_port: int | None = option(
        None, "port of the metrics; none: 9109, or a free port if it is taken; 0: a free port. The port is logged"
    )
    pushgateway: str | None = option(
        None, "host:port or http(s):// address of a Prometheus Pushgateway that gets the last values at the end"
    )
    tensorboard: bool = option(False, "also write the curves for TensorBoard, into the run's folder")

    @property
    def pushgateway_url(self) -> str | None:
        """`pushgateway` with its scheme, which is http by default."""
        if self.pushgateway is None or "://" in self.pushgateway:
            return self.pushgateway
        return f"http://{self.pushgateway}"

    def check_metrics(self) -> None:
        """Raise UsageError for values that cannot work."""
        require_at_least(self, 1, "log_every")
        require_host("metrics_host", self.metrics_host)
        if self.pushgateway_url is not None:
            require_http_address("pushgateway", self.pushgateway_url, "127.0.0.1:9091 or https://host/path")
            require(
                not set("?#") & set(self.pushgateway_url),
                f"pushgateway is '{self.pushgateway}'; it must not have a query or a fragment",
            )
        require(
            self.metrics_port is None or 0 <= self.metrics_port < 65536,
            f"metrics_port is {self.metrics_port}; it must be from 0 to 65535",
        )
