import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from babybert.model import mlm_head
from babybert.model.mlm_head import mlm_head_loss, plain_head_loss


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(0, 9),
    width=st.integers(1, 12),
    vocabulary=st.integers(1, 50),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 99),
    kernels=st.sampled_from(["auto", "plain"]),
)
def test_value_and_gradients_equal_a_float64_reference(n, width, vocabulary, scale, seed, kernels):
    torch.manual_seed(seed)
    targets = torch.randint(0, vocabulary, (n,))
    inputs = [scale * torch.randn(n, width), torch.randn(vocabulary, width), torch.randn(vocabulary)]
    results = []
    for dtype in (torch.float32, torch.float64):
        hidden, weight, bias = (x.detach().to(dtype, copy=True).requires_grad_() for x in inputs)
        if dtype == torch.float32:
            loss = mlm_head_loss(hidden, weight, bias, targets, kernels=kernels).loss_sum
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


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("chunk", [1, 130, 2**24])
def test_rows_without_a_target_take_no_part_whatever_the_chunk(kernels, chunk, monkeypatch):
    monkeypatch.setattr(mlm_head, "CHUNK", chunk)
    torch.manual_seed(0)
    inputs, targets = [torch.randn(7, 6), torch.randn(50, 6), torch.randn(50)], torch.tensor([3, -1, 3, 49, -1, 0, 7])
    results = []
    for rows in (slice(None), targets >= 0):
        leaves = [x.clone().requires_grad_() for x in inputs]
        head = mlm_head_loss(
            leaves[0][rows], *leaves[1:], targets[rows], True, kernels if isinstance(rows, slice) else "plain"
        )
        (0.3 * head.loss_sum).backward()
        results.append([head.loss_sum.detach(), head.positions, *(leaf.grad for leaf in leaves)])
        ranks = (
            head.rank_N
            if isinstance(rows, slice)
            else torch.zeros(7, dtype=torch.int64).masked_scatter(rows, head.rank_N)
        )
        results[-1].append(ranks)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert results[0][1] == 5


def test_without_gradients_none_are_made():
    with torch.no_grad():
        loss = mlm_head_loss(
            torch.randn(3, 2), torch.randn(9, 2, requires_grad=True), torch.zeros(9), torch.tensor([1, 2, 3])
        ).loss_sum
    assert not loss.requires_grad
    assert (
        plain_head_loss(
            torch.randn(0, 2), torch.randn(9, 2), torch.zeros(9), torch.empty(0, dtype=torch.int64)
        ).loss_sum
        == 0
    )


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize(
    ("vocabulary", "width"), [(50, 6), (5000, 6), (5000, 40)]
)  # the plain form, and the CPU's kernels
def test_row_losses_add_up_to_the_loss(kernels, vocabulary, width, monkeypatch):
    monkeypatch.setattr(mlm_head, "CHUNK", 7 * vocabulary)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((40, width), (vocabulary, width), (vocabulary,))
    )
    targets = torch.randint(vocabulary, (40,), generator=generator)
    loss_N, rank_N = mlm_head.mlm_head_token_losses(hidden, weight, bias, targets, kernels)
    logits = (hidden.double() @ weight.double().T) + bias
    assert loss_N.double() == pytest.approx(F.cross_entropy(logits, targets, reduction="none"), rel=1e-4, abs=1e-5)
    assert rank_N.tolist() == (logits > logits.gather(1, targets[:, None])).sum(1).tolist()
    assert [len(x) for x in mlm_head.mlm_head_token_losses(hidden[:0], weight, bias, targets[:0], kernels)] == [0, 0]
