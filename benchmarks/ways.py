"""The training steps that `pretrain.py` compares: the reference's loop, Hugging Face's model, plain PyTorch, and ours."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from babybert.config import PRESETS, PretrainConfig
from babybert.data.dataset import Dataset
from babybert.data.loader import Batch, Loader
from babybert.model.loss import PretrainingModel
from babybert.training.distributed import DistributedContext, backward
from babybert.training.train import load_or_create, make_optimizer

WAYS = {
    "reference": "logits at every position, eager, Adam",
    "hugging face": "BertForPreTraining of the same sizes, with its own loss",
    "plain": "masked positions only, PyTorch's own operations",
    "compiled": "the same through torch.compile",
    "ours": "what `babybert pretrain` does",
}
Step = Callable[[Batch], Any]


def batches_of(dataset: Dataset, batch_size: int, positions: int) -> Iterator[Batch]:
    """Batches cut to so many positions; of pairs in no order of length, as all of the peers have them."""
    loader = Loader(dataset.examples("train"), batch_size, 0, bucketing=False)
    for epoch in range(10**6):
        for batch in loader.epoch(epoch):
            yield Batch(*(tensor[:, :positions] if tensor.dim() == 2 else tensor for tensor in batch))


def make_step(way: str, dataset: Dataset, data: Path, preset: str, device: torch.device) -> Step:
    """A function that takes one training step of this way: forward, backward, clipping, optimizer."""
    config = PretrainConfig(
        data=data, preset=preset, device=device.type, metrics=False, kernels="auto" if way == "ours" else "plain"
    )  # type: ignore[arg-type]
    torch.manual_seed(0)
    if way == "hugging face":
        return _hugging_face(dataset.tokenizer.size, preset, device)
    bert = load_or_create(config, dataset, dataset.token_counts(), None).set_kernels(config.kernels).to(device)
    if way == "reference":
        return reference(bert)[0]
    parallel = DistributedContext("single", device, bf16=device.type == "cuda")
    model: torch.nn.Module = PretrainingModel(bert)
    if way == "compiled":
        model.compile(dynamic=True)  # batches differ in length and in masked positions
    optimizer = make_optimizer(bert, config)

    def step(batch: Batch) -> None:
        backward(model, batch, parallel)
        torch.nn.utils.clip_grad_norm_(bert.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _finish(loss: Tensor, parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def reference(bert: Any) -> tuple[Step, torch.optim.Optimizer]:
    """Logits at every position, and the cross entropy told to ignore most of them; the step and its optimizer."""
    optimizer = torch.optim.Adam(bert.parameters(), lr=5e-5, weight_decay=0.01)
    mlm, nsp = torch.nn.CrossEntropyLoss(ignore_index=0), torch.nn.CrossEntropyLoss()

    def step(batch: Batch) -> None:
        hidden = bert(batch.ids_BT, batch.segments_BT)
        logits = bert.mlm_logits(hidden)
        loss = mlm(logits.view(-1, logits.shape[-1]), batch.labels_BT.reshape(-1)) + nsp(
            bert.nsp_logits(hidden), batch.is_next_B
        )
        _finish(loss, list(bert.parameters()), optimizer)

    return step, optimizer


def hugging_face(vocab_size: int, preset: str) -> Any:
    """`BertForPreTraining` of a preset's sizes."""
    from transformers import BertConfig, BertForPreTraining

    own = PRESETS[preset]
    sizes = {
        "hidden_size": own["width"],
        "num_hidden_layers": own["layers"],
        "num_attention_heads": own["heads"],
        "intermediate_size": own["feed_forward"],
    }
    return BertForPreTraining(BertConfig(vocab_size=vocab_size, type_vocab_size=3, **sizes))


def hugging_face_inputs(batch: Batch) -> dict[str, Tensor]:
    """A batch in its names and with its labels."""
    return {
        "input_ids": batch.ids_BT,
        "token_type_ids": batch.segments_BT,
        "attention_mask": (batch.ids_BT > 0).long(),
        "labels": torch.where(batch.labels_BT > 0, batch.labels_BT, -100),
        "next_sentence_label": 1 - batch.is_next_B,  # its 0 is our 1
    }


def _hugging_face(vocab_size: int, preset: str, device: torch.device) -> Step:
    model = hugging_face(vocab_size, preset).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)

    def step(batch: Batch) -> None:
        _finish(model(**hugging_face_inputs(batch)).loss, list(model.parameters()), optimizer)

    return step
