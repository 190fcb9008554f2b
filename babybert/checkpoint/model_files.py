"""A model in a folder: `model.safetensors`, `model.json` (its sizes) and `tokenizer.json`.

What a checkpoint, an archive and the predictor share. Weights are safetensors: reading them runs no code, as
unpickling would. Names are the module's own, without a wrapper's prefix, so they load whatever trained them.
"""

import dataclasses
import json
from pathlib import Path

import safetensors
from safetensors.torch import load_file, save_file

from babybert.config import ModelConfig
from babybert.data.tokenizer import Tokenizer
from babybert.errors import DataError, UsageError
from babybert.model.bert import BabyBert

WEIGHTS, SIZES, TOKENIZER = "model.safetensors", "model.json", "tokenizer.json"
MODEL_FILES = (WEIGHTS, SIZES, TOKENIZER)


def save_model(folder: Path, model: BabyBert, tokenizer: Tokenizer) -> None:
    """Write the three files into `folder`."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    (folder / SIZES).write_text(json.dumps(dataclasses.asdict(model.config), indent=2) + "\n", encoding="utf-8")
    tokenizer.save(folder / TOKENIZER)


def load_model(folder: Path) -> tuple[BabyBert, Tokenizer]:
    """Read them back, on the CPU. Raises DataError naming the file that is missing, broken, or does not fit."""
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    try:
        config = ModelConfig(**json.loads((folder / SIZES).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        detail = error if isinstance(error, UsageError) else " ".join(repr(error).split())
        raise DataError(f"{folder / SIZES}: not the sizes of a model ({detail})") from error
    if config.vocab_size != tokenizer.size:
        raise DataError(
            f"{folder}: the model has {config.vocab_size:,} tokens, its tokenizer {tokenizer.size:,}; they are not of one run"
        )
    model = BabyBert(config)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        raise DataError(
            f"{folder / WEIGHTS}: not the weights of this model ({' '.join(str(error).split())[:300]})"
        ) from error
    return model, tokenizer
