"""The network as ONNX graphs, which ONNX Runtime and other engines run, in fp32 or with int8 weights.

The graphs have PyTorch's operations, not the kernels. int8 is dynamic quantization: weights are int8 in the file, with
a scale for each column, and the inputs of each product become int8 while it runs, with one scale for the whole tensor.
Weights use 7 of the 8 bits. With all 8, x86 processors without VNNI clip sums of two products to 16 bits: on one of
them, the hidden states of `small` were 4.3 % off instead of 2.0 % when trained, and 12 % instead of 1.4 % when not.

Shapes: B sequences, T positions, D width, V vocabulary, M query positions, C classes.
"""

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from babybert.data.tokenizer import CLS, MASK, PAD, SEP
from babybert.errors import UsageError
from babybert.model.bert import BabyBert, BertEncoder
from babybert.model.classifier import TextClassifier

OPSET = 18
NEEDED = ("onnx", "onnxscript", "onnxruntime")
Shape = dict[int, str]  # the dynamic axes of an input, with their names


def check_onnx(flag: str) -> None:
    """Raise UsageError if a package that exporting needs is not installed. `flag` is what asked for the export."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"{flag} needs {', '.join(missing)}; pip install 'babybert-pretrain[export]'")


class OnnxGraph(nn.Module):
    """A module that can be exported: it names its inputs and outputs, and has example inputs to trace it with."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic_axes: tuple[Shape, ...]  # of each input

    def examples(self) -> tuple[Tensor, ...]:
        """Inputs of typical shapes. Sizes above 1 on dynamic axes, because the exporter takes 1 for a constant."""
        raise NotImplementedError


class PretrainedGraph(OnnxGraph):
    """Ids, token types and query positions (b x T + t) to what a pretrained model answers."""

    inputs = ("input_ids", "token_type_ids", "query_positions")
    outputs = ("mlm_logits", "nsp_logits", "last_hidden_state")
    dynamic_axes = ({0: "batch", 1: "length"}, {0: "batch", 1: "length"}, {0: "queries"})

    def __init__(self, model: BabyBert) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BT: Tensor, types_BT: Tensor, query_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """MLM logits (M, V), NSP logits (B, 2; class 0 is "B follows A"), and hidden states (B, T, D)."""
        hidden_BTD = self.model(ids_BT, segments_of(ids_BT, types_BT))
        mlm_logits_MV = self.model.mlm_logits(hidden_BTD.flatten(0, 1)[query_M])
        return mlm_logits_MV, self.model.nsp_logits(hidden_BTD).flip(1), hidden_BTD

    def examples(self) -> tuple[Tensor, ...]:
        """See `OnnxGraph.examples`."""
        return (*example_ids(), torch.tensor([1, 2, 6]))


class ClassifierGraph(OnnxGraph):
    """Ids and token types to the logits of the classes."""

    inputs = ("input_ids", "token_type_ids")
    outputs = ("logits",)
    dynamic_axes = ({0: "batch", 1: "length"}, {0: "batch", 1: "length"})

    def __init__(self, model: TextClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BT: Tensor, types_BT: Tensor) -> Tensor:
        """Logits (B, C)."""
        return self.model.class_logits(ids_BT, segments_of(ids_BT, types_BT))

    def examples(self) -> tuple[Tensor, ...]:
        """See `OnnxGraph.examples`."""
        return example_ids()


class EncoderGraph(OnnxGraph):
    """The layers alone: embeddings of one sequence without padding, to its hidden states at the query positions.

    In the last layer all tokens have keys and values; everything else is computed for the query positions only.
    """

    inputs = ("embeddings", "query_positions")
    outputs = ("hidden_states",)
    dynamic_axes = ({1: "length"}, {0: "queries"})

    def __init__(self, model: BertEncoder) -> None:
        super().__init__()
        self.width = model.config.width
        self.layers, self.norm = model.encoder.layers, model.encoder_norm

    def forward(self, x_1TD: Tensor, query_M: Tensor) -> Tensor:
        """Hidden states (M, D)."""
        for layer in self.layers[:-1]:
            x_1TD = layer(x_1TD)
        hidden_1MD: Tensor = self.norm(self.layers[-1].forward_queries(x_1TD, query_M))
        return hidden_1MD[0]

    def examples(self) -> tuple[Tensor, ...]:
        """See `OnnxGraph.examples`."""
        return torch.zeros(1, 5, self.width), torch.tensor([0, 2])


def example_ids() -> tuple[Tensor, Tensor]:
    """Ids and token types of two sequences, of which the second is padded."""
    ids_BT = torch.tensor([[CLS, 5, MASK, 5, SEP], [CLS, 5, SEP, PAD, PAD]])
    return ids_BT, torch.zeros_like(ids_BT)


def segments_of(ids_BT: Tensor, types_BT: Tensor) -> Tensor:
    """Segment ids from token types, which are 0 for the first text and 1 for the second."""
    return (types_BT + 1) * (ids_BT != PAD)


def export_graph(graph: OnnxGraph, path: Path) -> None:
    """Write the graph to `path`. It is traced with its examples."""
    names = {name for axes in graph.dynamic_axes for name in axes.values()}
    dimensions = {name: torch.export.Dim(name) for name in names}
    shapes = tuple({axis: dimensions[name] for axis, name in axes.items()} for axes in graph.dynamic_axes)
    with torch.no_grad(), _quiet(), _interruptible():
        torch.onnx.export(
            graph.eval(),
            graph.examples(),
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
        quantize_dynamic(prepared, target, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
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
