import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ONES, dropout_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from babybert.model.kernels import cpu_head, cpu_wide_head
from babybert.model.kernels.cpu_attention import CpuAttention
from babybert.model.kernels.cpu_dropout import CpuDropout
from babybert.model.kernels.cpu_feed_forward import BLOCK as UNITS
from babybert.model.kernels.cpu_feed_forward import CpuFeedForward
from babybert.model.kernels.cpu_head import BLOCK, WIDEST, CpuHeadLoss, supports
from babybert.model.kernels.cpu_math import LANES
from babybert.model.kernels.cpu_wide_head import CpuWideHeadLoss
from babybert.model.mlm_head import plain_head_loss


def gradients(loss_of, inputs, dtype, weight=1.0):
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
    loss = loss_of(*leaves)
    (loss * weight).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


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
def test_values_and_gradients_equal_float64_autograd(n, width, vocabulary, scale, repeated, weight, seed):
    torch.manual_seed(seed)
    targets = torch.randint(0, vocabulary, (n,))
    if repeated and n:
        targets[:] = targets[0]
    inputs = [scale * torch.randn(n, width), torch.randn(vocabulary, width), torch.randn(vocabulary)]
    ours = gradients(lambda h, w, b: CpuHeadLoss.apply(h, w, b, targets, False)[0], inputs, torch.float32, weight)
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


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    n=st.sampled_from([1, 2, 7, 31]),
    width=st.sampled_from([1, 10, 33, 256]),
    vocabulary=st.sampled_from([1, LANES - 1, LANES, 1000, 2 * cpu_wide_head.BLOCK + 17]),
    chunk=st.sampled_from([1, 5000, 2**24]),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_the_wide_head_equals_float64_autograd_and_counts_what_is_likelier(n, width, vocabulary, chunk, scale, seed):
    torch.manual_seed(seed)
    targets = torch.randint(0, vocabulary, (n,))
    inputs = [scale * torch.randn(n, width), torch.randn(vocabulary, width) / width**0.5, torch.randn(vocabulary)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_wide_head, "CHUNK", chunk)
        ours = gradients(lambda h, w, b: CpuWideHeadLoss.apply(h, w, b, targets, True)[0], inputs, torch.float32, -0.3)
        ranks = CpuWideHeadLoss.apply(*inputs, targets, False)[1]
        rows = cpu_wide_head.mlm_head_token_losses(*inputs, targets)
    reference = gradients(
        lambda h, w, b: F.cross_entropy(h @ w.T + b, targets, reduction="sum"), inputs, torch.float64, -0.3
    )
    for one, other, floor in zip(ours, reference, (1.0, 1.0, scale, 1.0), strict=True):
        assert torch.isfinite(one).all()
        assert float((one.double() - other).abs().max()) <= 1e-5 * max(float(other.abs().max()), floor) * max(
            1.0, 4 * scale / 30
        )
    assert ranks.tolist() == rows[1].tolist() == plain_head_loss(*inputs, targets, True).rank_N.tolist()
    assert float(rows[0].double().sum()) == pytest.approx(float(reference[0]), rel=1e-5, abs=1e-4)


def test_the_wide_head_is_taken_where_it_is_made_for():
    hidden, weight = torch.zeros(1, 64), torch.zeros(5000, 64)
    assert cpu_wide_head.supports(hidden, weight)
    assert not cpu_wide_head.supports(hidden, weight[:100])
    assert not cpu_wide_head.supports(hidden[:0], weight)
    assert not cpu_wide_head.supports(hidden.bfloat16(), weight)
    with torch.autocast("cpu"):
        assert not cpu_wide_head.supports(hidden, weight)


def test_hidden_states_in_bf16_have_gradients_in_bf16():
    torch.manual_seed(0)
    hidden, weight, bias, targets = (
        torch.randn(31, 10).bfloat16(),
        torch.randn(5000, 10),
        torch.randn(5000),
        torch.randint(0, 5000, (31,)),
    )
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    loss = CpuHeadLoss.apply(*leaves, targets, False)[0]
    loss.backward()
    reference = gradients(
        lambda h, w, b: F.cross_entropy(h @ w.T + b, targets, reduction="sum"), [hidden, weight, bias], torch.float64
    )
    assert leaves[0].grad.dtype == torch.bfloat16
    for one, other in zip([loss.detach(), *(leaf.grad for leaf in leaves)], reference, strict=True):
        assert float((one.double() - other).norm() / other.norm()) < 1e-2


def test_ranks_are_those_of_the_plain_form():
    torch.manual_seed(0)
    hidden, weight, bias, targets = (
        torch.randn(40, 10),
        torch.randn(5000, 10),
        torch.randn(5000),
        torch.randint(0, 5000, (40,)),
    )
    assert (
        CpuHeadLoss.apply(hidden, weight, bias, targets, True)[1].tolist()
        == plain_head_loss(hidden, weight, bias, targets, True).rank_N.tolist()
    )


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
    one, other = (
        gradients(lambda h, w, b: CpuHeadLoss.apply(h, w, b, targets, False)[0], inputs, torch.float32)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_kernels_are_taken_where_they_are_made_for():
    def taken(n, width, vocabulary, dtype=torch.float32):
        return supports(torch.zeros(n, width), torch.zeros(vocabulary, width, dtype=dtype))

    assert taken(1, 10, 16 * BLOCK)
    assert not taken(0, 10, 16 * BLOCK)
    assert not taken(1, WIDEST + 1, 16 * BLOCK)
    assert not taken(1, 10, 200)
    assert not taken(1, 10, 16 * BLOCK, torch.float64)


def test_logits_far_above_the_targets_go_another_way_to_the_same_loss(monkeypatch):
    torch.manual_seed(0)
    hidden, weight, bias, targets = (
        torch.randn(9, 10),
        torch.randn(2000, 10),
        torch.randn(2000),
        torch.randint(0, 2000, (9,)),
    )
    bias[7] = 100.0  # of every position, so all are done again, but for the one whose target it is
    targets[3] = 7
    again = []
    log_sums = cpu_head._log_sums
    monkeypatch.setattr(cpu_head, "_log_sums", lambda h, *rest: again.append(len(h)) or log_sums(h, *rest))
    ours = CpuHeadLoss.apply(hidden, weight, bias, targets, False)[0]
    assert again == [8]
    assert float(ours) == pytest.approx(
        float(F.cross_entropy((hidden @ weight.T + bias).double(), targets, reduction="sum")), rel=1e-6
    )


@pytest.mark.parametrize("head", [CpuHeadLoss, CpuWideHeadLoss])
def test_nan_is_not_hidden(head):
    hidden, weight, bias = torch.randn(3, 10), torch.randn(2000, 10), torch.randn(2000)
    hidden[1, 2] = torch.nan
    assert head.apply(hidden, weight, bias, torch.tensor([1, 2, 3]), False)[0].isnan()


def assert_close(ours, reference, tolerance):
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
    drop=st.sampled_from([0.0, 0.1, 0.5]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_the_feed_forward_equals_float64_autograd_with_the_same_mask(n, width, units, drop, dtype, seed):
    torch.manual_seed(seed)
    # Eighths and odd 128ths: what goes into the relu is exact, and never 0.
    x, weight1 = torch.randint(-8, 9, (n, width)) / 8, torch.randint(-8, 9, (units, width)) / 8
    bias1 = (2 * torch.randint(-64, 64, (units,)) + 1) / 128
    inputs, seed_2 = [x, weight1, bias1, torch.randn(width, units), torch.randn(width)], torch.randint(0, 2**32, (2,))
    d_y, kept = torch.randn(n, width).bfloat16(), dropout_mask(n, units, drop, seed_2)

    def run(function, leaves):
        y = function(*leaves)
        y.backward(d_y.to(y.dtype))
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    ours = run(
        lambda *leaves: CpuFeedForward.apply(*leaves, drop, seed_2),
        [inputs[0].to(dtype).requires_grad_(), *(w.clone().requires_grad_() for w in inputs[1:])],
    )
    reference = run(
        lambda x, w1, b1, w2, b2: (torch.relu(x @ w1.T + b1) * kept / (1 - drop)) @ w2.T + b2,
        [x.detach().double().requires_grad_() for x in inputs],
    )
    assert_close(ours, reference, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    heads=st.sampled_from([1, 2, 3]),
    head_width=st.sampled_from([1, 5]),
    drop=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 99),
)
def test_attention_equals_float64_autograd_with_the_same_mask(lengths, heads, head_width, drop, seed):
    torch.manual_seed(seed)
    offsets, width = torch.tensor([0, *np.cumsum(lengths)]), heads * head_width
    qkv, d_out, seed_2 = (
        torch.randn(sum(lengths), 3 * width),
        torch.randn(sum(lengths), width),
        torch.randint(0, 2**32, (2,)),
    )
    kept = dropout_mask(sum(lengths) * heads, max(lengths), drop, seed_2).view(sum(lengths), heads, -1)

    def plain(x):
        out = []
        for first, end in itertools.pairwise(offsets.tolist()):
            q, k, v = x[first:end].unflatten(1, (3, heads, head_width)).permute(1, 2, 0, 3)
            weights = (
                (q @ k.transpose(1, 2) / head_width**0.5).softmax(-1)
                * kept[first:end, :, : end - first].transpose(0, 1)
                / (1 - drop)
            )
            out.append((weights @ v).transpose(0, 1).flatten(1))
        return torch.cat(out)

    results = []
    for function, leaf in (
        (lambda x: CpuAttention.apply(x, offsets, heads, drop, seed_2), qkv.clone()),
        (plain, qkv.double()),
    ):
        out = function(leaf.requires_grad_())
        out.backward(d_out.to(out.dtype))
        results.append([out.detach(), leaf.grad])
    assert_close(*results, 1e-5)


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_backward_keeps_the_same(drop):
    x, seed_2 = torch.ones(300, 7, 50, requires_grad=True), torch.tensor([7, ONES])
    y = CpuDropout.apply(x, drop, seed_2)
    y.backward(torch.ones_like(y))
    assert torch.equal(y, x.grad)
    assert torch.equal(y.detach().view(-1, 50) > 0, dropout_mask(2100, 50, drop, seed_2))
    assert float(y.detach().max()) == pytest.approx(1 / (1 - drop))
    assert float((y > 0).double().mean()) == pytest.approx(1 - drop, abs=4 * (drop * (1 - drop) / y.numel()) ** 0.5)
    # Neighbours, and masks of two seeds, agree as often as independent ones.
    one, other = (
        dropout_mask(500, 2000, drop, torch.tensor([7, 8])),
        dropout_mask(500, 2000, drop, torch.tensor([7, 9])),
    )
    agree = drop**2 + (1 - drop) ** 2
    for a, b in ((one[1:], one[:-1]), (one[:, 1:], one[:, :-1]), (one, other)):
        assert float((a == b).double().mean()) == pytest.approx(agree, abs=5 * (agree * (1 - agree) / a.numel()) ** 0.5)


PLAIN_MACHINE = """
import torch
from numba.core.config import CPU_NAME
from babybert.config import ModelConfig
from babybert.model.bert import BabyBert
from babybert.model.loss import PretrainingModel
torch.manual_seed(0)
model = PretrainingModel(BabyBert(ModelConfig(vocab_size=5000, dropout=0.0, feed_forward=64)))
ids = torch.randint(5, 5000, (2, 9))
for kernels in ("auto", "plain"):
    model.bert.set_kernels(kernels)
    print(CPU_NAME, float(model(ids, ids * (ids % 3 == 0), torch.ones_like(ids), torch.tensor([0, 1]))["mlm_sum"]))
"""


@pytest.mark.slow
def test_they_run_on_a_machine_without_avx_and_are_compiled_once(tmp_path):
    """numba compiles for a processor that is named; this one has SSE2 only."""
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-c", PLAIN_MACHINE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (name, ours), (_, plain) = (line.split() for line in done.stdout.splitlines())
    assert name == "generic"
    assert float(ours) == pytest.approx(float(plain), rel=1e-5)
    compiled = sorted(path.name for path in tmp_path.rglob("*.nbc"))
    assert compiled
    subprocess.run([sys.executable, "-c", PLAIN_MACHINE], env=environment, check=True, capture_output=True)
    assert sorted(path.name for path in tmp_path.rglob("*.nbc")) == compiled  # the second process compiles nothing


MANY_THREADS = """
import torch
from babybert.config import ModelConfig
from babybert.model.bert import BabyBert
from babybert.model.kernels.cpu_math import threads_for
from babybert.model.loss import PretrainingModel
for threads in (1, 64):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = PretrainingModel(BabyBert(ModelConfig(vocab_size=300_000)))
    ids = torch.randint(5, 5000, (70, 20))
    totals = model(ids, ids * (ids % 7 == 0), torch.ones_like(ids), torch.arange(70) % 2)
    (totals["mlm_sum"] + totals["nsp_sum"]).sum().backward()
    gradients = [float(parameter.grad.norm()) for parameter in model.parameters()]
    print(torch.get_num_threads(), threads_for(1400, 16), float(totals["mlm_sum"]), *gradients)
"""


@pytest.mark.slow
def test_sixty_four_threads_compute_what_one_does():
    """More than there are cores here, but shares, sums over threads and masks are those of a large machine."""
    done = subprocess.run(
        [sys.executable, "-c", MANY_THREADS],
        env={**os.environ, "NUMBA_NUM_THREADS": "64"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    alone, together = ([float(word) for word in line.split()] for line in done.stdout.splitlines())
    assert (alone[:2], together[:2]) == ([1, 1], [64, 64])  # and torch's own number is as it was set
    assert together[2:] == pytest.approx(alone[2:], rel=1e-4, abs=1e-6)


WIDE = """
import numba
from numba.core.codegen import get_host_cpu_features
from babybert.model.kernels import cpu_math
expected = None
if "+avx512f" in get_host_cpu_features().split(","):
    expected = get_host_cpu_features() + ",-prefer-256-bit"
assert numba.config.CPU_FEATURES == expected, numba.config.CPU_FEATURES
"""


@pytest.mark.slow
def test_vectors_are_as_wide_as_the_processor_has_them_unless_told():
    told = {**os.environ, "NUMBA_CPU_FEATURES": "+avx2"}
    untold = {name: value for name, value in os.environ.items() if name != "NUMBA_CPU_FEATURES"}
    subprocess.run([sys.executable, "-c", WIDE], env=untold, check=True)
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import numba, babybert.model.kernels.cpu_math; assert numba.config.CPU_FEATURES == '+avx2'",
        ],
        env=told,
        check=True,
    )


@pytest.mark.slow
def test_waiting_threads_spin_for_a_short_time_unless_told_otherwise():
    untold = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    for environment, expected in ((untold, "10000"), ({**untold, "GOMP_SPINCOUNT": "7"}, "7")):
        spoken = {**environment, "OMP_DISPLAY_ENV": "verbose"}
        shown = subprocess.run(
            [sys.executable, "-c", "import babybert, torch"], env=spoken, check=True, capture_output=True, text=True
        ).stderr
        assert f"GOMP_SPINCOUNT = '{expected}'" in shown
