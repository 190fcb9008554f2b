"""The Triton kernels. Without a GPU they run in Triton's interpreter, to be chosen before Triton is imported."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ONES, dropout_mask, gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

CUDA = torch.cuda.is_available()


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[None]:
    with interpreter():
        yield


@contextmanager
def interpreter() -> Iterator[None]:
    """For this module alone: commands that other tests start must not be interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        if not CUDA:
            patch.setenv("TRITON_INTERPRET", "1")
        yield


with interpreter():
    pytest.importorskip("triton")
    from babybert.model.kernels import triton_common
    from babybert.model.kernels.triton_common import BLOCK, WIDEST, requirements
    from babybert.model.kernels.triton_feed_forward import TritonFeedForward
    from babybert.model.kernels.triton_head import TritonHeadLoss

DEVICE = "cuda" if CUDA else "cpu"
FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
a_few = settings(max_examples=25, deadline=None, derandomize=True)
programs = st.sampled_from([1, 5, 512])  # 1: a sum is one loop over all blocks; 512: a split for each block


def gradients(
    function: Callable[..., Tensor], inputs: list[Tensor], d_output: Tensor, split: int = 512
) -> list[Tensor]:
    """The function's value and the gradients of all inputs, in float64 on the CPU, and their types."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_common, "PROGRAMS", split)
        value = function(*leaves)
        value.backward(d_output.to(value))
    assert [gradient(leaf).dtype for leaf in leaves] == [x.dtype for x in inputs]
    return [x.detach().cpu().double() for x in (value, *(gradient(leaf) for leaf in leaves))]


def assert_close(
    ours: Iterable[Tensor], reference: Iterable[Tensor], tolerance: float, floors: Iterable[float]
) -> None:
    """Relative to the largest number of each tensor, or to its floor: numbers near zero are differences of such."""
    for one, other, floor in zip(ours, reference, floors, strict=True):
        assert one.shape == other.shape
        assert torch.isfinite(one).all()
        size = max([floor, *other.abs().flatten().tolist()])
        assert max([0.0, *(one - other).abs().flatten().tolist()]) <= tolerance * size


def head_case(
    n: int, width: int, vocabulary: int, scale: float, repeated: bool, seed: int
) -> tuple[list[Tensor], Tensor]:
    """Hidden states, table and bias, and targets, about a third of which are missing."""
    torch.manual_seed(seed)
    targets = torch.randint(0, vocabulary, (n,))
    if repeated and n:
        targets[:] = targets[0]
    targets[torch.rand(n) < 0.3] = -1
    inputs = [scale * torch.randn(n, width), torch.randn(vocabulary, width), torch.randn(vocabulary)]
    return [x.to(DEVICE) for x in inputs], targets.to(DEVICE)


def head(inputs: list[Tensor], targets: Tensor, d_loss: float, split: int = 512) -> list[Tensor]:
    return gradients(
        lambda h, w, b: TritonHeadLoss.apply(h, w, b, targets, False)[0], inputs, torch.tensor(d_loss), split
    )


def head_in_float64(inputs: list[Tensor], targets: Tensor, d_loss: float) -> list[Tensor]:
    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(h @ w.T + b, targets, reduction="sum", ignore_index=-1)

    return gradients(loss, [x.double() for x in inputs], torch.tensor(d_loss))


@a_few
@given(
    n=st.sampled_from([0, 1, 7, BLOCK + 1]),
    width=st.sampled_from([1, 10, 17, 64, 256]),
    vocabulary=st.sampled_from([1, 2, BLOCK - 1, BLOCK, 2 * BLOCK + 1, 301]),
    scale=st.sampled_from([0.01, 1.0, 30.0, 1000.0]),
    repeated=st.booleans(),
    d_loss=st.sampled_from([1.0, -0.3]),
    split=programs,
    seed=st.integers(0, 99),
)
@pytest.mark.slow
def test_the_head_equals_float64_autograd(
    n: int, width: int, vocabulary: int, scale: float, repeated: bool, d_loss: float, split: int, seed: int
) -> None:
    inputs, targets = head_case(n, width, vocabulary, scale, repeated, seed)
    # A logit of size L is rounded to L x 6e-8, and its exponential to as much relatively.
    logits = max(1.0, scale * width**0.5 * 4)
    tolerance = 1e-5 * max(1.0, logits / 30)
    assert_close(
        head(inputs, targets, d_loss, split),
        head_in_float64(inputs, targets, d_loss),
        tolerance,
        (1.0, 1.0, scale, 1.0),
    )


@a_few
@given(
    n=st.sampled_from([1, 7, BLOCK + 1]),
    width=st.sampled_from([1, 10, 64]),
    vocabulary=st.sampled_from([2, 2 * BLOCK + 1, 301]),
    scale=st.sampled_from([0.01, 1.0, 3.0]),
    weight_dtype=st.sampled_from([FP32, BF16]),
    split=programs,
    seed=st.integers(0, 99),
)
@pytest.mark.slow
def test_the_head_in_bf16_equals_float64_autograd_of_the_rounded_numbers(
    n: int, width: int, vocabulary: int, scale: float, weight_dtype: torch.dtype, split: int, seed: int
) -> None:
    (hidden, weight, bias), targets = head_case(n, width, vocabulary, scale, False, seed)
    inputs = [hidden.to(BF16), weight.to(BF16).to(weight_dtype), bias.to(weight_dtype)]
    assert_close(
        head(inputs, targets, -0.3, split), head_in_float64(inputs, targets, -0.3), 1e-2, (1.0, 1.0, scale, 1.0)
    )


def test_a_table_in_fp32_is_rounded_to_the_hidden_states_bf16() -> None:
    (hidden, weight, bias), targets = head_case(9, 10, 200, 1.0, False, 0)
    mixed, rounded = (head([hidden.to(BF16), table, bias], targets, 1.0) for table in (weight, weight.to(BF16).float()))
    assert all(torch.equal(one, other) for one, other in zip(mixed, rounded, strict=True))


@a_few
@given(
    n=st.sampled_from([0, 1, BLOCK + 1]),
    width=st.sampled_from([1, 10, 100]),
    vocabulary=st.sampled_from([1, BLOCK, 301]),
    split=programs,
    seed=st.integers(0, 99),
)
@pytest.mark.slow
def test_ranks_are_the_plain_count(n: int, width: int, vocabulary: int, split: int, seed: int) -> None:
    torch.manual_seed(seed)
    hidden, weight, bias = (
        torch.randint(-2, 3, shape).float() for shape in ((n, width), (vocabulary, width), (vocabulary,))
    )
    targets = torch.randint(-1, vocabulary, (n,))
    logits = hidden @ weight.T + bias  # of small whole numbers: exact in any order, and with many ties
    expected = torch.where(targets >= 0, (logits > logits.gather(1, targets.clamp(min=0)[:, None])).sum(1), 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_common, "PROGRAMS", split)
        _, ranks = TritonHeadLoss.apply(*(x.to(DEVICE) for x in (hidden, weight, bias, targets)), True)
    assert ranks.dtype == torch.int64 and not ranks.requires_grad
    assert ranks.tolist() == expected.tolist()


def test_a_target_is_never_above_itself() -> None:
    torch.manual_seed(1)
    weight, bias = torch.randn(1000, 10, device=DEVICE), torch.zeros(1000, device=DEVICE)
    for _ in range(5):
        hidden = torch.randn(8, 10, device=DEVICE)
        best = (hidden @ weight.T + bias).argmax(1)
        assert TritonHeadLoss.apply(hidden, weight, bias, best, True)[1].tolist() == [0] * 8


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("used", [0, 1])
def test_rows_without_a_target_are_not_read(used: int, dtype: torch.dtype) -> None:
    (hidden, weight, bias), targets = head_case(BLOCK + 9, 10, 200, 1.0, False, 0)
    targets[:], hidden[used:] = -1, float("nan")
    targets[:used] = 5
    loss, d_hidden, d_weight, d_bias = head([hidden.to(dtype), weight, bias], targets, 2.0)
    assert all(x.isfinite().all() for x in (loss, d_hidden, d_weight, d_bias))
    assert not d_hidden[used:].any()
    assert [bool(x.any()) for x in (loss, d_hidden, d_weight, d_bias)] == [bool(used)] * 4
    _, ranks = TritonHeadLoss.apply(hidden.to(dtype), weight, bias, targets, True)
    assert not ranks[used:].any()


def test_nan_is_not_hidden() -> None:
    (hidden, weight, bias), targets = head_case(5, 10, 100, 1.0, False, 0)
    targets[2], hidden[2, 3] = 1, float("nan")
    assert head([hidden, weight, bias], targets, 1.0)[0].isnan()
    inputs, seed = feed_forward_case(5, 10, 70, FP32, FP32, 0)
    inputs[0][2, 3] = float("nan")
    assert TritonFeedForward.apply(*inputs, 0.0, seed).isnan().any(1).tolist() == [False, False, True, False, False]


def test_gradients_are_those_that_are_asked_for() -> None:
    inputs, targets = head_case(9, 10, 100, 1.0, False, 0)
    _, *all_of_them = head(inputs, targets, 1.0)
    for wanted in range(3):
        leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
        TritonHeadLoss.apply(*leaves, targets, False)[0].backward()
        assert torch.equal(gradient(leaves[wanted]).cpu().double(), all_of_them[wanted])


def feed_forward_case(
    n: int, width: int, units: int, x_dtype: torch.dtype, weight_dtype: torch.dtype, seed: int
) -> tuple[list[Tensor], Tensor]:
    """Eighths and odd 128ths: what goes into the relu is exact, and never 0."""
    torch.manual_seed(seed)
    x, weight1 = torch.randint(-8, 9, (n, width)) / 8, torch.randint(-8, 9, (units, width)) / 8
    bias1 = (2 * torch.randint(-64, 64, (units,)) + 1) / 128
    weights = weight1, bias1, torch.randn(width, units).to(BF16), torch.randn(width).to(BF16)
    seed_2 = torch.randint(0, 2**32, (2,))
    return [x.to(DEVICE, x_dtype), *(w.to(DEVICE, weight_dtype) for w in weights)], seed_2.to(DEVICE)


def feed_forward_in_float64(inputs: list[Tensor], d_y: Tensor, dropout_p: float, kept: Tensor) -> list[Tensor]:
    def plain(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        return (torch.relu(x @ weight1.T + bias1) * kept / (1 - dropout_p)) @ weight2.T + bias2

    return gradients(plain, [x.cpu().double() for x in inputs], d_y)


@pytest.mark.slow
@a_few
@given(
    n=st.sampled_from([0, 1, 7, 2 * BLOCK + 1]),
    width=st.sampled_from([1, 10, 64, 100, 256]),
    units=st.sampled_from([1, BLOCK - 1, BLOCK, 2 * BLOCK + 1]),
    dropout_p=st.sampled_from([0.0, 0.1, 0.5]),
    dtypes=st.sampled_from([(FP32, FP32), (FP32, FP32), (BF16, FP32), (BF16, BF16)]),
    split=programs,
    seed=st.integers(0, 99),
)
def test_the_feed_forward_equals_float64_autograd_with_the_same_mask(
    n: int,
    width: int,
    units: int,
    dropout_p: float,
    dtypes: tuple[torch.dtype, torch.dtype],
    split: int,
    seed: int,
) -> None:
    inputs, seed_2 = feed_forward_case(n, width, units, *dtypes, seed)
    d_y = torch.randn(n, width).to(BF16)
    kept = dropout_mask(n, units, dropout_p, seed_2)
    ours = gradients(lambda *leaves: TritonFeedForward.apply(*leaves, dropout_p, seed_2), inputs, d_y.to(DEVICE), split)
    assert_close(
        ours, feed_forward_in_float64(inputs, d_y, dropout_p, kept), 1e-5 if dtypes[0] == FP32 else 1e-2, [1.0] * 6
    )


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_of_units(dropout_p: float) -> None:
    inputs = [torch.zeros(BLOCK, 1), torch.zeros(1000, 1), torch.ones(1000), torch.ones(1, 1000), torch.zeros(1)]
    y = TritonFeedForward.apply(*(x.to(DEVICE) for x in inputs), dropout_p, torch.tensor([7, ONES], device=DEVICE))
    count = BLOCK * 1000
    assert float(y.double().sum()) * (1 - dropout_p) / count == pytest.approx(
        1 - dropout_p, abs=4 * (dropout_p * (1 - dropout_p) / count) ** 0.5
    )
    # Neighbours, and masks of two seeds, agree as often as independent ones.
    one, other = (
        dropout_mask(500, 2000, dropout_p, torch.tensor([7, 8])),
        dropout_mask(500, 2000, dropout_p, torch.tensor([7, 9])),
    )
    agree = dropout_p**2 + (1 - dropout_p) ** 2
    for a, b in ((one[1:], one[:-1]), (one[:, 1:], one[:, :-1]), (one, other)):
        assert float((a == b).double().mean()) == pytest.approx(agree, abs=5 * (agree * (1 - agree) / a.numel()) ** 0.5)


def test_the_same_input_has_the_same_bits() -> None:
    inputs, targets = head_case(33, 10, 300, 1.0, True, 0)
    assert all(torch.equal(a, b) for a, b in zip(head(inputs, targets, 1.0), head(inputs, targets, 1.0), strict=True))
    inputs, seed = feed_forward_case(100, 10, 70, FP32, FP32, 0)
    d_y = torch.randn(100, 10, device=DEVICE)
    one, other = (gradients(lambda *leaves: TritonFeedForward.apply(*leaves, 0.1, seed), inputs, d_y) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_requirements() -> None:
    def supports(width: int, dtype: torch.dtype = FP32) -> bool:
        x, weight = torch.zeros(3, width, dtype=dtype, device=DEVICE), torch.zeros(5, width, device=DEVICE)
        return all(requirements(x, weight).values())

    assert supports(10)
    assert supports(WIDEST, BF16)
    assert not supports(WIDEST + 1)
    assert not supports(10, FP64)
    assert not supports(10, torch.float16)


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_nothing_waits_for_the_gpu() -> None:
    inputs, targets = head_case(33, 10, 300, 1.0, False, 0)
    layer, seed = feed_forward_case(33, 10, 70, FP32, FP32, 0)
    leaves = [x.requires_grad_() for x in (*inputs, *layer)]
    for mode in ("default", "error"):  # compiled first
        torch.cuda.set_sync_debug_mode(mode)
        try:
            (
                TritonHeadLoss.apply(*leaves[:3], targets, True)[0]
                + TritonFeedForward.apply(*leaves[3:], 0.1, seed).sum()
            ).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from babybert.model.kernels import triton_feed_forward as ff
from babybert.model.kernels import triton_head as head
from babybert.model.kernels.triton_common import block_sizes

KERNELS = (
    head._head_forward,
    head._head_backward,
    ff._feed_forward,
    ff._feed_forward_d_x,
    ff._feed_forward_d_weights,
)
TYPES = {"N": "i32", "V": "i32", "span": "i32", "target_N": "*i64", "seed_2": "*i64", "rank_SN": "*i32"}
NARROW = ("hidden_ND", "weight_VD", "x_ND", "weight1_FD", "weight2_DF", "d_y_ND")
for kernel in KERNELS:
    for narrow in ("*fp32", "*bf16"):
        sizes = block_sizes(10) | {"F": 2048, "DROP": 429496730}
        constants = {name: sizes[name] for name in kernel.arg_names if name in sizes}
        types = {
            name: "constexpr" if name in constants else TYPES.get(name, narrow if name in NARROW else "*fp32")
            for name in kernel.arg_names
        }
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if types[name].startswith("*")}
        source = ASTSource(kernel, types, constants, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": sizes["num_warps"]})
        assert compiled.asm["cubin"] and compiled.metadata.shared <= 227 * 1024, (kernel, narrow)
"""


@pytest.mark.slow
def test_the_kernels_compile_for_an_h100(tmp_path: Path) -> None:
    """Triton brings its assembler: this needs no GPU. The interpreter accepts much that the compiler does not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    job = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert job.returncode == 0, job.stderr
