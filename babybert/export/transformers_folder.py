"""`babybert export --format transformers`: a folder that Hugging Face's `AutoModel` classes and `pipeline` load.

Transformers has no architecture of the same function: positions are sinusoids that are added to scaled embeddings, and
a norm follows the last layer also of a post-norm network. So the folder has the two files that define it, and is loaded
with `trust_remote_code=True`. Weights are copied bit by bit; only their names change. The tokenizer is the checkpoint's
with a template for `[CLS] A [SEP] B [SEP]`.

What Transformers does differently from `babybert`: `[MASK]` in any text is the special token, and a text that is too
long for a classifier loses its end, not its middle.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers
from safetensors.torch import load, save
from tokenizers.processors import TemplateProcessing

from babybert.checkpoint.model_files import TOKENIZER, WEIGHTS, load_encoder
from babybert.config import ModelConfig
from babybert.data.tokenizer import CLS, PAD, SEP, SPECIAL_TOKENS
from babybert.export.model_card import model_card
from babybert.model.bert import BertEncoder
from babybert.model.classifier import TextClassifier

MODEL_TYPE = "babybert"
ENCODER_PREFIX = "babybert."
ENCODER_PARTS = ("embedding.", "encoder.", "encoder_norm.")  # the other weights are of heads
CONFIGURATION, MODELING = "configuration_babybert.py", "modeling_babybert.py"
PRETRAINED_CLASSES = {
    "AutoModel": "BabyBertModel",
    "AutoModelForMaskedLM": "BabyBertForMaskedLM",
    "AutoModelForNextSentencePrediction": "BabyBertForNextSentencePrediction",
    "AutoModelForPreTraining": "BabyBertForPreTraining",
    "AutoModelForSequenceClassification": "BabyBertForSequenceClassification",
}
CLASSIFIER_CLASSES = {name: PRETRAINED_CLASSES[name] for name in ("AutoModel", "AutoModelForSequenceClassification")}
# The names of `ModelConfig` and of the exported configuration.
CONFIG_NAMES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "feed_forward": "intermediate_size",
    "dropout": "hidden_dropout_prob",
    "max_positions": "max_position_embeddings",
    "norm": "norm",
    "activation": "hidden_act",
    "tie_decoder": "tie_word_embeddings",
}


def write_transformers_folder(checkpoint: Path, out: Path) -> None:
    """Write the files of a valid checkpoint's model for Transformers into the folder `out`."""
    model, _ = load_encoder(checkpoint)
    weights = {exported_name(name): tensor for name, tensor in load((checkpoint / WEIGHTS).read_bytes()).items()}
    (out / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    _write_json(out / "config.json", transformers_config(model))
    content = (checkpoint / TOKENIZER).read_bytes()
    (out / "tokenizer.json").write_text(transformers_tokenizer(content).to_str(pretty=True), encoding="utf-8")
    _write_json(out / "tokenizer_config.json", _tokenizer_config(model.config))
    for name in (CONFIGURATION, MODELING):
        shutil.copyfile(Path(__file__).parent / name, out / name)
    (out / "README.md").write_text(model_card(checkpoint, model), encoding="utf-8")


def exported_name(name: str) -> str:
    """The name of one of the checkpoint's weights in the exported file."""
    return ENCODER_PREFIX + name if name.startswith(ENCODER_PARTS) else name


def transformers_config(model: BertEncoder) -> dict[str, Any]:
    """The content of `config.json`."""
    is_classifier = isinstance(model, TextClassifier)
    classes = CLASSIFIER_CLASSES if is_classifier else PRETRAINED_CLASSES
    config = {
        "model_type": MODEL_TYPE,
        "architectures": [
            classes["AutoModelForSequenceClassification" if is_classifier else "AutoModelForPreTraining"]
        ],
        "auto_map": {
            "AutoConfig": "configuration_babybert.BabyBertConfig",
            **{name: f"modeling_babybert.{model_class}" for name, model_class in classes.items()},
        },
        **{CONFIG_NAMES[name]: value for name, value in vars(model.config).items()},
        "pad_token_id": PAD,
        "dtype": "float32",
    }
    if isinstance(model, TextClassifier):
        reading = vars(model.classifier).items()  # how texts are read, for `babybert import`
        config["classifier"] = {name: value for name, value in reading if name != "classes"}
        config["id2label"] = {str(index): name for index, name in enumerate(model.classifier.classes)}
        config["label2id"] = {name: index for index, name in enumerate(model.classifier.classes)}
    return config


def model_config_of(config: dict[str, Any]) -> ModelConfig:
    """The sizes in the content of a `config.json`. Raises KeyError for a missing one, UsageError for wrong ones."""
    return ModelConfig(**{name: config[exported] for name, exported in CONFIG_NAMES.items()})


def transformers_tokenizer(content: bytes) -> tokenizers.Tokenizer:
    """The tokenizer of a `tokenizer.json`, with special tokens around texts and pairs."""
    backend = tokenizers.Tokenizer.from_buffer(content)
    backend.post_processor = TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(SPECIAL_TOKENS[CLS], CLS), (SPECIAL_TOKENS[SEP], SEP)],
    )
    return backend


def _special_tokens() -> dict[str, str]:
    return {f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS}


def _tokenizer_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_positions,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **_special_tokens(),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
