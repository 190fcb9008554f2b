"""`babybert import`: a folder for Transformers becomes the first checkpoint of a new run.

Nothing in the folder is executed: its `config.json`, `model.safetensors` and `tokenizer.json` are read as data. Only
our own architecture can be read. The weights and the tokenizer are those that were exported, bit by bit. The
optimizer's state is not in such a folder, so pretraining goes on with `--init-from`, with a new optimizer.
"""

import json
from pathlib import Path
from typing import Any

import safetensors
import tokenizers
import torch
from safetensors.torch import load
from torch import Tensor

from babybert.checkpoint.format import CheckpointState, list_checkpoints, save_checkpoint
from babybert.checkpoint.model_files import DECODER_TABLE, EMBEDDING_TABLE, check_sizes
from babybert.config import ClassifierConfig
from babybert.data.tokenizer import Tokenizer
from babybert.errors import DataError, UsageError, os_reason
from babybert.export.transformers_folder import CONFIG_NAMES, ENCODER_PREFIX, MODEL_TYPE, model_config_of
from babybert.folders import lock_folder
from babybert.model.bert import BabyBert, BertEncoder
from babybert.model.classifier import TextClassifier

CLASSIFIER_WEIGHT = "class_head.0.weight"
NUMBER = (int, float)
VALUE_TYPES: dict[str, tuple[type, ...]] = {  # the others: int
    "dropout": NUMBER,
    "norm": (str,),
    "activation": (str,),
    "tie_decoder": (bool,),
}
READING_TYPES: dict[str, tuple[type, ...]] = {"pairs": (bool,), "positions": (int,), "head_share": NUMBER}


def import_checkpoint(source: Path, run: Path) -> Path:
    """Write the model of a Transformers folder as a checkpoint of step 0 into the folder `run`; return its path.

    Raises DataError naming the file that is missing, damaged or of another architecture, UsageError if `run` has
    checkpoints already or cannot be written.
    """
    config = _read_config(source / "config.json")
    tokenizer = _read_tokenizer(source / "tokenizer.json")
    if config["vocab_size"] != tokenizer.size:
        raise DataError(
            f"{source}: the model has {config['vocab_size']:,} tokens, its tokenizer {tokenizer.size:,}; "
            "they do not belong together"
        )
    model = _read_model(source, config)
    state = CheckpointState(
        step=0,
        epoch=0,
        batch=0,
        seconds=0.0,
        restarts=0,
        tokenizer_digest=tokenizer.digest,
        settings={"seed": 0, "imported_from": str(source)},
        data_digest="",
        scores=None,
    )
    with lock_folder(run, "--out"):
        if list_checkpoints(run):
            raise UsageError(f"{run}: has checkpoints already; choose another --out")
        return save_checkpoint(run, state, model, tokenizer, torch.optim.SGD(model.parameters()))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        model_type = config["model_type"]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {os_reason(error)}; name a folder that was exported") from error
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path}: not the configuration of a Transformers model ({error!r})") from error
    if model_type != MODEL_TYPE:
        raise DataError(
            f"{path}: model_type is {model_type!r}; only {MODEL_TYPE!r} can be imported, "
            "which `babybert export` and its models' save_pretrained write"
        )
    assert isinstance(config, dict)
    _check_types(path, config, {exported: VALUE_TYPES.get(name, (int,)) for name, exported in CONFIG_NAMES.items()})
    return config


def _check_types(path: Path, values: Any, types: dict[str, tuple[type, ...]]) -> None:
    for name, allowed in types.items():
        value = values.get(name) if isinstance(values, dict) else None
        if type(value) not in allowed:  # True is no size, though it is an int
            wanted = " or ".join(kind.__name__ for kind in allowed)
            raise DataError(f"{path}: {name} is {value!r}; it must be of type {wanted}")


def _read_classifier(path: Path, config: dict[str, Any]) -> ClassifierConfig:
    _check_types(path, config.get("classifier"), READING_TYPES)
    labels = config.get("id2label")
    names: list[Any] = [labels.get(str(index)) for index in range(len(labels))] if isinstance(labels, dict) else []
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise DataError(f"{path}: id2label is {str(labels)[:100]}; it must have a different name for each of 0, 1, ...")
    return ClassifierConfig(tuple(names), **config["classifier"])


def _read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer without the template that the export added. Raises DataError."""
    Tokenizer.load(path)  # checks the file and its special tokens
    content = json.loads(path.read_text(encoding="utf-8"))
    content["post_processor"] = None
    for setting in ("truncation", "padding"):  # the last call's, which Transformers saves
        content[setting] = None
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))


def _read_model(source: Path, config: dict[str, Any]) -> BertEncoder:
    path = source / "model.safetensors"
    try:
        weights = {name.removeprefix(ENCODER_PREFIX): tensor for name, tensor in load(path.read_bytes()).items()}
        sizes = model_config_of(config)
        is_classifier = CLASSIFIER_WEIGHT in weights
        _tie(weights, sizes.tie_decoder and not is_classifier)
        check_sizes(sizes, weights)
        model: BertEncoder
        if is_classifier:
            model = TextClassifier(sizes, _read_classifier(source / "config.json", config))
        else:
            model = BabyBert(sizes)
        model.load_state_dict(weights)
    except UsageError as error:
        raise DataError(f"{source / 'config.json'}: {error}") from error
    except (OSError, safetensors.SafetensorError, RuntimeError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{path}: not the weights of a pretrained or fine-tuned model of this config.json ({reason})"
        ) from error
    return model


def _tie(weights: dict[str, Tensor], is_tied: bool) -> None:
    """A tied model's table is stored under one of its two names."""
    if is_tied:
        name = EMBEDDING_TABLE if EMBEDDING_TABLE in weights else DECODER_TABLE
        weights[EMBEDDING_TABLE] = weights[DECODER_TABLE] = weights[name]
