import importlib.util
import logging
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import babybert
from babybert.config import PRESETS, ModelConfig
from babybert.data.tokenizer import PAD
from babybert.errors import UsageError
from babybert.model import kernels, ops, ops_table, plain_ops, triton_policy
from babybert.model.bert import BabyBert
from babybert.model.packing import PackedBatch

KERNELS = pytest.mark.parametrize("kernels", ["auto", "plain"])
CPU = torch.device("cpu")


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel modules cannot be imported, as where numba is not installed."""
    for name in ("cpu", "cpu_top_tokens"):
        monkeypatch.setitem(sys.modules, f"babybert.model.kernels.{name}", None)
        monkeypatch.delattr(kernels, name, raising=False)
    ops._load_cpu_kernels.cache_clear()
    yield
    ops._load_cpu_kernels.cache_clear()


# The vocabulary head


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(0, 9),
    width=st.integers(1, 12),
    vocabulary=st.integers(1, 50),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 99),
    kernels=st.sampled_from(["auto", "plain"]),
)
def test_head_value_and_gradients_equal_a_float64_reference(
    n: int, width: int, vocabulary: int, scale: float, seed: int, kernels: ops.Kernels
) -> None:
    torch.manual_seed(seed)
    targets = torch.randint(0, vocabulary, (n,))
    inputs = [scale * torch.randn(n, width), torch.randn(vocabulary, width), torch.randn(vocabulary)]
    results = []
    for dtype in (torch.float32, torch.float64):
        hidden, weight, bias = (x.detach().to(dtype, copy=True).requires_grad_() for x in inputs)
        if dtype == torch.float32:
            loss = ops.mlm_head_loss(hidden, weight, bias, targets, kernels=kernels).loss_sum
        else:
            loss = F.cross_entropy(hidden @ weight.T + bias, targets, reduction="sum")
        loss.backward()
        results.append([loss.detach(), gradient(hidden), gradient(weight), gradient(bias)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-4, atol=1e-4 * scale)


def test_rank_counts_the_likelier_tokens() -> None:
    weight, bias, targets = torch.eye(4), torch.tensor([0.0, 3.0, 2.0, 1.0]), torch.tensor([1, 0, 2])
    head = ops.mlm_head_loss(torch.zeros(3, 4), weight, bias, targets, with_rank=True)
    assert head.rank_N is not None
    assert head.rank_N.tolist() == [0, 3, 1]
    assert head.positions == 3
    assert ops.mlm_head_loss(torch.zeros(3, 4), weight, bias, targets).rank_N is None


def test_very_large_logits_stay_finite() -> None:
    weight, targets = torch.tensor([[1.0], [-1.0]]), torch.tensor([1])
    head = ops.mlm_head_loss(torch.full((1, 1), 1e4), weight, torch.zeros(2), targets)
    assert head.loss_sum.item() == pytest.approx(2e4)


@KERNELS
@pytest.mark.parametrize("chunk", [1, 130, 2**24])
def test_rows_without_a_target_take_no_part_whatever_the_chunk(
    kernels: ops.Kernels, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_ops, "CHUNK", chunk)
    torch.manual_seed(0)
    inputs, targets = [torch.randn(7, 6), torch.randn(50, 6), torch.randn(50)], torch.tensor([3, -1, 3, 49, -1, 0, 7])
    has_target = targets >= 0

    def results(rows: Tensor, choice: ops.Kernels) -> tuple[list[Tensor], Tensor]:
        hidden, weight, bias = (x.clone().requires_grad_() for x in inputs)
        head = ops.mlm_head_loss(hidden[rows], weight, bias, targets[rows], True, choice)
        (0.3 * head.loss_sum).backward()
        assert head.rank_N is not None
        return [head.loss_sum.detach(), head.positions, gradient(hidden), gradient(weight), gradient(bias)], head.rank_N

    all_rows, all_ranks = results(torch.ones(7, dtype=torch.bool), kernels)
    target_rows, target_ranks = results(has_target, "plain")
    for one, other in zip(all_rows, target_rows, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(all_ranks, torch.zeros(7, dtype=torch.int64).masked_scatter(has_target, target_ranks))
    assert all_rows[1] == 5


def test_without_gradients_none_are_made() -> None:
    weight = torch.randn(9, 2, requires_grad=True)
    with torch.no_grad():
        loss = ops.mlm_head_loss(torch.randn(3, 2), weight, torch.zeros(9), torch.tensor([1, 2, 3])).loss_sum
    assert not loss.requires_grad
    no_targets = torch.empty(0, dtype=torch.int64)
    assert plain_ops.mlm_head_loss(torch.randn(0, 2), weight, torch.zeros(9), no_targets).loss_sum == 0


@KERNELS
@pytest.mark.parametrize(("vocabulary", "width"), [(50, 6), (5000, 6), (5000, 40)])  # plain, narrow and wide kernel
def test_token_losses_add_up_to_the_loss(
    kernels: ops.Kernels, vocabulary: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_ops, "CHUNK", 7 * vocabulary)
    generator = torch.Generator().manual_seed(0)
    shapes = (40, width), (vocabulary, width), (vocabulary,)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in shapes)
    targets = torch.randint(vocabulary, (40,), generator=generator)
    loss_N, rank_N = ops.mlm_head_token_losses(hidden, weight, bias, targets, kernels)
    logits = (hidden.double() @ weight.double().T) + bias
    assert loss_N.double() == pytest.approx(F.cross_entropy(logits, targets, reduction="none"), rel=1e-4, abs=1e-5)
    assert rank_N.tolist() == (logits > logits.gather(1, targets[:, None])).sum(1).tolist()
    empty = ops.mlm_head_token_losses(hidden[:0], weight, bias, targets[:0], kernels)
    assert [len(x) for x in empty] == [0, 0]


@pytest.mark.parametrize(("size", "k"), [(5, 9), (256, 1), (700, 2), (2000, 5), (2000, 7), (2000, 8), (2560, 3)])
def test_blockwise_topk_is_topk(size: int, k: int) -> None:
    torch.manual_seed(size)
    x = torch.randn(6, size)
    x[0, -1] = x[1, 0] = 9
    values, columns = plain_ops.blockwise_topk(x, k)
    expected = x.topk(min(k, size))
    assert torch.equal(values, expected.values)
    assert torch.equal(columns, expected.indices)


# Devices: every mask and index is made on the device of the input


def test_masks_and_indices_are_made_on_the_inputs_device() -> None:
    """Tensors on the "meta" device have no data, and refuse to be mixed with those of another device."""
    meta = torch.device("meta")
    packed = PackedBatch(torch.arange(5, device=meta), torch.arange(3, device=meta), torch.Size((2, 4)))
    assert ops.attention(torch.empty(5, 12, device=meta), packed, 2, 0.0).device == meta
    assert {x.device for x in plain_ops.blockwise_topk(torch.empty(3, 2000, device=meta), 5)} == {meta}
    decoder = nn.Linear(4, 2000, device=meta)
    assert {x.device for x in ops.top_tokens(torch.empty(9, 4, device=meta), decoder, 5)} == {meta}
    hidden, weight, bias = (torch.empty(shape, device=meta) for shape in ((9, 4), (2000, 4), (2000,)))
    targets = torch.zeros(9, dtype=torch.int64, device=meta)
    for head in (
        ops.mlm_head_loss(hidden, weight, bias, targets, with_rank=True),
        ops.mlm_head_loss(hidden, weight, bias, targets, with_rank=True, kernels="plain"),
    ):
        assert {x.device for x in head if x is not None} == {meta}
    assert {x.device for x in ops.mlm_head_token_losses(hidden, weight, bias, targets)} == {meta}


# Which implementation is picked


def picked(device: str, kernels: ops.Kernels, width: int = 10, vocabulary: int = 5000) -> list[str]:
    """The implementations of attention, feed-forward, dropout and head, with dropout 0.1 and two heads."""
    with FakeTensorMode():
        x_ND, qkv_N3D = torch.empty(3, width, device=device), torch.empty(3, 3 * width, device=device)
        weight1_FD, weight_VD = torch.empty(9, width, device=device), torch.empty(vocabulary, width, device=device)
        candidates = (
            ops.attention_candidates(qkv_N3D, 2, 0.1, kernels),
            ops.feed_forward_candidates(x_ND, weight1_FD, 0.1, "relu", kernels),
            ops.dropout_candidates(x_ND, 0.1, kernels),
            ops.mlm_head_candidates(x_ND, weight_VD, kernels),
        )
        return [ops.pick(each) for each in candidates]


def test_on_a_cpu_auto_picks_what_was_measured_to_be_faster() -> None:
    assert picked("cpu", "auto") == ["cpu_attention", "cpu_feed_forward", "cpu_dropout", "cpu_narrow_head"]
    assert picked("cpu", "auto", width=128) == ["torch", "torch", "cpu_dropout", "cpu_wide_head"]
    assert picked("cpu", "auto", vocabulary=200)[3] == "chunked_head"
    assert picked("cpu", "plain") == ["torch"] * 4


def test_on_a_gpu_auto_picks_triton_for_narrow_models(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(triton_policy, "can_build", lambda: True)
    assert picked("cuda", "auto") == ["torch", "triton_feed_forward", "torch", "triton_head"]
    assert picked("cuda", "auto", width=64) == ["torch", "torch", "torch", "chunked_head"]
    assert picked("cuda", "triton", width=64) == ["torch", "triton_feed_forward", "torch", "triton_head"]
    assert picked("cuda", "triton") == ["torch", "triton_feed_forward", "torch", "triton_head"]
    assert picked("cuda", "triton", width=256) == ["torch", "torch", "torch", "chunked_head"]
    with FakeTensorMode():
        hidden, weight = torch.empty(3, 10, device="cuda"), torch.empty(50, 10, device="cuda")
        assert ops.skips_rows_without_target(hidden, weight, "auto")
        assert not ops.skips_rows_without_target(hidden, weight, "plain")


def test_on_a_gpu_auto_does_without_triton_if_it_cannot_build_its_launchers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    (tmp_path / "Python.h").touch()
    (tmp_path / "gcc").touch(mode=0o755)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(triton_policy, "can_build", triton_policy.can_build.__wrapped__)  # without the cache
    for path, cc, found in ((str(tmp_path), "", True), ("", "", False), (str(tmp_path), "no-such-compiler", False)):
        monkeypatch.setenv("PATH", path)
        monkeypatch.setenv("CC", cc)
        assert triton_policy.can_build() is found
        assert (picked("cuda", "auto")[3] == "triton_head") is found
    monkeypatch.setenv("CC", "")
    assert triton_policy.can_build()
    (tmp_path / "Python.h").unlink()
    assert not triton_policy.can_build()


def test_the_cpu_heads_need_a_target_in_every_row() -> None:
    for width in (10, 64):
        candidates = ops.mlm_head_candidates(
            torch.empty(3, width), torch.empty(5000, width), every_row_has_target=False
        )
        assert ops.pick(candidates) == "chunked_head"


def test_triton_without_a_gpu_or_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bert = BabyBert(ModelConfig(vocab_size=90))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--kernels triton: no GPU is visible to PyTorch; use --kernels auto"):
        bert.set_kernels("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--kernels triton: Triton is not installed"):
        bert.set_kernels("triton")
    assert bert.kernels == "auto"


def test_without_numba_everything_runs_in_pytorch_with_one_warning(
    without_numba: None, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    hidden, weight, bias, targets = torch.randn(3, 4), torch.randn(5000, 4), torch.randn(5000), torch.tensor([1, 2, 3])
    bert = BabyBert(ModelConfig(vocab_size=90, width=10, feed_forward=300)).train()
    ids_BT = torch.randint(PAD + 1, 90, (4, 23))
    with caplog.at_level(logging.WARNING):
        losses = [ops.mlm_head_loss(hidden, weight, bias, targets).loss_sum for _ in range(2)]
        assert torch.isfinite(bert(ids_BT, torch.ones_like(ids_BT))).all()
    expected = plain_ops.mlm_head_loss(hidden, weight, bias, targets).loss_sum
    assert float(losses[0]) == pytest.approx(float(expected))
    assert len([record for record in caplog.records if "no CPU kernels" in record.message]) == 1
    assert {choice.implementation for choice in ops_table.choices(CPU)} == {"torch", "chunked_head"}
    assert not ops.bf16_wins(CPU, 256, 64, "auto")


def test_the_table_has_each_operation_and_preset_as_training_picks_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ops_table.choices(CPU)
    operations = {"encoder", "attention", "feed_forward", "dropout", "mlm_head_loss", "top_tokens"}
    assert {(row.operation, row.preset) for row in rows} == {
        (name, preset) for name in operations for preset in PRESETS
    }
    chosen = {(row.operation, row.preset): row for row in rows}
    assert chosen["mlm_head_loss", "baby"].implementation == "cpu_narrow_head"
    assert chosen["mlm_head_loss", "mini"].implementation == "cpu_wide_head"
    assert chosen["feed_forward", "mini"].implementation == "torch"
    assert chosen["feed_forward", "mini"].why == "cpu_feed_forward needs width <= 16 (32 with dropout)"
    cpu = ops._load_cpu_kernels("cpu")
    assert cpu is not None
    monkeypatch.setattr(cpu.attention, "WIDEST_WITH_DROPOUT", 4)
    monkeypatch.setattr(cpu.attention, "WIDEST", 4)
    changed = [row.implementation for row in ops_table.choices(CPU) if row.operation == "attention"]
    assert set(changed) == {"torch"}
    assert all(
        row.implementation == "torch" for row in ops_table.choices(CPU, "plain") if row.operation != "top_tokens"
    )


def test_ops_is_the_only_importer_of_the_kernels() -> None:
    package = Path(babybert.__file__).parent
    importers = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if "model/kernels" not in path.as_posix() and "babybert.model.kernels" in path.read_text(encoding="utf-8")
    }
    assert importers == {"model/ops.py"}
