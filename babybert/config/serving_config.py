"""The settings of the commands that ask a model or serve it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from babybert.config.evaluation_config import CHECKPOINT_HELP
from babybert.config.fields import (
    option,
    require,
    require_at_least,
    require_between,
    require_host,
    require_http_address,
    require_usable_numbers,
)

LONGEST = 1_000_000  # seconds or minutes; timers of the operating system end at much more
MOST_WORKERS = 1_000
SOURCE_HELP = f"{CHECKPOINT_HELP}, in a folder or at s3://bucket/prefix"
INT8_HELP = (
    "answer with int8 weights, in ONNX Runtime: 1.4 to 2.4 times as fast for models of width 256 and more, and a "
    "little less accurate"
)
INT8_DATA_HELP = "with --int8, of a pretrained model: prepared data whose held-out pairs show what int8 loses"
INT8_PAIRS_HELP = "held-out pairs to score with --data"


def require_int8_report(config: Any) -> None:
    """Raise UsageError unless `int8`, `data` and `validation_pairs` go together."""
    require_usable_numbers(config)
    require_at_least(config, 1, "validation_pairs")
    require(config.data is None or config.int8, "--data is for --int8: it shows what int8 loses")


@dataclass(frozen=True)
class FillMaskConfig:
    """Ask a checkpoint which words fit at each [MASK]."""

    checkpoint: Path = option(Path("runs/demo"), CHECKPOINT_HELP)
    top_k: int = option(5, "candidates per mask")
    targets: tuple[str, ...] = option((), "score only these words", is_text=True)
    json: bool = option(False, "print JSON, as the HTTP endpoint answers")

    def __post_init__(self) -> None:
        require_usable_numbers(self)
        require_at_least(self, 1, "top_k")


@dataclass(frozen=True)
class NextSentenceConfig:
    """Ask a checkpoint how likely it is that sentence B follows sentence A."""

    checkpoint: Path = option(Path("runs/demo"), CHECKPOINT_HELP)
    json: bool = option(False, "print JSON, as the HTTP endpoint answers")


@dataclass(frozen=True)
class ClassifyConfig:
    """Ask a fine-tuned checkpoint for the class of a text."""

    checkpoint: Path = option(Path("runs/classifier"), CHECKPOINT_HELP)
    truncate: bool = option(False, "cut a text that is too long, as in training; the default is to refuse it")
    json: bool = option(False, "print JSON, as the HTTP endpoint answers")


@dataclass(frozen=True)
class ArchiveConfig:
    """Pack a checkpoint, the handler and the package into babybert.mar for TorchServe."""

    source: str = option("runs/demo", SOURCE_HELP)
    out: Path = option(Path("model-store"), "folder for babybert.mar; an existing file is replaced")
    int8: bool = option(False, INT8_HELP)
    data: Path | None = option(None, INT8_DATA_HELP)
    validation_pairs: int = option(2000, INT8_PAIRS_HELP)

    def __post_init__(self) -> None:
        require_int8_report(self)


@dataclass(frozen=True)
class ServeConfig:
    """Run TorchServe on a run, a checkpoint or an archive until Ctrl-C or SIGTERM."""

    source: str = option("runs/demo", f"{SOURCE_HELP}; or FILE.mar, or a folder with babybert.mar")
    int8: bool = option(False, INT8_HELP)
    watch: bool = option(
        False, "wait for the first checkpoint of the run, and serve each newer valid one as soon as it appears"
    )
    watch_seconds: float = option(15.0, "seconds between two looks for a newer checkpoint; each is a request to S3")
    workers: int = option(
        1, "worker processes, each with its own copy of the model and two threads; at most one per core is useful"
    )
    token_auth: bool = option(
        False, "require a TorchServe token with every request on the inference port, including /ping; not for /metrics"
    )
    token_minutes: int = option(60, "lifetime of a token; TorchServe's default")
    host: str = option("127.0.0.1", "address of predictions and metrics; management always stays on loopback")
    inference_port: int = option(8080, "port of /predictions/babybert; TorchServe's default, as the next two")
    management_port: int = option(8081, "port of the management API")
    metrics_port: int = option(8082, "port of /metrics")
    start_seconds: float = option(120.0, "give up if no worker is ready by then")
    drain_seconds: float = option(
        30.0, "after SIGTERM, keep answering this long while requests arrive; without requests, end after a second"
    )

    def __post_init__(self) -> None:
        require_usable_numbers(self)
        ports = (self.inference_port, self.management_port, self.metrics_port)
        require(
            all(0 < port < 65536 for port in ports) and len(set(ports)) == 3,
            f"ports {ports} must differ and be from 1 to 65535",
        )
        for name in ("start_seconds", "watch_seconds", "token_minutes", "workers"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be above 0")
        require_between(self, 0, LONGEST, "start_seconds", "watch_seconds", "drain_seconds", "token_minutes")
        require_between(self, 1, MOST_WORKERS, "workers")
        require_host("host", self.host)
        require(
            not (self.watch and self.source.endswith(".mar")),
            f"an archive does not change: watch a run, not {self.source}",
        )
        require(
            not (self.int8 and self.source.endswith(".mar")),
            f"{self.source}: an archive has the weights that it was written with; give --int8 to `babybert archive`",
        )


@dataclass(frozen=True)
class PlaygroundConfig:
    """Show a model in the browser: what it predicts, how it reads a text, and how it learned."""

    endpoint: str | None = option(
        None, "a served model, such as http://127.0.0.1:8080; only its public HTTP API is used"
    )
    checkpoint: str | None = option(
        None, f"instead of an endpoint: {SOURCE_HELP}; attention and embeddings are shown as well"
    )
    run: str | None = option(
        None, "run whose curves and checkpoints are shown, a folder or s3://bucket/prefix; default: --checkpoint's run"
    )
    host: str = option("127.0.0.1", "address of the page; whoever reaches it may ask the model")
    port: int | None = option(
        None, "port of the page; none: 7860, or a free port if it is taken; 0: a free port. The port is logged"
    )

    def __post_init__(self) -> None:
        require(
            (self.endpoint is None) != (self.checkpoint is None), "give one of --endpoint URL and --checkpoint PATH"
        )
        if self.endpoint is not None:
            require_http_address("endpoint", self.endpoint, "http://127.0.0.1:8080")
        require_host("host", self.host)
        require(self.port is None or 0 <= self.port < 65536, f"port is {self.port}; it must be from 0 to 65535")
