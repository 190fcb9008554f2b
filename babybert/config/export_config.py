"""The settings of the commands that exchange models with other programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from babybert.config.fields import option, require
from babybert.config.serving_config import INT8_DATA_HELP, INT8_PAIRS_HELP, SOURCE_HELP, require_int8_report


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint's model for Hugging Face Transformers or ONNX Runtime."""

    checkpoint: str = option("runs/demo", SOURCE_HELP)
    format: Literal["transformers", "onnx"] = option(
        "transformers", "transformers: a folder for AutoModel and pipeline; onnx: a graph for ONNX Runtime"
    )
    out: Path = option(Path("exported"), "folder to write")
    overwrite: bool = option(False, "replace an earlier export in --out")
    int8: bool = option(False, "onnx: also write a graph with int8 weights, a quarter of the size")
    data: Path | None = option(None, INT8_DATA_HELP)
    validation_pairs: int = option(2000, INT8_PAIRS_HELP)

    def __post_init__(self) -> None:
        require_int8_report(self)
        require(not self.int8 or self.format == "onnx", "--int8 is for --format onnx")


@dataclass(frozen=True)
class ImportConfig:
    """Make a checkpoint of a folder that `babybert export` or Transformers wrote, to go on with it."""

    source: Path = option(Path("exported"), "folder with config.json, model.safetensors and tokenizer.json")
    out: Path = option(Path("runs/imported"), "folder of the new run; it must not have checkpoints yet")
