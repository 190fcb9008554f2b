"""`babybert export --format onnx`: the network as a graph for ONNX Runtime and other engines.

A pretrained model answers masks at the positions that are asked for alone, because logits over the vocabulary at every
position would take most of the time. `--int8` writes a second graph whose weights are int8 (dynamic quantization): a
quarter of the size. `int8_report.py` measures what it loses. Batch and length are dynamic.
"""

import json
from pathlib import Path
from typing import Any

from torch import nn

from babybert.checkpoint.model_files import TOKENIZER, load_encoder
from babybert.data.tokenizer import PAD
from babybert.export.onnx_graphs import ClassifierGraph, PretrainedGraph, export_graph, quantize
from babybert.export.transformers_folder import transformers_tokenizer
from babybert.model.bert import BabyBert
from babybert.model.classifier import TextClassifier

GRAPH, INT8_GRAPH = "model.onnx", "model-int8.onnx"


def write_onnx_folder(checkpoint: Path, out: Path, int8: bool) -> None:
    """Write the graph of a valid checkpoint's model, its tokenizer and a README into the folder `out`."""
    model, _ = load_encoder(checkpoint)
    model.set_kernels("plain").eval()
    graph = PretrainedGraph(model) if isinstance(model, BabyBert) else ClassifierGraph(_classifier(model))
    export_graph(graph, out / GRAPH)
    if int8:
        quantize(out / GRAPH, out / INT8_GRAPH)
    tokenizer = transformers_tokenizer((checkpoint / TOKENIZER).read_bytes())
    (out / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    facts: dict[str, Any] = {"max_positions": model.config.max_positions, "inputs": graph.inputs}
    if isinstance(model, TextClassifier):
        facts["classes"] = model.classifier.classes
    (out / "babybert.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "README.md").write_text(_readme(model), encoding="utf-8")


def _classifier(model: nn.Module) -> TextClassifier:
    assert isinstance(model, TextClassifier)
    return model


PRETRAINED_EXAMPLE = """import numpy as np
import onnxruntime
import tokenizers

tokenizer = tokenizers.Tokenizer.from_file("tokenizer.json")
session = onnxruntime.InferenceSession("model.onnx")
encoding = tokenizer.encode("the movie was [MASK].")
queries = [position for position, token in enumerate(encoding.tokens) if token == "[MASK]"]
mlm_logits, nsp_logits, hidden = session.run(
    None,
    {
        "input_ids": np.array([encoding.ids]),
        "token_type_ids": np.array([encoding.type_ids]),
        "query_positions": np.array(queries),
    },
)
print([tokenizer.id_to_token(token) for token in mlm_logits[0].argsort()[::-1][:5]])
"""
CLASSIFIER_EXAMPLE = """import json

import numpy as np
import onnxruntime
import tokenizers

tokenizer = tokenizers.Tokenizer.from_file("tokenizer.json")
session = onnxruntime.InferenceSession("model.onnx")
encoding = tokenizer.encode("a good movie")
inputs = {"input_ids": np.array([encoding.ids]), "token_type_ids": np.array([encoding.type_ids])}
(logits,) = session.run(None, inputs)
with open("babybert.json", encoding="utf-8") as file:
    print(json.load(file)["classes"][logits[0].argmax()])
"""


def _readme(model: nn.Module) -> str:
    is_classifier = isinstance(model, TextClassifier)
    asked = (
        "`query_positions` are the positions to predict tokens at, at least one. Position t of sequence b has the "
        'number b x T + t. Class 0 of `nsp_logits` is "B follows A".'
    )
    return f"""# BabyBERT for ONNX Runtime

`input_ids` are padded with {PAD}. `token_type_ids` are 0 for the first text and 1 for the second.
{"" if is_classifier else asked}

```python
{CLASSIFIER_EXAMPLE if is_classifier else PRETRAINED_EXAMPLE}```
"""
