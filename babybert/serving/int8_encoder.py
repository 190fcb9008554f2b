"""An encoder with int8 weights in ONNX Runtime, for a server that is to answer faster than the model does in fp32.

`babybert archive --int8` and `babybert serve --int8` write the layers as a graph (`export/onnx_graphs.py`). Embeddings
and heads stay in PyTorch and in fp32. Sequences go through the graph one by one. Dynamic quantization has one scale for
all inputs of a product, so in a batch the answer to a text would depend on the texts beside it. There is no padding
either, and for wide models it is still faster than a batch in fp32 (docs/export.md).

Shapes: B sequences, T positions, D width, M query positions.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from babybert.data.tokenizer import PAD
from babybert.errors import DataError, UsageError
from babybert.model.bert import BertEncoder

INT8_ENCODER = "encoder-int8.onnx"


class Int8Encoder:
    """Computes what `BertEncoder.hidden_at` does, with int8 weights in the layers."""

    def __init__(self, path: Path, model: BertEncoder, threads: int = 1) -> None:
        """Open the graph at `path`, that of `model`. Raises UsageError without ONNX Runtime.

        Args:
            path: what `write_int8_encoder` wrote.
            model: it computes the embeddings.
            threads: sequences that are computed at the same time, each by one thread.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise UsageError(
                f"{path.name}: a model with int8 weights needs onnxruntime; pip install 'babybert-pretrain[serve]'"
            ) from error
        options = onnxruntime.SessionOptions()
        # A thread for each sequence: with several for each product, they mostly wait for each other.
        options.intra_op_num_threads = 1
        self._executor = ThreadPoolExecutor(threads) if threads > 1 else None
        self._session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._model = model

    def hidden_at(self, ids_BT: Tensor, segments_BT: Tensor, query_M: Tensor) -> Tensor:
        """Hidden states (M, D) at the query positions b x T + t. Padding is at the end of a row.

        They are NaN for a sequence with a non-finite embedding, whose scale would be meaningless.
        """
        positions = ids_BT.shape[1]
        is_pad_BT = ids_BT == PAD
        x_BTD = self._model.embedding(ids_BT, segments_BT, torch.arange(positions))
        is_finite_B = (x_BTD.isfinite().all(-1) | is_pad_BT).all(-1).tolist()
        length_B = (~is_pad_BT).sum(1).tolist()
        queries_B: list[list[tuple[int, int]]] = [[] for _ in length_B]  # (index in query_M, position) of each sequence
        for index, query in enumerate(query_M.tolist()):
            queries_B[query // positions].append((index, query % positions))
        x_array, hidden_MD = x_BTD.numpy(), np.full((len(query_M), x_BTD.shape[2]), np.nan, np.float32)

        def encode(row: int) -> None:
            indices, query_positions = zip(*queries_B[row], strict=True)
            inputs = {
                "embeddings": x_array[row : row + 1, : length_B[row]],
                "query_positions": np.array(query_positions),
            }
            hidden_MD[list(indices)] = self._session.run(None, inputs)[0]

        rows = [row for row, queries in enumerate(queries_B) if queries and is_finite_B[row]]
        run = self._executor.map if self._executor and len(rows) > 1 else map
        list(run(encode, rows))
        return torch.from_numpy(hidden_MD)


def write_int8_encoder(model: BertEncoder, folder: Path) -> None:
    """Write the layers of `model` with int8 weights to `folder`. Raises DataError for weights that are not finite."""
    from babybert.export.onnx_graphs import EncoderGraph, export_graph, quantize

    for name, parameter in model.encoder.named_parameters():
        if not parameter.isfinite().all():
            raise DataError(f"the weights encoder.{name} are not finite; choose another checkpoint")
    fp32 = folder / "encoder.onnx"
    export_graph(EncoderGraph(model.set_kernels("plain")), fp32)
    quantize(fp32, folder / INT8_ENCODER)
    fp32.unlink()
