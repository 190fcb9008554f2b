"""Every setting of every command: one frozen dataclass per command, each field with its default and the reason for it.

`command_line.py` fills these classes from flags, `BABYBERT_*` variables and YAML files. Each class checks its values
when it is made, so a command with a bad setting ends before it has touched anything.
"""

from babybert.config.evaluation_config import (
    EvaluateConfig,
    ExplainConfig,
    InfoConfig,
    LookConfig,
    PlotConfig,
    ProbeConfig,
)
from babybert.config.export_config import ExportConfig, ImportConfig
from babybert.config.finetune_config import FinetuneConfig
from babybert.config.model_config import PRESETS, ClassifierConfig, ModelConfig, model_config
from babybert.config.prepare_config import PrepareConfig
from babybert.config.pretrain_config import PretrainConfig
from babybert.config.serving_config import (
    ArchiveConfig,
    ClassifyConfig,
    FillMaskConfig,
    NextSentenceConfig,
    PlaygroundConfig,
    ServeConfig,
)

__all__ = [
    "PRESETS",
    "ArchiveConfig",
    "ClassifierConfig",
    "ClassifyConfig",
    "EvaluateConfig",
    "ExplainConfig",
    "ExportConfig",
    "FillMaskConfig",
    "FinetuneConfig",
    "ImportConfig",
    "InfoConfig",
    "LookConfig",
    "ModelConfig",
    "NextSentenceConfig",
    "PlaygroundConfig",
    "PlotConfig",
    "PrepareConfig",
    "PretrainConfig",
    "ProbeConfig",
    "ServeConfig",
    "model_config",
]
