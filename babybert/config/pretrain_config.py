"""The settings of `babybert pretrain`, in groups, and the recipes that set several of them at once.

A `PretrainConfig` resolves its recipe when it is made, so `PretrainConfig(preset="baby")` in Python and
`--preset baby` on the command line are the same training. A value that is given wins over the recipe, the recipe over
the default. `docs/learning.md` says how the recipes' values were found.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from babybert.config.cache_options import DATA_HELP, CacheOptions, check_address
from babybert.config.fields import (
    UNSET,
    option,
    recipe_option,
    require,
    require_at_least,
    require_between,
    require_seed,
    require_usable_numbers,
)
from babybert.config.model_config import PRESETS, ModelConfig, model_config
from babybert.config.run_options import MOST_STEPS, CheckpointOptions, DeviceOptions, MetricsOptions

DEFAULT_PRESET = "tiny"


@dataclass(frozen=True)
class ModelOptions:
    """The network and its initial weights."""

    preset: str = recipe_option(DEFAULT_PRESET, f"model sizes: {', '.join(PRESETS)} (baby is the reference)")
    width: int | None = option(None, "replaces the preset's value")
    layers: int | None = option(None, "replaces the preset's value")
    heads: int | None = option(None, "replaces the preset's value")
    feed_forward: int | None = option(None, "replaces the preset's value")
    dropout: float | None = recipe_option(None, "replaces the preset's value")
    norm: Literal["post", "pre"] | None = option(
        None, "replaces the preset's value: layer norms after each residual sum, or before each sublayer"
    )
    activation: Literal["relu", "gelu"] | None = option(None, "replaces the preset's value, of the feed-forward")
    init_from: str | None = option(
        None,
        "start with the weights of this checkpoint, a run or one step in a folder or at s3://bucket/prefix, and a new "
        "optimizer: to go on with other data of the same vocabulary. A resume takes the run's own checkpoint",
    )
    tie_decoder: bool = option(False, "use the table of token embeddings as MLM decoder: fewer parameters")
    init_decoder_bias: bool = recipe_option(
        True, "initialize the MLM bias with log word frequencies: the loss starts at the unigram baseline"
    )
    initial_weights: Literal["xavier", "mimetic", "normal"] = recipe_option(
        "xavier",
        "xavier: random; mimetic: tokens first attend to similar tokens, better from mini's width on; "
        "normal: small random weights, smaller with more layers, for pre-norm networks",
    )

    def sizes(self, vocab_size: int) -> ModelConfig:
        """The network's sizes for this vocabulary. Raises UsageError if they do not fit together."""
        names = ("width", "layers", "heads", "feed_forward", "dropout", "norm", "activation", "tie_decoder")
        return model_config(self.preset, vocab_size, **{name: getattr(self, name) for name in names})

    def check_model(self) -> None:
        """Raise UsageError for sizes that do not fit together."""
        self.sizes(vocab_size=6)


@dataclass(frozen=True)
class DataOptions:
    """The training pairs and how batches are made of them."""

    data: Path | str = option(Path("data/demo"), DATA_HELP)
    batch_size: int = recipe_option(64, "pairs per step over all devices; the reference's 6 leaves the machine idle")
    accumulate: int = option(1, "split a step into this many micro-batches: less memory, the same gradient")
    masking: Literal["static", "dynamic"] = recipe_option(
        "dynamic", "dynamic: new masks each epoch (the demo's loss ends at 0.50, not 0.59); static: the table's masks"
    )
    masked_share: float = recipe_option(
        0.15,
        "share of tokens masked by --masking dynamic, in the first epoch; evaluation always masks 15 %. A model learns "
        "more from a batch with more",
    )
    masked_share_end: float | None = recipe_option(
        None, "share in the last epoch; it changes linearly from epoch to epoch; none: it stays the same"
    )
    whole_word_masking: bool = option(
        False, "mask all pieces of a WordPiece word together: a piece cannot be guessed from the rest of its word"
    )
    bucketing: bool = recipe_option(True, "batch pairs of similar length together: little padding")
    resident: Literal["auto", "always", "never"] = option(
        "auto", "keep the data on the training device; auto: on a GPU, if it fits next to the model"
    )
    validation_pairs: int = option(2000, "held-out pairs scored after each epoch; `babybert evaluate` scores all")
    seed: int = option(0, "seed of the weights, dropout, masks and the order of pairs")

    def check_data(self) -> None:
        """Raise UsageError for values that cannot work."""
        check_address(self.data)
        require_at_least(self, 1, "batch_size", "accumulate", "validation_pairs")
        for name in ("masked_share", "masked_share_end"):
            share = getattr(self, name)
            require(share is None or 0 < share < 1, f"{name} is {share}; it must be between 0 and 1")
        require(
            self.masking == "dynamic"
            or (self.masked_share, self.masked_share_end, self.whole_word_masking) == (0.15, None, False),
            "masked_share, masked_share_end and whole_word_masking are for --masking dynamic; static masks are those "
            "of the table",
        )
        require_seed(self.seed)


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer and its learning rates."""

    optimizer: Literal["adamw", "adam", "muon"] = recipe_option(
        "adamw",
        "muon: Muon for the layers' matrices, AdamW for the rest; a lower loss for the presets from small on. "
        "adam (the reference's) adds the decay to the gradient, which hurts rare words",
    )
    lr: float = recipe_option(
        5e-3, "peak learning rate; other presets set another. The reference's 5e-5 hardly moves a model this small"
    )
    decoder_lr_factor: float = recipe_option(1.0, "learning rate of the MLM decoder's rows relative to the layers'")
    embedding_lr_factor: float = recipe_option(
        1.0, "learning rate of the token embeddings relative to the layers'; rare words are seldom updated"
    )
    decoder_epsilon: float = recipe_option(
        1e-8, "Adam's epsilon for the MLM decoder; one above rare words' gradients keeps noise from moving them"
    )
    weight_decay: float = option(0.01, "the reference's value")
    decay_vectors: bool = recipe_option(False, "apply weight decay to biases and norms as well")
    clip_norm: float = option(1.0, "clip gradients to this norm")

    def check_optimizer(self) -> None:
        """Raise UsageError for values that cannot work."""
        for name in ("lr", "decoder_lr_factor", "embedding_lr_factor", "decoder_epsilon", "clip_norm"):
            value = getattr(self, name)
            require(0 < value < float("inf"), f"{name} is {value}; it must be a number above 0")
        require(0 <= self.weight_decay < float("inf"), f"weight_decay is {self.weight_decay}; it must not be negative")


@dataclass(frozen=True)
class ScheduleOptions:
    """The length of the run and the course of the learning rate."""

    epochs: int = recipe_option(15, "passes over the pairs; the reference made 100 over its 10,000")
    max_steps: int | None = option(None, "stop after this many steps; the schedule is fitted to them")
    max_minutes: float | None = option(
        None, "stop after this much training, earlier processes included; the schedule is not fitted to it"
    )
    schedule: Literal["linear", "cosine", "constant"] = option(
        "linear", "decay of the learning rate after the warm-up: to zero, or none"
    )
    warmup_fraction: float = option(0.1, "share of the steps in which the learning rate rises to its peak")

    def check_schedule(self) -> None:
        """Raise UsageError for values that cannot work."""
        require_at_least(self, 1, "epochs")
        require_between(self, 1, MOST_STEPS, "max_steps")
        require(
            self.max_minutes is None or self.max_minutes > 0, f"max_minutes is {self.max_minutes}; it must be above 0"
        )
        require(
            0 <= self.warmup_fraction <= 1, f"warmup_fraction is {self.warmup_fraction}; it must be between 0 and 1"
        )


# The wide presets. A batch of 128 pairs has a fifth more tokens a second than one of 64, because Muon costs the same in
# each step. Four epochs of IMDB take about an hour with `small`.
WIDE_RECIPE: dict[str, Any] = {
    "optimizer": "muon",
    "lr": 3e-3,
    "batch_size": 128,
    "masked_share": 0.3,
    "masked_share_end": 0.15,
    "initial_weights": "normal",
    "epochs": 4,
}

# What learns best with each preset, where it differs from the defaults.
PRESET_RECIPES: dict[str, dict[str, Any]] = {
    "baby": {
        "lr": 2e-3,
        "decoder_lr_factor": 50.0,
        "embedding_lr_factor": 20.0,
        "decoder_epsilon": 1e-3,
        "dropout": 0.0,
        "batch_size": 32,
    },
    "mini": {
        "lr": 1e-3,
        "decoder_lr_factor": 3.0,
        "embedding_lr_factor": 3.0,
        "batch_size": 32,
        "initial_weights": "mimetic",
    },
    "small": WIDE_RECIPE,
    "medium": WIDE_RECIPE | {"lr": 2e-3},
}

# The course's notebook, except for its data: PyTorch's Adam, no word frequencies, masks drawn once.
REFERENCE_RECIPE: dict[str, Any] = {
    "preset": "baby",
    "batch_size": 6,
    "optimizer": "adam",
    "lr": 5e-5,
    "decay_vectors": True,
    "epochs": 100,
    "init_decoder_bias": False,
    "masking": "static",
    "bucketing": False,
}


@dataclass(frozen=True)
class PretrainConfig(
    ModelOptions,
    DataOptions,
    CacheOptions,
    OptimizerOptions,
    ScheduleOptions,
    DeviceOptions,
    CheckpointOptions,
    MetricsOptions,
):
    """Train a model on prepared data, from random weights or from the run's newest checkpoint."""

    recipe: Literal["default", "reference"] = option(
        "default",
        "default: the best known values for the preset; reference: the course's. Given settings win over both",
    )

    def __post_init__(self) -> None:
        self._resolve_recipe()
        require_usable_numbers(self)
        self.check_model()
        self.check_data()
        self.check_cache()
        self.check_optimizer()
        self.check_schedule()
        self.check_checkpoints()
        self.check_metrics()

    def _resolve_recipe(self) -> None:
        """Give every field that is `UNSET` its value: the recipe's, or the field's default."""
        if self.recipe == "reference":
            values = REFERENCE_RECIPE
        else:
            preset = DEFAULT_PRESET if self.preset is UNSET else self.preset
            values = PRESET_RECIPES.get(preset, {})
            if self.masking == "static":
                values = {name: value for name, value in values.items() if not name.startswith("masked_share")}
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is UNSET:
                value = values.get(field.name, field.metadata["default"])
                object.__setattr__(self, field.name, value)  # the dataclass is frozen

    def as_json(self) -> dict[str, Any]:
        """The settings as `state.json` and `summary.json` keep them."""
        settings = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
