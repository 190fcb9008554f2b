"""What int8 weights cost: both graphs of an ONNX export, scored on the same held-out pairs.

Shapes: B pairs, T positions, M masked positions, V vocabulary.
"""

from pathlib import Path
from typing import Any

import numpy as np

from babybert.data.dataset import open_dataset
from babybert.data.loader import Batch, ordered_batches
from babybert.data.tokenizer import Tokenizer
from babybert.errors import DataError, UsageError
from babybert.export.onnx_folder import GRAPH, INT8_GRAPH, PretrainedGraph
from babybert.progress import Progress
from babybert.tables import format_table

BATCH_SIZE = 32


def int8_report(folder: Path, data: Path, pairs: int) -> str:
    """A table of MLM loss, top-1 and NSP accuracy of both graphs on the first held-out pairs of prepared data.

    Raises UsageError for a classifier, DataError for data with another vocabulary.
    """
    import onnxruntime

    sessions = {name: onnxruntime.InferenceSession(folder / name) for name in (GRAPH, INT8_GRAPH)}
    if len(sessions[GRAPH].get_inputs()) != len(PretrainedGraph.inputs):
        raise UsageError("--data is for pretrained models: score a classifier's int8 graph on labelled texts yourself")
    dataset = open_dataset(data)
    exported = Tokenizer.load(folder / "tokenizer.json")
    if exported.tokens(range(exported.size)) != dataset.tokenizer.tokens(range(dataset.tokenizer.size)):
        raise DataError(f"{data}: has another vocabulary than the model; use the data that it was trained on")
    examples = dataset.examples("validation").first(pairs)
    rows = []
    for name, session in sessions.items():
        with Progress(name, len(examples), "pairs") as progress:
            sums = np.zeros(5)
            for batch in ordered_batches(examples, BATCH_SIZE):
                sums += _score(session, batch)
                progress.advance(len(batch.is_next_B))
        megabytes = (folder / name).stat().st_size / 1e6
        loss, top1, nsp = sums[0] / sums[2], sums[1] / sums[2], sums[3] / sums[4]
        rows.append((name, f"{megabytes:.1f}", f"{loss:.4f}", f"{top1:.2%}", f"{nsp:.2%}"))
    return format_table(("graph", "MB", "MLM loss", "top-1", "NSP accuracy"), rows, text_headers=("graph",))


def _score(session: Any, batch: Batch) -> np.ndarray:
    """Sums of a batch: MLM cross entropy, correct tokens, masked tokens, correct pairs, pairs."""
    ids_BT, labels_BT, segments_BT, is_next_B = (tensor.numpy() for tensor in batch)
    query_M = np.flatnonzero(labels_BT)
    target_M = labels_BT.reshape(-1)[query_M]
    inputs = (ids_BT, np.maximum(segments_BT - 1, 0), query_M)
    mlm_MV, nsp_B2, _ = session.run(None, dict(zip(PretrainedGraph.inputs, inputs, strict=True)))
    largest_M1 = mlm_MV.max(1, keepdims=True)
    log_sum_M = np.log(np.exp(mlm_MV - largest_M1).sum(1)) + largest_M1[:, 0]
    loss = (log_sum_M - mlm_MV[np.arange(len(query_M)), target_M]).sum()
    nsp_correct = ((nsp_B2.argmax(1) == 0) == is_next_B).sum()
    return np.array([loss, (mlm_MV.argmax(1) == target_M).sum(), len(query_M), nsp_correct, len(is_next_B)])
