import logging
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from babybert.model import mlm_head
from babybert.model.cpu_kernels import BLOCK, WIDEST, CpuHeadLoss, takes
from babybert.model.mlm_head import mlm_head_loss, plain_head_loss
from babybert.training.metrics import read_metrics
from babybert.training.trainer import pretrain


def gradients(loss_of, inputs, dtype, weight=1.0):
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
    loss = loss_of(*leaves)
    (loss * weight).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@settings(max_examples=60, deadline=None)
@given(
    n=st.sampled_from([0, 1, 2, 7, 31]),
    width=st.sampled_from([1, 10, 17, WIDEST]),
    vocabulary=st.sampled_from([1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 1000, 3 * BLOCK + 17]),
    scale=st.sampled_from([0.01, 1.0, 30.0, 1000.0]),
    repeated=st.booleans(),
    weight=st.sampled_from([1.0, -0.3]),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_equal_float64_autograd(n, width, vocabulary, scale, repeated, weight, seed):
    torch.manual_seed(seed)
    targets = torch.randint(0, vocabulary, (n,))
    if repeated and n:
        targets[:] = targets[0]
    inputs = [scale * torch.randn(n, width), torch.randn(vocabulary, width), torch.randn(vocabulary)]
    ours = gradients(lambda h, w, b: CpuHeadLoss.apply(h, w, b, targets, False)[0], inputs, torch.float32, weight)
    reference = gradients(lambda h, w, b: torch.nn.functional.cross_entropy(h @ w.T + b, targets, reduction="sum"), inputs, torch.float64, weight)
    # A logit of size L is rounded to L x 6e-8, and its exponential to as much relatively.
    logits = max(1.0, (scale * width**0.5) * 4)
    floors = (1.0, 1.0, scale, 1.0)  # a gradient near zero is a difference of numbers of about this size
    for one, other, floor in zip(ours, reference, floors, strict=True):
        size = max(float(other.abs().max()) if other.numel() else 0.0, floor)
        assert torch.isfinite(one).all()
        assert float((one.double() - other).abs().max() if other.numel() else 0) <= 1e-5 * size * max(1.0, logits / 30)


def test_ranks_are_those_of_the_plain_form():
    torch.manual_seed(0)
    hidden, weight, bias, targets = torch.randn(40, 10), torch.randn(5000, 10), torch.randn(5000), torch.randint(0, 5000, (40,))
    assert CpuHeadLoss.apply(hidden, weight, bias, targets, True)[1].tolist() == plain_head_loss(hidden, weight, bias, targets, True).rank_N.tolist()


def test_a_target_is_never_above_itself():
    torch.manual_seed(1)
    weight, bias = torch.randn(5000, 10), torch.zeros(5000)
    for _ in range(20):
        hidden = torch.randn(8, 10)
        best = (hidden @ weight.T + bias).argmax(1)
        assert CpuHeadLoss.apply(hidden, weight, bias, best, True)[1].tolist() == [0] * 8


def test_the_same_input_has_the_same_bits():
    torch.manual_seed(0)
    inputs, targets = [torch.randn(33, 10), torch.randn(9999, 10), torch.randn(9999)], torch.randint(0, 9999, (33,))
    one, other = (gradients(lambda h, w, b: CpuHeadLoss.apply(h, w, b, targets, False)[0], inputs, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_kernels_are_taken_where_they_are_made_for():
    def taken(n, width, vocabulary, dtype=torch.float32):
        return takes(torch.zeros(n, width), torch.zeros(vocabulary, width, dtype=dtype))

    assert taken(1, 10, 16 * BLOCK)
    assert not taken(0, 10, 16 * BLOCK)
    assert not taken(1, WIDEST + 1, 16 * BLOCK)
    assert not taken(1, 10, 200)
    assert not taken(1, 10, 16 * BLOCK, torch.float64)


def test_without_numba_the_plain_form_is_used_and_said_once(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "babybert.model.cpu_kernels", None)
    monkeypatch.delattr("babybert.model.cpu_kernels")
    mlm_head._cpu_kernels.cache_clear()
    hidden, weight, bias, targets = torch.randn(3, 4), torch.randn(5000, 4), torch.randn(5000), torch.tensor([1, 2, 3])
    with caplog.at_level(logging.WARNING):
        losses = [mlm_head_loss(hidden, weight, bias, targets).loss_sum for _ in range(2)]
    assert losses[0] == plain_head_loss(hidden, weight, bias, targets).loss_sum
    assert len([record for record in caplog.records if "no CPU kernels" in record.message]) == 1
    mlm_head._cpu_kernels.cache_clear()


def test_a_run_with_the_kernels_follows_the_plain_ones_curve(small, tmp_path, monkeypatch):
    """200 steps, with a threshold low enough for the demo's 209 words."""
    monkeypatch.setattr("babybert.model.cpu_kernels.takes", lambda hidden, weight: len(hidden) > 0)
    curves = []
    for head in ("plain", "auto"):
        config = small(out=tmp_path / head, mlm_head=head, max_steps=200, epochs=10, log_every=1)
        pretrain(config)
        curves.append([line["mlm_loss"] for line in read_metrics(config.out / "metrics.jsonl") if line["split"] == "train"])
    assert len(curves[0]) == 200
    assert curves[0] != curves[1]  # another order of summing: the kernels did run
    assert curves[1] == pytest.approx(curves[0], rel=2e-3)
