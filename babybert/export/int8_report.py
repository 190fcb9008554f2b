"""What int8 weights cost: a model in fp32 and with int8 weights, scored on the same held-out pairs.

Shapes: B pairs, T positions, M masked positions, V vocabulary.
"""

import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from babybert.checkpoint.model_files import MODEL_FILES, load_encoder
from babybert.data.dataset import Dataset, open_dataset
from babybert.data.loader import Batch, ordered_batches
from babybert.data.tokenizer import Tokenizer
from babybert.errors import DataError, UsageError
from babybert.export.onnx_folder import GRAPH, INT8_GRAPH
from babybert.export.onnx_graphs import PretrainedGraph
from babybert.model.bert import BabyBert
from babybert.progress import Progress
from babybert.serving.int8_encoder import INT8_ENCODER, Int8Encoder
from babybert.tables import format_table

BATCH_SIZE = 32
ONLY_PRETRAINED = "--data is for pretrained models: score a classifier with int8 weights on labelled texts yourself"
Answer = tuple[np.ndarray, np.ndarray]  # MLM logits (M, V); NSP logits (B, 2), class 1 is "B follows A"
Answerer = Callable[[Batch], Answer]


def graph_report(folder: Path, data: Path, pairs: int) -> str:
    """A table of MLM loss, top-1 and NSP accuracy of both graphs of an export, on held-out pairs of prepared data.

    Raises UsageError for a classifier, DataError for data with another vocabulary.
    """
    import onnxruntime

    sessions = {name: onnxruntime.InferenceSession(folder / name) for name in (GRAPH, INT8_GRAPH)}
    if len(sessions[GRAPH].get_inputs()) != len(PretrainedGraph.inputs):
        raise UsageError(ONLY_PRETRAINED)
    dataset = _open_data(data, Tokenizer.load(folder / "tokenizer.json"))
    answerers = {name: _graph_answerer(session) for name, session in sessions.items()}
    return _table(answerers, {name: folder / name for name in sessions}, dataset, pairs)


def data_of_checkpoint(checkpoint: Path, data: Path) -> Dataset:
    """Prepared data for `archive_report`. Raises UsageError, DataError as `graph_report` does."""
    model, tokenizer = load_encoder(checkpoint)
    if not isinstance(model, BabyBert):
        raise UsageError(ONLY_PRETRAINED)
    return _open_data(data, tokenizer)


def archive_report(archive: Path, dataset: Dataset, pairs: int) -> str:
    """The same table for a server's archive with int8 weights: its model in fp32, and as the server computes it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with zipfile.ZipFile(archive) as files:
            files.extractall(folder, (*MODEL_FILES, INT8_ENCODER))
        model, _ = load_encoder(folder)
        assert isinstance(model, BabyBert)
        model.set_kernels("plain").eval()
        answerers = {
            "fp32": _model_answerer(model, model.hidden_at),
            "int8": _model_answerer(model, Int8Encoder(folder / INT8_ENCODER, model).hidden_at),
        }
        files_of = {"fp32": folder / MODEL_FILES[0], "int8": folder / INT8_ENCODER}
        return _table(answerers, files_of, dataset, pairs)


def _open_data(data: Path, tokenizer: Tokenizer) -> Dataset:
    dataset = open_dataset(data)
    if tokenizer.tokens(range(tokenizer.size)) != dataset.tokenizer.tokens(range(dataset.tokenizer.size)):
        raise DataError(f"{data}: has another vocabulary than the model; use the data that it was trained on")
    return dataset


def _graph_answerer(session: Any) -> Answerer:
    def answer(batch: Batch) -> Answer:
        ids_BT, labels_BT, segments_BT, _ = (tensor.numpy() for tensor in batch)
        inputs = (ids_BT, np.maximum(segments_BT - 1, 0), np.flatnonzero(labels_BT))
        mlm_MV, nsp_B2, _ = session.run(None, dict(zip(PretrainedGraph.inputs, inputs, strict=True)))
        return mlm_MV, nsp_B2[:, ::-1]

    return answer


def _model_answerer(model: BabyBert, hidden_at: Callable[..., torch.Tensor]) -> Answerer:
    @torch.inference_mode()
    def answer(batch: Batch) -> Answer:
        ids_BT, labels_BT, segments_BT, is_next_B = batch
        masked_M = labels_BT.flatten().nonzero().squeeze(1)
        first_B = torch.arange(len(is_next_B)) * ids_BT.shape[1]
        hidden_MD = hidden_at(ids_BT, segments_BT, torch.cat((masked_M, first_B)))
        mlm_MV = model.mlm_logits(hidden_MD[: len(masked_M)])
        return mlm_MV.numpy(), model.nsp_logits(hidden_MD[len(masked_M) :, None]).numpy()

    return answer


def _table(answerers: dict[str, Answerer], files: dict[str, Path], dataset: Dataset, pairs: int) -> str:
    examples = dataset.examples("validation").first(pairs)
    rows = []
    for name, answer in answerers.items():
        with Progress(name, len(examples), "pairs") as progress:
            sums = np.zeros(5)
            for batch in ordered_batches(examples, BATCH_SIZE):
                sums += _score(batch, *answer(batch))
                progress.advance(len(batch.is_next_B))
        megabytes = files[name].stat().st_size / 1e6
        loss, top1, nsp = sums[0] / sums[2], sums[1] / sums[2], sums[3] / sums[4]
        rows.append((name, f"{megabytes:.1f}", f"{loss:.4f}", f"{top1:.2%}", f"{nsp:.2%}"))
    return format_table(("weights", "MB", "MLM loss", "top-1", "NSP accuracy"), rows, text_headers=("weights",))


def _score(batch: Batch, mlm_MV: np.ndarray, nsp_B2: np.ndarray) -> np.ndarray:
    """Sums of a batch: MLM cross entropy, correct tokens, masked tokens, correct pairs, pairs."""
    labels, is_next_B = batch.labels_BT.numpy().reshape(-1), batch.is_next_B.numpy()
    target_M = labels[np.flatnonzero(labels)]
    largest_M1 = mlm_MV.max(1, keepdims=True)
    log_sum_M = np.log(np.exp(mlm_MV - largest_M1).sum(1)) + largest_M1[:, 0]
    loss = (log_sum_M - mlm_MV[np.arange(len(target_M)), target_M]).sum()
    nsp_correct = (nsp_B2.argmax(1) == is_next_B).sum()
    return np.array([loss, (mlm_MV.argmax(1) == target_M).sum(), len(target_M), nsp_correct, len(is_next_B)])
