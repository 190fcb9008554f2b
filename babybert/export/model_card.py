"""The README of an exported folder: what the model is, how to load it, how it was trained, its scores and limits."""

import json
from pathlib import Path
from typing import Any

from babybert import __version__
from babybert.checkpoint.format import CheckpointState, read_state
from babybert.model.bert import BertEncoder
from babybert.model.classifier import TextClassifier

PRETRAINED_EXAMPLE = """from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForMaskedLM.from_pretrained(".", trust_remote_code=True)
print(pipeline("fill-mask", model=model, tokenizer=tokenizer)("the movie was [MASK]."))"""
CLASSIFIER_EXAMPLE = """from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForSequenceClassification.from_pretrained(".", trust_remote_code=True)
print(pipeline("text-classification", model=model, tokenizer=tokenizer)("a good movie ."))"""
SETTINGS = ("preset", "data", "source", "epochs", "max_steps", "batch_size", "optimizer", "lr", "masked_share", "seed")


def model_card(checkpoint: Path, model: BertEncoder) -> str:
    """The text of the README."""
    state = read_state(checkpoint)
    sizes = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    is_classifier = isinstance(model, TextClassifier)
    purpose = (
        f"It classifies texts: {', '.join(map(_cell, model.classifier.classes))}."
        if isinstance(model, TextClassifier)
        else "It was pretrained with masked language modelling and next sentence prediction."
    )
    return f"""---
library_name: transformers
pipeline_tag: {"text-classification" if is_classifier else "fill-mask"}
tags: [babybert]
---

# BabyBERT, step {state.step:,}

A small BERT, exported by `babybert export` {__version__}. {purpose}

| vocabulary | width | layers | heads | feed-forward | longest input | norm | parameters |
| ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |
| {sizes.vocab_size:,} | {sizes.width} | {sizes.layers} | {sizes.heads} | {sizes.feed_forward:,} | \
{sizes.max_positions} | {sizes.norm} | {parameters:,} |

## Use

```python
{CLASSIFIER_EXAMPLE if is_classifier else PRETRAINED_EXAMPLE}
```

`trust_remote_code=True` runs `modeling_babybert.py` of this folder. Read it before you load a copy from somebody else.
`token_type_ids` are 0 for the first text and 1 for the second. Class 0 of next sentence prediction is "B follows A".

## Training

{_settings_table(state)}

{_scores(state)}

## Limits

The model is small, and it knows the texts that it was trained on and little else. It repeats their prejudices. It was
not tested for any use that decides about people.
"""


def _settings_table(state: CheckpointState) -> str:
    rows = [f"| {name} | {_cell(state.settings[name])} |" for name in SETTINGS if state.settings.get(name) is not None]
    return "\n".join(["| setting | value |", "| --- | --- |", *rows])


def _scores(state: CheckpointState) -> str:
    if not state.scores:
        return "The checkpoint has no scores: it was saved within an epoch."
    rows = [f"| {name} | {_cell(value)} |" for name, value in state.scores.items() if value is not None]
    return "\n".join(["On held-out data:", "", "| score | value |", "| --- | ---: |", *rows])


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("|", "\\|").replace("\n", " ")
