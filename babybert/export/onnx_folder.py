"""`babybert export --format onnx`: the network as a graph for ONNX Runtime and other engines.

A pretrained model answers masks at the positions that are asked for alone, because logits over the vocabulary at every
position would take most of the time. `--int8` writes a second graph whose weights are int8 (dynamic quantization): a
quarter of the size. `int8_report.py` measures what it loses.

The graph has PyTorch's operations on padded batches, not the kernels. Batch and length are dynamic.

Shapes: B sequences, T positions, D width, V vocabulary, M query positions, C classes.
"""

import contextlib
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from babybert.checkpoint.model_files import TOKENIZER, load_encoder
from babybert.data.tokenizer import CLS, MASK, PAD, SEP
from babybert.errors import UsageError
from babybert.export.transformers_folder import transformers_tokenizer
from babybert.model.bert import BabyBert
from babybert.model.classifier import TextClassifier

GRAPH, INT8_GRAPH = "model.onnx", "model-int8.onnx"
OPSET = 18
NEEDED = ("onnx", "onnxscript", "onnxruntime")


class PretrainedGraph(nn.Module):
    """Ids, token types and query positions (b x T + t) to what a pretrained model answers."""

    inputs = ("input_ids", "token_type_ids", "query_positions")
    outputs = ("mlm_logits", "nsp_logits", "last_hidden_state")

    def __init__(self, model: BabyBert) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BT: Tensor, types_BT: Tensor, query_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """MLM logits (M, V), NSP logits (B, 2; class 0 is "B follows A"), and hidden states (B, T, D)."""
        hidden_BTD = self.model(ids_BT, segments_of(ids_BT, types_BT))
        mlm_logits_MV = self.model.mlm_logits(hidden_BTD.flatten(0, 1)[query_M])
        return mlm_logits_MV, self.model.nsp_logits(hidden_BTD).flip(1), hidden_BTD


class ClassifierGraph(nn.Module):
    """Ids and token types to the logits of the classes."""

    inputs = ("input_ids", "token_type_ids")
    outputs = ("logits",)

    def __init__(self, model: TextClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BT: Tensor, types_BT: Tensor) -> Tensor:
        """Logits (B, C)."""
        return self.model.class_logits(ids_BT, segments_of(ids_BT, types_BT))


def segments_of(ids_BT: Tensor, types_BT: Tensor) -> Tensor:
    """Segment ids from token types, which are 0 for the first text and 1 for the second."""
    return (types_BT + 1) * (ids_BT != PAD)


def check_onnx() -> None:
    """Raise UsageError if a package that exporting needs is not installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"--format onnx needs {', '.join(missing)}; pip install 'babybert-pretrain[export]'")


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


def export_graph(graph: PretrainedGraph | ClassifierGraph, path: Path) -> None:
    """Trace the graph with a batch of two, whose second sequence is padded."""
    ids_BT = torch.tensor([[CLS, 5, MASK, 5, SEP], [CLS, 5, SEP, PAD, PAD]])
    examples = (ids_BT, torch.zeros_like(ids_BT), torch.tensor([1, 2, 6]))[: len(graph.inputs)]
    batch, length, queries = (torch.export.Dim(name) for name in ("batch", "length", "queries"))
    shapes = ({0: batch, 1: length}, {0: batch, 1: length}, {0: queries})[: len(graph.inputs)]
    with torch.no_grad(), _quiet(), _interruptible():
        torch.onnx.export(
            graph.eval(),
            examples,
            path,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def quantize(path: Path, target: Path) -> None:
    """Write the graph of `path` with int8 weights to `target`."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = target.with_name("prepared.onnx")
    with _quiet():
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantize_dynamic(prepared, target, weight_type=QuantType.QInt8)
    prepared.unlink()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt for Ctrl-C, which PyTorch's exporter turns into an error of its own."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause and not isinstance(cause, KeyboardInterrupt):
            cause = cause.__cause__ or cause.__context__
        if cause:
            raise KeyboardInterrupt from error
        raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's own messages on standard output, where results go, and its warnings."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with Path(os.devnull).open("w") as sink, contextlib.redirect_stdout(sink), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


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
