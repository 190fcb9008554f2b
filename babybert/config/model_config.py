"""The sizes and the shape of a network, and the named presets."""

from dataclasses import dataclass
from typing import Any, Literal

from babybert.config.fields import option, require, require_between

# Larger networks than anyone trains with this program: a slip of the keyboard, which would fill the memory.
MOST_UNITS = 65_536
MOST_LAYERS = 1_000


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and the shape of one network. Checkpoints of earlier versions have the fields up to `max_positions`."""

    vocab_size: int = option(147_161, "tokens, including the five special ones: IMDB has 147,156 words")
    width: int = option(10, "size of a hidden state; the reference's value")
    layers: int = option(2, "transformer layers")
    heads: int = option(2, "attention heads; they share the width")
    feed_forward: int = option(2048, "hidden units of each feed-forward; PyTorch's default, which the reference keeps")
    dropout: float = option(0.1, "the BERT paper's value")
    max_positions: int = option(512, "longest input in tokens, special tokens included: rows of the sinusoidal table")
    norm: Literal["post", "pre"] = option(
        "post", "post: layer norms after each residual sum, as in the reference; pre: before each sublayer"
    )
    activation: Literal["relu", "gelu"] = option("relu", "of the feed-forward; the reference has PyTorch's default")
    tie_decoder: bool = option(False, "whether the MLM decoder is the table of token embeddings")

    def __post_init__(self) -> None:
        require(self.vocab_size > 5, f"vocab_size is {self.vocab_size}; it must be above 5, the special tokens")
        require_between(self, 1, MOST_UNITS, "width", "heads", "feed_forward")
        require_between(self, 1, MOST_LAYERS, "layers")
        require(self.width % 2 == 0, f"width is {self.width}; it must be even (half sines, half cosines)")
        require(self.width % self.heads == 0, f"width {self.width} cannot be shared by {self.heads} heads")
        require(0 <= self.dropout < 1, f"dropout is {self.dropout}; it must be at least 0 and below 1")
        require_between(self, 8, MOST_UNITS, "max_positions")
        require(self.norm in ("post", "pre"), f"norm is '{self.norm}'; choose one of post, pre")
        require(self.activation in ("relu", "gelu"), f"activation is '{self.activation}'; choose one of relu, gelu")


@dataclass(frozen=True)
class ClassifierConfig:
    """What a fine-tuned classifier reads and answers. It is a part of its `model.json`.

    Attributes:
        classes: their names, in the order of the logits.
        pairs: whether it reads pairs of texts.
        positions: longest input in tokens, special tokens included; longer ones are cut.
        head_share: of a text that is cut, the share of its tokens that are from its start; the others are from its end.
    """

    classes: tuple[str, ...]
    pairs: bool
    positions: int
    head_share: float


PRE_NORM: dict[str, Any] = {"norm": "pre", "activation": "gelu", "dropout": 0.0}
PRESETS: dict[str, dict[str, Any]] = {
    # The reference's sizes.
    "baby": {"width": 10, "layers": 2, "heads": 2, "feed_forward": 2048},
    # Learns the demo in a minute and a half on two cores. With dropout 0.1 it does not learn NSP in eight epochs.
    "tiny": {"width": 64, "layers": 2, "heads": 4, "feed_forward": 128, "dropout": 0.0},
    # Useful on real text, at ten minutes an epoch of IMDB on two cores. Made for WordPiece, whose vocabulary is small.
    "mini": {"width": 128, "layers": 2, "heads": 4, "feed_forward": 512, "dropout": 0.0},
    # For real use, with WordPiece. Four or more of the reference's post-norm layers do not learn; pre-norm layers do.
    "small": {"width": 256, "layers": 4, "heads": 4, "feed_forward": 1024, **PRE_NORM},
    "medium": {"width": 384, "layers": 6, "heads": 6, "feed_forward": 1536, **PRE_NORM},
}


def model_config(preset: str, vocab_size: int, **overrides: Any) -> ModelConfig:
    """The sizes of `preset`, changed by every override that is not None.

    Raises UsageError for an unknown preset or for sizes that do not fit together.
    """
    require(preset in PRESETS, f"unknown preset '{preset}'; choose one of {', '.join(PRESETS)}")
    changes = {name: value for name, value in overrides.items() if value is not None}
    return ModelConfig(vocab_size=vocab_size, **{**PRESETS[preset], **changes})
