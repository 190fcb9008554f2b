import logging
import sys

import pytest
import torch

from babybert.checkpoint.metrics_log import read_metrics
from babybert.config import ModelConfig
from babybert.data.tokenizer import PAD
from babybert.model import kernels
from babybert.model.bert import BabyBert
from babybert.model.kernels import cpu_attention, cpu_feed_forward, cpu_head
from babybert.model.mlm_head import mlm_head_loss, plain_head_loss
from babybert.training.train import pretrain

SIZES = {"narrow": {"width": 10, "feed_forward": 300}, "wide": {"width": 96, "heads": 1, "feed_forward": 64}}


def ids_with_padding_anywhere():
    torch.manual_seed(0)
    ids_BT = torch.randint(5, 90, (4, 23))
    ids_BT[0, 15:], ids_BT[1, 3:9], ids_BT[2, 1:] = PAD, PAD, PAD
    return ids_BT, torch.randint(1, 3, (4, 23)) * (ids_BT != PAD)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("training", [False, True])
def test_without_padding_the_hidden_states_and_gradients_are_the_same(sizes, training):
    bert = BabyBert(ModelConfig(vocab_size=90, dropout=0.0, **SIZES[sizes])).train(training)
    ids_BT, segments_BT = ids_with_padding_anywhere()
    real_BT, found = ids_BT != PAD, []
    for choice in ("auto", "plain"):
        bert.set_kernels(choice).zero_grad()
        hidden = bert(ids_BT, segments_BT)[real_BT]
        hidden.square().sum().backward() if training else None
        found.append([hidden.detach(), *(p.grad.clone() for p in bert.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_dropout_is_a_function_of_the_seed():
    bert = BabyBert(ModelConfig(vocab_size=90, dropout=0.5, **SIZES["narrow"])).train()
    inputs, hidden = ids_with_padding_anywhere(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        hidden.append(bert(*inputs))
    assert torch.equal(hidden[0], hidden[1])
    assert not torch.equal(hidden[0], hidden[2])


@pytest.mark.parametrize("autocast", [False, True])
def test_every_dropout_and_kernel_is_used_and_can_be_turned_off(monkeypatch, autocast):
    bert = BabyBert(ModelConfig(vocab_size=5000, dropout=0.1, **SIZES["narrow"])).train()
    used = []
    for name, module in (("attention", "CpuAttention"), ("feed_forward", "CpuFeedForward"), ("dropout", "CpuDropout")):
        owner = getattr(kernels.cpu_kernels(torch.device("cpu")), name)
        apply = getattr(owner, module).apply
        monkeypatch.setattr(
            getattr(owner, module), "apply", lambda *inputs, apply=apply, name=name: used.append(name) or apply(*inputs)
        )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        bert(*ids_with_padding_anywhere()).float().sum().backward()
    assert used.count("feed_forward") == 2
    assert autocast or (used.count("attention"), used.count("dropout")) == (2, 7)
    used.clear()
    bert.set_kernels("plain")(*ids_with_padding_anywhere())
    assert not used


def test_without_numba_everything_runs_in_pytorch_and_it_is_said_once(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "babybert.model.kernels.cpu", None)
    monkeypatch.delattr("babybert.model.kernels.cpu")
    kernels._load.cache_clear()
    hidden, weight, bias, targets = torch.randn(3, 4), torch.randn(5000, 4), torch.randn(5000), torch.tensor([1, 2, 3])
    bert = BabyBert(ModelConfig(vocab_size=90, **SIZES["narrow"])).train()
    with caplog.at_level(logging.WARNING):
        losses = [mlm_head_loss(hidden, weight, bias, targets).loss_sum for _ in range(2)]
        assert torch.isfinite(bert(*ids_with_padding_anywhere())).all()
    assert float(losses[0]) == pytest.approx(float(plain_head_loss(hidden, weight, bias, targets).loss_sum))
    assert len([record for record in caplog.records if "no CPU kernels" in record.message]) == 1
    kernels._load.cache_clear()


def test_a_run_with_the_kernels_follows_the_plain_ones_curve(small, tmp_path, monkeypatch):
    """200 steps without dropout, whose masks would differ; with thresholds low enough for the demo's 209 words."""
    monkeypatch.setattr(cpu_head, "takes", lambda hidden, weight: len(hidden) > 0)
    monkeypatch.setattr(cpu_feed_forward, "takes", lambda x, weight, drop: True)
    curves = []
    for choice in ("plain", "auto"):
        config = small(out=tmp_path / choice, kernels=choice, max_steps=200, epochs=10, log_every=1)
        pretrain(config)
        curves.append(
            [line["mlm_loss"] for line in read_metrics(config.out / "metrics.jsonl") if line["split"] == "train"]
        )
    assert len(curves[0]) == 200
    assert curves[0] != curves[1]  # another order of summing: the kernels did run
    assert curves[1] == pytest.approx(curves[0], rel=2e-3)


def test_kernels_are_taken_where_they_are_faster():
    def attends(width, drop, dtype=torch.float32):
        return cpu_attention.supports(torch.zeros(3, 3 * width, dtype=dtype), 1, drop)

    def feeds(width, drop, dtype=torch.float32):
        return cpu_feed_forward.supports(torch.zeros(3, width), torch.zeros(9, width, dtype=dtype), drop)

    for supports in (attends, feeds):
        assert supports(10, 0.0) and supports(32, 0.1)
        assert not supports(32, 0.0) and not supports(64, 0.1) and not supports(10, 0.0, torch.float64)
