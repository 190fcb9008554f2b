"""The files of a checkpoint that are its model: weights, sizes and tokenizer. An archive for a server has them, too.

A pretrained model is a `BabyBert`. A fine-tuned one is a `TextClassifier`; its `model.json` also has its classes, under
the key `classifier`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load, save_file
from torch import Tensor

from babybert.config import ClassifierConfig, ModelConfig
from babybert.data.tokenizer import Tokenizer
from babybert.errors import DataError, UsageError
from babybert.model.bert import BabyBert, BertEncoder
from babybert.model.classifier import TextClassifier

WEIGHTS, SIZES, TOKENIZER = "model.safetensors", "model.json", "tokenizer.json"
MODEL_FILES = (WEIGHTS, SIZES, TOKENIZER)
CLASSIFIER = "classifier"  # key in model.json
# A tied model has one table under two names. It is stored once, as token embedding.
EMBEDDING_TABLE, DECODER_TABLE = "embedding.token_embedding.embedding.weight", "mlm_decoder.weight"
FIRST_FEED_FORWARD = "encoder.layers.0.linear1.weight"


def save_model(folder: Path, model: BertEncoder, tokenizer: Tokenizer) -> None:
    """Write `MODEL_FILES` into `folder`. Weights have the module's own names, without the prefix of a wrapper."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if _is_tied(model):
        del weights[DECODER_TABLE]
    save_file(weights, folder / WEIGHTS)
    sizes = dataclasses.asdict(model.config)
    if isinstance(model, TextClassifier):
        sizes[CLASSIFIER] = dataclasses.asdict(model.classifier)
    (folder / SIZES).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(folder / TOKENIZER)


def load_model(folder: Path) -> tuple[BabyBert, Tokenizer]:
    """The pretrained model, on the CPU, and its tokenizer.

    Raises DataError naming the file that is missing or corrupt; UsageError for a fine-tuned model, which has no heads
    for masks and pairs.
    """
    model, tokenizer = load_encoder(folder)
    if isinstance(model, BabyBert):
        return model, tokenizer
    raise UsageError(
        f"{folder}: is fine-tuned to classify texts, and has no heads for masks and next sentences any more; "
        "give the pretrained checkpoint"
    )


def load_classifier(folder: Path) -> tuple[TextClassifier, Tokenizer]:
    """The fine-tuned model, on the CPU, and its tokenizer. Raises DataError; UsageError for a pretrained model."""
    model, tokenizer = load_encoder(folder)
    if isinstance(model, TextClassifier):
        return model, tokenizer
    raise UsageError(f"{folder}: is not fine-tuned to classify texts; train a classifier with `babybert finetune`")


def load_encoder(folder: Path) -> tuple[BertEncoder, Tokenizer]:
    """The model of either kind, on the CPU, and its tokenizer. Raises DataError as `load_model` does."""
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    config, classifier = _read_sizes(folder)
    if config.vocab_size != tokenizer.size:
        raise DataError(
            f"{folder}: the model has {config.vocab_size:,} tokens, its tokenizer {tokenizer.size:,}; "
            "they are not from one run"
        )
    try:
        # Not `load_file`, which opens only paths that are UTF-8.
        weights: dict[str, Tensor] = load((folder / WEIGHTS).read_bytes())
        check_sizes(config, weights)
        model = BabyBert(config) if classifier is None else TextClassifier(config, classifier)
        if _is_tied(model):
            weights[DECODER_TABLE] = weights[EMBEDDING_TABLE]
        model.load_state_dict(weights)
    except (OSError, safetensors.SafetensorError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{folder / WEIGHTS}: not the weights of this model ({reason})") from error
    return model, tokenizer


def check_sizes(config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Raise RuntimeError if the weights have other sizes than the configuration.

    It comes before a model of these sizes is made, which could need more memory than there is.
    """
    layers = {name.split(".")[2] for name in weights if name.startswith("encoder.layers.")}
    if len(layers) != config.layers:
        raise RuntimeError(f"there are weights of {len(layers)} layers, and the configuration has {config.layers}")
    for name, rows in ((EMBEDDING_TABLE, config.vocab_size), (FIRST_FEED_FORWARD, config.feed_forward)):
        shape = tuple(weights[name].shape) if name in weights else None
        if shape != (rows, config.width):
            raise RuntimeError(f"the shape of {name} is {shape}, and the configuration's is {(rows, config.width)}")


def _is_tied(model: BertEncoder) -> bool:
    """Whether the table of embeddings is there under a second name."""
    return model.config.tie_decoder and isinstance(model, BabyBert)


def _read_sizes(folder: Path) -> tuple[ModelConfig, ClassifierConfig | None]:
    """The content of `model.json`. Raises DataError."""
    try:
        sizes: dict[str, Any] = json.loads((folder / SIZES).read_text(encoding="utf-8"))
        facts = sizes.pop(CLASSIFIER, None)
        classifier = None if facts is None else ClassifierConfig(**{**facts, "classes": tuple(facts["classes"])})
        return ModelConfig(**sizes), classifier
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        detail = error if isinstance(error, UsageError) else " ".join(repr(error).split())
        raise DataError(f"{folder / SIZES}: not the sizes of a model ({detail})") from error
