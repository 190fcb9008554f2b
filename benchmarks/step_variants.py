"""The training steps that pretrain.py compares: the reference's loop, Hugging Face's model, plain PyTorch, and ours."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import TrainingStep, new_model, preset_config
from torch import Tensor

from babybert.config import ModelConfig, model_config
from babybert.data.dataset import Dataset
from babybert.data.loader import Batch, Loader
from babybert.model.bert import BabyBert

VARIANTS = {
    "reference": "logits at every position, eager, Adam",
    "hugging face": "BertForPreTraining of the same sizes, with its own loss",
    "hugging face bf16": "the same under bf16 autocast",
    "plain": "logits at the masked positions only, PyTorch's operations",
    "plain bf16": "the same under bf16 autocast",
    "compiled": "the same through torch.compile",
    "ours": "the step of `babybert pretrain`",
}
Step = Callable[[Batch], Any]


def truncated_batches(dataset: Dataset, batch_size: int, positions: int) -> Iterator[Batch]:
    """Endless batches, cut to `positions`. Pairs are not sorted by length, because the peers do not do that either."""
    loader = Loader(dataset.examples("train"), batch_size, 0, bucketing=False)
    for epoch in itertools.count():
        for batch in loader.epoch(epoch):
            yield Batch(*(tensor[:, :positions] if tensor.dim() == 2 else tensor for tensor in batch))


def make_step(variant: str, dataset: Dataset, data: Path, preset: str, device: torch.device) -> Step:
    """A function that runs one training step of a variant: forward, backward, clipping, optimizer."""
    kernels, precision = ("auto", "auto") if variant == "ours" else ("plain", "fp32")
    if variant.endswith("bf16") or (device.type == "cuda" and variant != "reference"):
        precision = "bf16"
    config = preset_config(data, preset, device=device.type, kernels=kernels, precision=precision)
    torch.manual_seed(0)
    if variant.startswith("hugging face"):
        model = hugging_face_model(dataset.tokenizer.size, preset).to(device)
        return hugging_face_step(model, device, variant.endswith("bf16"))
    bert = new_model(config, dataset).to(device)
    if variant == "reference":
        return reference_step(bert)[0]
    step = TrainingStep.of(bert, config, device)
    if variant == "compiled":
        step.model.compile(dynamic=True)  # batches differ in length and in masked positions
    return step


def _update(loss: Tensor, parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def reference_step(bert: BabyBert) -> tuple[Step, torch.optim.Optimizer]:
    """The reference's step and its optimizer: logits at every position, of which the cross entropy ignores most."""
    optimizer = torch.optim.Adam(bert.parameters(), lr=5e-5, weight_decay=0.01)
    mlm_criterion = torch.nn.CrossEntropyLoss(ignore_index=0)
    nsp_criterion = torch.nn.CrossEntropyLoss()

    def step(batch: Batch) -> None:
        hidden_BTD = bert(batch.ids_BT, batch.segments_BT)
        logits_BTV = bert.mlm_logits(hidden_BTD)
        mlm_loss = mlm_criterion(logits_BTV.view(-1, logits_BTV.shape[-1]), batch.labels_BT.reshape(-1))
        nsp_loss = nsp_criterion(bert.nsp_logits(hidden_BTD), batch.is_next_B)
        _update(mlm_loss + nsp_loss, list(bert.parameters()), optimizer)

    return step, optimizer


def hugging_face_model(vocab_size: int, preset: str) -> Any:
    """`BertForPreTraining` with a preset's sizes."""
    return hugging_face_model_of(model_config(preset, vocab_size))


def hugging_face_model_of(sizes: ModelConfig) -> Any:
    """`BertForPreTraining` of these sizes; its layers are always post-norm."""
    from transformers import BertConfig, BertForPreTraining

    config = BertConfig(
        vocab_size=sizes.vocab_size,
        type_vocab_size=3,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.feed_forward,
        hidden_act=sizes.activation,
        hidden_dropout_prob=sizes.dropout,
        attention_probs_dropout_prob=sizes.dropout,
    )
    return BertForPreTraining(config)


def hugging_face_inputs(batch: Batch) -> dict[str, Tensor]:
    """A batch as keyword arguments of Hugging Face's model."""
    return {
        "input_ids": batch.ids_BT,
        "token_type_ids": batch.segments_BT,
        "attention_mask": (batch.ids_BT > 0).long(),
        "labels": torch.where(batch.labels_BT > 0, batch.labels_BT, -100),
        "next_sentence_label": 1 - batch.is_next_B,  # Hugging Face uses 0 for "B follows A", we use 1
    }


def hugging_face_step(model: Any, device: torch.device, bf16: bool) -> Step:
    """The step of a model of Hugging Face, with its own loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)

    def step(batch: Batch) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = model(**hugging_face_inputs(batch)).loss
        _update(loss, list(model.parameters()), optimizer)

    return step
