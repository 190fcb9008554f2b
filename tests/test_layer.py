from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from babybert.checkpoint.metrics_log import read_metrics
from babybert.config import ModelConfig
from babybert.data.tokenizer import PAD
from babybert.model.bert import BabyBert
from babybert.model.kernels import Requirements, cpu, cpu_feed_forward, cpu_narrow_head
from babybert.training.train import pretrain

pytestmark = pytest.mark.serial

SIZES: dict[str, dict[str, Any]] = {
    "narrow": {"width": 10, "feed_forward": 300},
    "wide": {"width": 96, "heads": 1, "feed_forward": 64},
    "pre-norm": {"width": 10, "feed_forward": 300, "norm": "pre", "activation": "gelu", "tie_decoder": True},
    "wide pre-norm": {"width": 96, "feed_forward": 64, "norm": "pre", "activation": "gelu"},
}


def ids_with_padding_anywhere() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    ids_BT = torch.randint(5, 90, (4, 23))
    ids_BT[0, 15:], ids_BT[1, 3:9], ids_BT[2, 1:] = PAD, PAD, PAD
    return ids_BT, torch.randint(1, 3, (4, 23)) * (ids_BT != PAD)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("training", [False, True])
def test_packed_tokens_have_the_hidden_states_and_gradients_of_a_padded_batch(sizes: str, training: bool) -> None:
    bert = BabyBert(ModelConfig(vocab_size=90, dropout=0.0, **SIZES[sizes])).train(training)
    ids_BT, segments_BT = ids_with_padding_anywhere()
    results = []
    for kernels in ("auto", "plain"):
        bert.set_kernels(kernels).zero_grad()
        hidden = bert(ids_BT, segments_BT)[ids_BT != PAD]
        if training:
            hidden.square().sum().backward()
        gradients = [parameter.grad.clone() for parameter in bert.parameters() if parameter.grad is not None]
        results.append([hidden.detach(), *gradients])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", SIZES)
def test_hidden_states_at_chosen_positions_are_those_of_all(sizes: str) -> None:
    bert = BabyBert(ModelConfig(vocab_size=90, dropout=0.0, **SIZES[sizes]))
    ids_BT, segments_BT = ids_with_padding_anywhere()
    query_M = (ids_BT.flatten() % 5 == 1).nonzero().squeeze(1)
    hidden_MD = bert(ids_BT, segments_BT).flatten(0, 1)[query_M]
    torch.testing.assert_close(bert.hidden_at(ids_BT, segments_BT, query_M), hidden_MD, rtol=1e-4, atol=1e-5)


def test_dropout_is_a_function_of_the_seed() -> None:
    bert = BabyBert(ModelConfig(vocab_size=90, dropout=0.5, **SIZES["narrow"])).train()
    inputs, hidden = ids_with_padding_anywhere(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        hidden.append(bert(*inputs))
    assert torch.equal(hidden[0], hidden[1])
    assert not torch.equal(hidden[0], hidden[2])


@pytest.mark.parametrize("autocast", [False, True])
def test_every_kernel_is_used_and_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, autocast: bool) -> None:
    bert = BabyBert(ModelConfig(vocab_size=5000, dropout=0.1, **SIZES["narrow"])).train()
    used: list[str] = []
    functions = {
        "attention": cpu.attention.CpuAttention,
        "feed_forward": cpu.feed_forward.CpuFeedForward,
        "dropout": cpu.dropout.CpuDropout,
    }
    for name, function in functions.items():

        def record(*inputs: Any, apply: Any = function.apply, name: str = name) -> Any:
            used.append(name)
            return apply(*inputs)

        monkeypatch.setattr(function, "apply", record)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        bert(*ids_with_padding_anywhere()).float().sum().backward()
    assert used.count("feed_forward") == 2
    if not autocast:
        assert (used.count("attention"), used.count("dropout")) == (2, 7)
    used.clear()
    bert.set_kernels("plain")(*ids_with_padding_anywhere())
    assert not used


@pytest.mark.slow
def test_a_run_with_the_kernels_follows_the_plain_ones_curve(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 steps without dropout, whose masks would differ, with the kernels of all sizes: the demo has 209 words."""

    def on_any_input(hidden: Tensor, weight: Tensor, *rest: Any) -> Requirements:
        return {"at least one row": len(hidden) > 0}

    monkeypatch.setattr(cpu_narrow_head, "requirements", on_any_input)
    monkeypatch.setattr(cpu_feed_forward, "requirements", on_any_input)
    curves = []
    for kernels in ("plain", "auto"):
        config = small(out=tmp_path / kernels, kernels=kernels, max_steps=200, epochs=10, log_every=1)
        pretrain(config)
        lines = [line for line in read_metrics(config.out / "metrics.jsonl") if line["split"] == "train"]
        curves.append([line["mlm_loss"] for line in lines])
    assert len(curves[0]) == 200
    assert curves[0] != curves[1]  # sums in another order: the kernels did run
    assert curves[1] == pytest.approx(curves[0], rel=2e-3)
