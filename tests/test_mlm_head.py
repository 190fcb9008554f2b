import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from babybert.model.mlm_head import mlm_head_loss


@settings(max_examples=50, deadline=None)
@given(n=st.integers(0, 9), width=st.integers(1, 12), vocabulary=st.integers(1, 50), scale=st.sampled_from([0.1, 1.0, 30.0]), seed=st.integers(0, 99))
def test_value_and_gradients_equal_a_float64_reference(n, width, vocabulary, scale, seed):
    torch.manual_seed(seed)
    targets = torch.randint(0, vocabulary, (n,))
    inputs = [scale * torch.randn(n, width), torch.randn(vocabulary, width), torch.randn(vocabulary)]
    results = []
    for dtype in (torch.float32, torch.float64):
        hidden, weight, bias = (x.detach().to(dtype, copy=True).requires_grad_() for x in inputs)
        if dtype == torch.float32:
            loss = mlm_head_loss(hidden, weight, bias, targets).loss_sum
        else:
            loss = torch.nn.functional.cross_entropy(hidden @ weight.T + bias, targets, reduction="sum")
        loss.backward()
        results.append([loss.detach(), hidden.grad, weight.grad, bias.grad])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-4, atol=1e-4 * scale)


def test_rank_counts_the_likelier_tokens():
    weight, bias = torch.eye(4), torch.tensor([0.0, 3.0, 2.0, 1.0])
    head = mlm_head_loss(torch.zeros(3, 4), weight, bias, torch.tensor([1, 0, 2]), with_rank=True)
    assert head.rank_N is not None
    assert head.rank_N.tolist() == [0, 3, 1]
    assert head.positions == 3
    assert mlm_head_loss(torch.zeros(3, 4), weight, bias, torch.tensor([1, 0, 2])).rank_N is None


def test_very_large_logits_stay_finite():
    head = mlm_head_loss(torch.full((1, 1), 1e4), torch.tensor([[1.0], [-1.0]]), torch.zeros(2), torch.tensor([1]))
    assert head.loss_sum.item() == pytest.approx(2e4)
