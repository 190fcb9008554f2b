import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ONES, dropout_mask, gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from babybert.model import plain_ops
from babybert.model.kernels import cpu_attention, cpu_feed_forward, cpu_narrow_head, cpu_wide_head
from babybert.model.kernels.cpu_attention import CpuAttention
from babybert.model.kernels.cpu_dropout import CpuDropout
from babybert.model.kernels.cpu_feed_forward import BLOCK as UNITS
from babybert.model.kernels.cpu_feed_forward import CpuFeedForward
from babybert.model.kernels.cpu_math import LANES
from babybert.model.kernels.cpu_narrow_head import BLOCK, WIDEST, CpuNarrowHeadLoss
from babybert.model.kernels.cpu_wide_head import CpuWideHeadLoss

pytestmark = [pytest.mark.serial, pytest.mark.no_cover]  # tracing makes numba's compiler several times slower


def gradients(
    loss_of: Callable[..., Tensor], inputs: Iterable[Tensor], dtype: torch.dtype, weight: float = 1.0
) -> list[Tensor]:
    """The loss, and its gradients by the inputs, times `weight`."""
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
    loss = loss_of(*leaves)
    (loss * weight).backward()
    return [loss.detach(), *(gradient(leaf) for leaf in leaves)]


def plain_ranks(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    ranks = plain_ops.mlm_head_loss(hidden, weight, bias, targets, with_rank=True).rank_N
    assert ranks is not None
    return ranks


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    n=st.sampled_from([0, 1, 2, 7, 31]),
    width=st.sampled_from([1, 10, WIDEST]),
    vocabulary=st.sampled_from([1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 1000, 3 * BLOCK + 17]),
    scale=st.sampled_from([0.01, 1.0, 30.0, 1000.0]),
    repeated=st.booleans(),
    weight=st.sampled_from([1.0, -0.3]),
    seed=st.integers(0, 99),
)
def test_the_narrow_head_equals_float64_autograd(
    n: int, width: int, vocabulary: int, scale: float, repeated: bool, weight: float, seed: int
) -> None:
    torch.manual_seed(seed)
    targets = torch.randint(0, vocabulary, (n,))
    if repeated and n:
        targets[:] = targets[0]
    inputs = [scale * torch.randn(n, width), torch.randn(vocabulary, width), torch.randn(vocabulary)]
    ours = gradients(lambda h, w, b: CpuNarrowHeadLoss.apply(h, w, b, targets, False)[0], inputs, torch.float32, weight)
    reference = gradients(
        lambda h, w, b: torch.nn.functional.cross_entropy(h @ w.T + b, targets, reduction="sum"),
        inputs,
        torch.float64,
        weight,
    )
    # A logit of size L is rounded to L x 6e-8, and its exponential to as much relatively.
    logits = max(1.0, (scale * width**0.5) * 4)
    floors = (1.0, 1.0, scale, 1.0)  # a gradient near zero is a difference of numbers of about this size
    for one, other, floor in zip(ours, reference, floors, strict=True):
        size = max(float(other.abs().max()) if other.numel() else 0.0, floor)
        assert torch.isfinite(one).all()
        assert float((one.double() - other).abs().max() if other.numel() else 0) <= 1e-5 * size * max(1.0, logits / 30)


@settings(max_examples=40, deadline=None)
@given(
    n=st.sampled_from([1, 2, 7, 31]),
    width=st.sampled_from([1, 10, 33, 256]),
    vocabulary=st.sampled_from([1, LANES - 1, LANES, 1000, 2 * cpu_wide_head.BLOCK + 17]),
    chunk=st.sampled_from([1, 5000, 2**24]),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_the_wide_head_equals_float64_autograd_and_counts_likelier_tokens(
    n: int, width: int, vocabulary: int, chunk: int, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    targets = torch.randint(0, vocabulary, (n,))
    hidden, weight, bias = (
        scale * torch.randn(n, width),
        torch.randn(vocabulary, width) / width**0.5,
        torch.randn(vocabulary),
    )
    inputs = [hidden, weight, bias]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_wide_head, "CHUNK", chunk)
        ours = gradients(lambda h, w, b: CpuWideHeadLoss.apply(h, w, b, targets, True)[0], inputs, torch.float32, -0.3)
        ranks = CpuWideHeadLoss.apply(*inputs, targets, False)[1]
        token_losses, token_ranks = cpu_wide_head.token_losses(hidden, weight, bias, targets)
    reference = gradients(
        lambda h, w, b: F.cross_entropy(h @ w.T + b, targets, reduction="sum"), inputs, torch.float64, -0.3
    )
    for one, other, floor in zip(ours, reference, (1.0, 1.0, scale, 1.0), strict=True):
        assert torch.isfinite(one).all()
        assert float((one.double() - other).abs().max()) <= 1e-5 * max(float(other.abs().max()), floor) * max(
            1.0, 4 * scale / 30
        )
    assert ranks.tolist() == token_ranks.tolist() == plain_ranks(hidden, weight, bias, targets).tolist()
    assert float(token_losses.double().sum()) == pytest.approx(float(reference[0]), rel=1e-5, abs=1e-4)


def test_the_wide_heads_requirements() -> None:
    def supports(hidden: Tensor, weight: Tensor) -> bool:
        return all(cpu_wide_head.requirements(hidden, weight).values())

    hidden, weight = torch.zeros(1, 64), torch.zeros(5000, 64)
    assert supports(hidden, weight)
    assert not supports(hidden, weight[:100])
    assert not supports(hidden[:0], weight)
    assert not supports(hidden.bfloat16(), weight)
    with torch.autocast("cpu"):
        assert not supports(hidden, weight)


def test_hidden_states_in_bf16_have_gradients_in_bf16() -> None:
    torch.manual_seed(0)
    hidden, weight, bias, targets = (
        torch.randn(31, 10).bfloat16(),
        torch.randn(5000, 10),
        torch.randn(5000),
        torch.randint(0, 5000, (31,)),
    )
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    loss = CpuNarrowHeadLoss.apply(*leaves, targets, False)[0]
    loss.backward()
    reference = gradients(
        lambda h, w, b: F.cross_entropy(h @ w.T + b, targets, reduction="sum"), [hidden, weight, bias], torch.float64
    )
    assert gradient(leaves[0]).dtype == torch.bfloat16
    for one, other in zip([loss.detach(), *(gradient(leaf) for leaf in leaves)], reference, strict=True):
        assert float((one.double() - other).norm() / other.norm()) < 1e-2


@pytest.mark.slow
def test_ranks_are_those_of_the_plain_form() -> None:
    torch.manual_seed(0)
    hidden, weight, bias, targets = (
        torch.randn(40, 10),
        torch.randn(5000, 10),
        torch.randn(5000),
        torch.randint(0, 5000, (40,)),
    )
    assert (
        CpuNarrowHeadLoss.apply(hidden, weight, bias, targets, True)[1].tolist()
        == plain_ranks(hidden, weight, bias, targets).tolist()
    )


def test_a_target_is_never_above_itself() -> None:
    torch.manual_seed(1)
    weight, bias = torch.randn(5000, 10), torch.zeros(5000)
    for _ in range(20):
        hidden = torch.randn(8, 10)
        best = (hidden @ weight.T + bias).argmax(1)
        assert CpuNarrowHeadLoss.apply(hidden, weight, bias, best, True)[1].tolist() == [0] * 8


def test_the_same_input_has_the_same_bits() -> None:
    torch.manual_seed(0)
    inputs, targets = [torch.randn(33, 10), torch.randn(9999, 10), torch.randn(9999)], torch.randint(0, 9999, (33,))
    one, other = (
        gradients(lambda h, w, b: CpuNarrowHeadLoss.apply(h, w, b, targets, False)[0], inputs, torch.float32)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_narrow_heads_requirements() -> None:
    def supports(n: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> bool:
        weight = torch.zeros(vocabulary, width, dtype=dtype)
        return all(cpu_narrow_head.requirements(torch.zeros(n, width), weight).values())

    assert supports(1, 10, 16 * BLOCK)
    assert not supports(0, 10, 16 * BLOCK)
    assert not supports(1, WIDEST + 1, 16 * BLOCK)
    assert not supports(1, 10, 200)
    assert not supports(1, 10, 16 * BLOCK, torch.float64)


def test_the_requirements_of_attention_and_feed_forward() -> None:
    def attention(width: int, dropout_p: float, dtype: torch.dtype = torch.float32) -> bool:
        return all(cpu_attention.requirements(torch.zeros(3, 3 * width, dtype=dtype), 1, dropout_p).values())

    def feed_forward(width: int, dropout_p: float, dtype: torch.dtype = torch.float32) -> bool:
        weight = torch.zeros(9, width, dtype=dtype)
        return all(cpu_feed_forward.requirements(torch.zeros(3, width), weight, dropout_p).values())

    for supports in (attention, feed_forward):
        assert supports(10, 0.0)
        assert supports(32, 0.1)
        assert not supports(32, 0.0)
        assert not supports(64, 0.1)
        assert not supports(10, 0.0, torch.float64)


def test_logits_far_above_the_targets_go_another_way_to_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, weight, bias, targets = (
        torch.randn(9, 10),
        torch.randn(2000, 10),
        torch.randn(2000),
        torch.randint(0, 2000, (9,)),
    )
    bias[7] = 100.0  # of every position, so all are done again, but for the one whose target it is
    targets[3] = 7
    again: list[int] = []
    log_sums = cpu_narrow_head._online_log_sums

    def record(hidden: np.ndarray, *rest: Any) -> Any:
        again.append(len(hidden))
        return log_sums(hidden, *rest)

    monkeypatch.setattr(cpu_narrow_head, "_online_log_sums", record)
    ours = CpuNarrowHeadLoss.apply(hidden, weight, bias, targets, False)[0]
    assert again == [8]
    assert float(ours) == pytest.approx(
        float(F.cross_entropy((hidden @ weight.T + bias).double(), targets, reduction="sum")), rel=1e-6
    )


@pytest.mark.parametrize("head", [CpuNarrowHeadLoss, CpuWideHeadLoss])
def test_nan_is_not_hidden(head: Any) -> None:
    hidden, weight, bias = torch.randn(3, 10), torch.randn(2000, 10), torch.randn(2000)
    hidden[1, 2] = torch.nan
    assert head.apply(hidden, weight, bias, torch.tensor([1, 2, 3]), False)[0].isnan()


def assert_close(ours: Iterable[Tensor], reference: Iterable[Tensor], tolerance: float) -> None:
    for one, other in zip(ours, reference, strict=True):
        assert one.shape == other.shape
        size = max([1.0, *other.abs().flatten().tolist()])
        assert float((one.double() - other).abs().max()) <= tolerance * size


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    n=st.sampled_from([1, 2, 7, 64, 129]),
    width=st.sampled_from([1, 10]),
    units=st.sampled_from([1, UNITS - 1, UNITS, 2 * UNITS + 1]),
    dropout_p=st.sampled_from([0.0, 0.1, 0.5]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_the_feed_forward_equals_float64_autograd_with_the_same_mask(
    n: int, width: int, units: int, dropout_p: float, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    # Eighths and odd 128ths: what goes into the relu is exact, and never 0.
    x, weight1 = torch.randint(-8, 9, (n, width)) / 8, torch.randint(-8, 9, (units, width)) / 8
    bias1 = (2 * torch.randint(-64, 64, (units,)) + 1) / 128
    inputs, seed_2 = [x, weight1, bias1, torch.randn(width, units), torch.randn(width)], torch.randint(0, 2**32, (2,))
    d_y, kept = torch.randn(n, width).bfloat16(), dropout_mask(n, units, dropout_p, seed_2)

    def run(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
        y = function(*leaves)
        y.backward(d_y.to(y.dtype))
        return [y.detach(), *(gradient(leaf) for leaf in leaves)]

    ours = run(
        lambda *leaves: CpuFeedForward.apply(*leaves, dropout_p, seed_2),
        [inputs[0].to(dtype).requires_grad_(), *(w.clone().requires_grad_() for w in inputs[1:])],
    )
    reference = run(
        lambda x, w1, b1, w2, b2: (torch.relu(x @ w1.T + b1) * kept / (1 - dropout_p)) @ w2.T + b2,
        [x.detach().double().requires_grad_() for x in inputs],
    )
    assert_close(ours, reference, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_feed_forward_leaves_its_inputs_as_they_are(rows: int) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(rows, 8), torch.randn(16, 8), torch.randn(16), torch.randn(8, 16), torch.randn(8)]
    before = [tensor.clone() for tensor in inputs]
    y = CpuFeedForward.apply(*inputs, 0.0, torch.zeros(2, dtype=torch.int64))
    assert all(torch.equal(*pair) for pair in zip(inputs, before, strict=True))
    assert torch.equal(y, CpuFeedForward.apply(*inputs, 0.0, torch.zeros(2, dtype=torch.int64)))


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    heads=st.sampled_from([1, 2, 3]),
    head_width=st.sampled_from([1, 5]),
    dropout_p=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 99),
)
def test_attention_equals_float64_autograd_with_the_same_mask(
    lengths: list[int], heads: int, head_width: int, dropout_p: float, seed: int
) -> None:
    torch.manual_seed(seed)
    cu_seqlens, width = torch.tensor([0, *np.cumsum(lengths)]), heads * head_width
    qkv, d_out, seed_2 = (
        torch.randn(sum(lengths), 3 * width),
        torch.randn(sum(lengths), width),
        torch.randint(0, 2**32, (2,)),
    )
    kept = dropout_mask(sum(lengths) * heads, max(lengths), dropout_p, seed_2).view(sum(lengths), heads, -1)

    def plain(x: Tensor) -> Tensor:
        out = []
        for first, end in itertools.pairwise(cu_seqlens.tolist()):
            q, k, v = x[first:end].unflatten(1, (3, heads, head_width)).permute(1, 2, 0, 3)
            weights = (
                (q @ k.transpose(1, 2) / head_width**0.5).softmax(-1)
                * kept[first:end, :, : end - first].transpose(0, 1)
                / (1 - dropout_p)
            )
            out.append((weights @ v).transpose(0, 1).flatten(1))
        return torch.cat(out)

    results = []
    for function, leaf in (
        (lambda x: CpuAttention.apply(x, cu_seqlens, heads, dropout_p, seed_2), qkv.clone()),
        (plain, qkv.double()),
    ):
        out = function(leaf.requires_grad_())
        out.backward(d_out.to(out.dtype))
        results.append([out.detach(), gradient(leaf)])
    ours, reference = results
    assert_close(ours, reference, 1e-5)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_backward_keeps_the_same(dropout_p: float) -> None:
    x, seed_2 = torch.ones(300, 7, 50, requires_grad=True), torch.tensor([7, ONES])
    y = CpuDropout.apply(x, dropout_p, seed_2)
    y.backward(torch.ones_like(y))
    assert torch.equal(y, gradient(x))
    assert torch.equal(y.detach().view(-1, 50) > 0, dropout_mask(2100, 50, dropout_p, seed_2))
    assert float(y.detach().max()) == pytest.approx(1 / (1 - dropout_p))
    assert float((y > 0).double().mean()) == pytest.approx(
        1 - dropout_p, abs=4 * (dropout_p * (1 - dropout_p) / y.numel()) ** 0.5
    )
    # Neighbours, and masks of two seeds, agree as often as independent ones.
    one, other = (
        dropout_mask(500, 2000, dropout_p, torch.tensor([7, 8])),
        dropout_mask(500, 2000, dropout_p, torch.tensor([7, 9])),
    )
    agree = dropout_p**2 + (1 - dropout_p) ** 2
    for a, b in ((one[1:], one[:-1]), (one[:, 1:], one[:, :-1]), (one, other)):
        assert float((a == b).double().mean()) == pytest.approx(agree, abs=5 * (agree * (1 - agree) / a.numel()) ** 0.5)
