"""The bf16 kernels of a CPU against float64 autograd. They run on any processor, with or without matrix units."""

import copy
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import gradient
from torch import Tensor

from babybert.config import ModelConfig
from babybert.data.tokenizer import PAD
from babybert.model import ops
from babybert.model.bert import BabyBert, keep_bf16_weights
from babybert.model.bf16_weights import Bf16Weights
from babybert.model.kernels import cpu_bf16_head
from babybert.model.kernels.cpu_bf16_activation import activate, activate_backward
from babybert.model.kernels.cpu_bf16_attention import Buckets, attend, attend_backward
from babybert.model.kernels.cpu_bf16_encoder import NARROWEST
from babybert.model.kernels.cpu_bf16_head import CpuBf16HeadLoss
from babybert.model.kernels.cpu_bf16_math import round_up
from babybert.model.kernels.cpu_bf16_norm import add_norm, add_norm_backward
from babybert.model.loss import PretrainingModel
from babybert.model.packing import PackedBatch

pytestmark = [pytest.mark.serial, pytest.mark.no_cover]  # tracing makes numba's compiler several times slower
ROUNDING = 2**-8  # of one bf16 number, relative
SEED_2 = torch.tensor([3, 4])


def distance(ours: Tensor, reference: Tensor) -> float:
    """The size of the difference, relative to the reference's."""
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm().clamp(min=1e-30))


def leaf(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_()


def factors_of_dropout(rows: int, columns: int, dropout_p: float) -> Tensor:
    """What dropout multiplies with: the numbers that it keeps are those of an activation that it does not set to 0."""
    ones_NF, _ = activate(torch.ones(rows, columns).bfloat16(), torch.zeros(columns), "relu", dropout_p, SEED_2)
    return (ones_NF > 0).double() / (1 - dropout_p)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_activation_equals_float64_autograd(activation: str, dropout_p: float) -> None:
    torch.manual_seed(0)
    h_NF, bias_F, d_a_NF = (2 * torch.randn(37, 50)).bfloat16(), torch.randn(50), torch.randn(37, 50).bfloat16()
    rounded_NF, rounded_bias_F = leaf((h_NF + bias_F).bfloat16()), torch.zeros(50).double().requires_grad_()
    factor_NF = factors_of_dropout(37, 50, dropout_p)
    kept = float((factor_NF > 0).double().mean())
    assert kept == pytest.approx(1 - dropout_p, abs=0.05)
    expected_NF = getattr(F, activation)(rounded_NF + rounded_bias_F) * factor_NF
    expected_NF.backward(d_a_NF.double())
    a_NF, slope_NF = activate(h_NF, bias_F, activation, dropout_p, SEED_2)
    d_h_NF, d_bias_F = activate_backward(d_a_NF, slope_NF)
    assert distance(a_NF, expected_NF) < ROUNDING
    assert distance(d_h_NF, gradient(rounded_NF)) < ROUNDING
    assert distance(d_bias_F, gradient(rounded_bias_F)) < ROUNDING


def test_gelu_of_the_largest_numbers() -> None:
    x_NF = torch.tensor([[-torch.inf, -1e38, -9.0, 0.0, 9.0, 1e38, torch.inf]]).bfloat16()
    expected_NF = torch.tensor([[0, 0, 0, 0, 9.0, 1e38, torch.inf]]).bfloat16()
    a_NF, slope_NF = activate(x_NF.clone(), torch.zeros(7), "gelu")
    torch.testing.assert_close(a_NF, expected_NF)
    torch.testing.assert_close(slope_NF, torch.tensor([[0, 0, 0, 0.5, 1, 1, 1]]).bfloat16(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("is_pre", [False, True])
@pytest.mark.parametrize("with_update", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_sum_and_norm_equal_float64_autograd(is_pre: bool, with_update: bool, dropout_p: float) -> None:
    torch.manual_seed(0)
    x_ND, y_ND, d_normed_ND, d_stream_ND = (torch.randn(37, 50) for _ in range(4))
    y_ND, d_normed_ND = y_ND.bfloat16(), d_normed_ND.bfloat16()
    vectors = torch.randn(3, 50)
    bias_D, weight_D, shift_D = leaves = [leaf(vector) for vector in vectors]
    x, y = leaf(x_ND), leaf(y_ND)
    factor_ND = factors_of_dropout(37, 50, dropout_p)
    sum_ND = x + (y + bias_D) * factor_ND if with_update else x
    normed_ND = F.layer_norm(sum_ND, (50,), weight_D, shift_D)
    stream_ND = sum_ND if is_pre else normed_ND
    ((normed_ND * d_normed_ND).sum() + (stream_ND * d_stream_ND).sum()).backward()
    update = (y_ND, vectors[0]) if with_update else None
    ours_ND, ours_normed_ND, saved = add_norm(x_ND, update, (vectors[1], vectors[2]), is_pre, dropout_p, SEED_2)
    assert distance(ours_ND, stream_ND) < 1e-6
    assert distance(ours_normed_ND, normed_ND) < ROUNDING
    gradients = add_norm_backward(saved, d_normed_ND, d_stream_ND.clone())
    assert distance(gradients.x_ND, gradient(x)) < 1e-5
    assert distance(gradients.weight_D, gradient(weight_D)) < 1e-5
    assert distance(gradients.shift_D, gradient(shift_D)) < 1e-5
    if with_update:
        assert distance(gradients.y_ND, gradient(y)) < ROUNDING
        assert distance(gradients.bias_D, gradient(leaves[0])) < 1e-5


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_attention_equals_float64_autograd(dropout_p: float) -> None:
    """Pairs of several lengths, also one that fills its bucket and one of a single token."""
    torch.manual_seed(0)
    heads, width, lengths = 2, 32, [33, 7, 16, 1, 40, 5]
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)])
    qkv_N3D, bias_3D = torch.randn(sum(lengths), 3 * width).bfloat16(), torch.randn(3 * width)
    d_out_ND, buckets = torch.randn(sum(lengths), width).bfloat16(), Buckets.of(cu_seqlens)
    assert buckets.sizes == [(4, 16), (2, 48)]
    out_ND, saved = attend(qkv_N3D, bias_3D, buckets, heads, dropout_p, SEED_2)
    ones_ND = torch.ones(sum(lengths), 3 * width).bfloat16()
    zero_3D = torch.zeros(3 * width)
    # With equal queries and keys, and values of 1, an output is the share of its weights that was kept.
    shares_ND, _ = attend(ones_ND, zero_3D, buckets, heads, dropout_p, SEED_2)
    assert float(shares_ND.float().mean()) == pytest.approx(1, abs=0.1)
    if dropout_p:
        again_ND, _ = attend(qkv_N3D, bias_3D, buckets, heads, dropout_p, SEED_2)
        assert torch.equal(out_ND, again_ND)
    d_qkv_N3D, d_bias_3D = attend_backward(d_out_ND, saved, buckets, heads, dropout_p, SEED_2)
    # Dropout of the weights is read off what the kernels kept for the backward.
    leaf_N3D, leaf_3D = leaf(qkv_N3D), leaf(bias_3D)
    kept = {}
    views = [buckets.views(x_X, None, heads) for x_X in (saved.weights_X, saved.dropped_X)]
    weights_B, dropped_B = ([x for view in each for x in view.unflatten(0, (-1, heads))] for each in views)
    for first, length, weights, dropped in zip(buckets.first_B, buckets.length_B, weights_B, dropped_B, strict=True):
        assert (weights[:, length:] == 0).all()
        assert (weights[:, :, length:] == 0).all()
        kept[int(first)] = torch.where(dropped > 0, 1 / (1 - dropout_p), 0.0).double()[:, :length, :length]
    rows = []
    for first, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        q, k, v = (leaf_N3D[first:end] + leaf_3D).view(end - first, 3, heads, -1).permute(1, 2, 0, 3)
        weights = (q @ k.mT / (width // heads) ** 0.5).softmax(-1) * kept[first]
        rows.append((weights @ v).transpose(0, 1).flatten(1))
    expected_ND = torch.cat(rows)
    expected_ND.backward(d_out_ND.double())
    assert distance(out_ND, expected_ND) < 4 * ROUNDING
    assert distance(d_qkv_N3D, gradient(leaf_N3D)) < 6 * ROUNDING
    assert distance(d_bias_3D, gradient(leaf_3D)) < 8 * ROUNDING


@pytest.mark.parametrize("chunk", [1, 500, 2**24])
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_the_head_equals_float64_autograd(chunk: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(cpu_bf16_head, "CHUNK", chunk)
    hidden_ND, weight_VD = (scale * torch.randn(23, 40)).bfloat16(), (torch.randn(201, 40) / 40**0.5).bfloat16()
    bias_V, targets_N = torch.randn(201), torch.randint(0, 201, (23,))
    ours = [x.float().requires_grad_() for x in (hidden_ND, weight_VD, bias_V)]
    head: Any = CpuBf16HeadLoss
    loss, rank_N = head.apply(*ours, targets_N, Bf16Weights(), True, True)
    (loss * -0.3).backward()
    exact = [leaf(x) for x in (hidden_ND, weight_VD, bias_V)]
    logits_NV = exact[0] @ exact[1].T + exact[2]
    expected = F.cross_entropy(logits_NV, targets_N, reduction="sum")
    (expected * -0.3).backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=ROUNDING * max(1.0, scale / 10))
    for one, other in zip(ours, exact, strict=True):
        assert distance(gradient(one), gradient(other)) < (2 if scale < 1 else 8) * ROUNDING
    skipped, _ = head.apply(*ours, targets_N.index_fill(0, torch.arange(1, 23), -1), Bf16Weights(), True, False)
    alone, _ = head.apply(ours[0][:1], *ours[1:], targets_N[:1], Bf16Weights(), True, False)
    assert float(skipped) == pytest.approx(float(alone), rel=1e-6)
    above_N = (logits_NV > logits_NV.gather(1, targets_N[:, None])).sum(1)
    assert (rank_N - above_N).abs().max() <= 3  # logits of two words may be equal after rounding


SHAPES: dict[str, dict[str, Any]] = {
    "post": {"norm": "post", "activation": "relu"},
    "pre": {"norm": "pre", "activation": "gelu"},
    "tied": {"norm": "pre", "activation": "gelu", "tie_decoder": True},
}


def a_model(shape: str, dropout: float = 0.0) -> BabyBert:
    torch.manual_seed(0)
    bert = BabyBert(ModelConfig(200, NARROWEST, layers=2, heads=4, feed_forward=96, dropout=dropout, **SHAPES[shape]))
    for parameter in bert.parameters():
        if parameter.dim() == 1:  # otherwise biases and shifts are zero, and weights of norms one
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    return bert.train()


def a_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs of several lengths: ids, labels, segments and whether B is next."""
    torch.manual_seed(1)
    ids_BT = torch.randint(5, 200, (6, 40))
    for row, length in enumerate((40, 31, 16, 40, 5, 9)):
        ids_BT[row, length:] = PAD
    labels_BT = torch.where((torch.rand(6, 40) < 0.2) & (ids_BT != PAD), torch.randint(5, 200, (6, 40)), 0)
    labels_BT[:, 0] = 0
    return ids_BT, labels_BT, (ids_BT != PAD).long(), torch.tensor([0, 1, 1, -1, 0, 1])


def sums_and_gradients(bert: BabyBert, bf16: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    bert.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        sums = PretrainingModel(bert)(*a_batch())
    (sums["mlm_sum"] / sums["mlm_count"] + sums["nsp_sum"] / sums["nsp_count"]).sum().backward()
    return sums, {name: gradient(parameter).clone() for name, parameter in bert.named_parameters()}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_models_loss_and_gradients_in_bf16_are_those_of_float64(shape: str) -> None:
    bert = a_model(shape)
    sums, gradients = sums_and_gradients(bert, bf16=True)
    exact = copy.deepcopy(bert).double().set_kernels("plain")
    expected_sums, expected = sums_and_gradients(exact, bf16=False)
    for name in ("mlm_sum", "nsp_sum"):
        assert sums[name].item() == pytest.approx(expected_sums[name].item(), rel=0.01)
    for name in ("mlm_count", "nsp_count", "tokens"):
        assert sums[name].item() == expected_sums[name].item()
    for name, one in gradients.items():
        # The activation has a kink with ReLU: some units change sides.
        limit = 0.25 if shape == "post" else 0.06
        assert one.dtype == torch.float32
        assert distance(one, expected[name]) < limit or float(expected[name].norm()) < 1e-5, name


@pytest.mark.parametrize("shape", ["post", "pre"])
def test_hidden_states_in_bf16(shape: str) -> None:
    bert = a_model(shape).eval()
    ids_BT, _, segments_BT, _ = a_batch()
    exact_BTD = bert(ids_BT, segments_BT)
    with torch.autocast("cpu", torch.bfloat16):
        hidden_BTD = bert(ids_BT, segments_BT)
        query_M = torch.tensor([81, 3, 0])
        hidden_MD = bert.hidden_at(ids_BT, segments_BT, query_M)
    assert distance(hidden_BTD[ids_BT != PAD], exact_BTD[ids_BT != PAD]) < 3 * ROUNDING
    assert distance(hidden_MD, exact_BTD.flatten(0, 1)[query_M]) < 3 * ROUNDING


def test_dropout_in_bf16_is_a_function_of_the_seed() -> None:
    bert, batch, losses = a_model("pre", dropout=0.2), a_batch(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(PretrainingModel(bert)(*batch)["mlm_sum"].item())
    assert losses[0] == losses[1] != losses[2]


def test_weights_are_cast_once_a_step_and_follow_the_optimizer() -> None:
    """PyTorch does not count the changes that a fused optimizer makes, so a copy must not outlive a step."""
    bert, losses = a_model("pre"), list[float]()
    optimizer = torch.optim.AdamW(bert.parameters(), lr=0.01, fused=True)
    for _ in range(3):
        with keep_bf16_weights(PretrainingModel(bert)):
            assert bert.bf16_weights is not None
            first = bert.bf16_weights.of(bert.mlm_decoder.weight)
            sums, _ = sums_and_gradients(bert, bf16=True)
            assert bert.bf16_weights.of(bert.mlm_decoder.weight) is first
        assert bert.bf16_weights is None
        assert torch.equal(first, bert.mlm_decoder.weight.bfloat16())
        losses.append(sums["mlm_sum"].item())
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize(
    ("count", "bits", "expected"), [(0, 4, 0), (1, 4, 1), (15, 4, 15), (17, 4, 18), (2926, 5, 2944)]
)
def test_shapes_are_rounded_up_to_few_numbers(count: int, bits: int, expected: int) -> None:
    assert round_up(count, bits) == expected


def test_empty_pairs_fill_buckets_and_zeros_fill_rows() -> None:
    """Nine pairs lie in a bucket for ten, and rows beyond the tokens get zeros."""
    torch.manual_seed(0)
    qkv_N3D, zero_3D = torch.randn(32, 48).bfloat16(), torch.zeros(48)
    cu_seqlens = torch.arange(0, 28, 3)
    buckets = Buckets.of(cu_seqlens)
    assert buckets.sizes == [(10, 16)]
    out_ND, saved = attend(qkv_N3D, zero_3D, buckets, 1, 0.0, SEED_2)
    d_qkv_N3D, _ = attend_backward(torch.ones_like(out_ND), saved, buckets, 1, 0.0, SEED_2)
    for index, first in enumerate(cu_seqlens[:-1].tolist()):
        alone_ND, _ = attend(qkv_N3D[first : first + 3], zero_3D, Buckets.of(torch.tensor([0, 3])), 1, 0.0, SEED_2)
        assert torch.equal(out_ND[first : first + 3], alone_ND), index
    assert (out_ND[27:] == 0).all()
    assert (d_qkv_N3D[27:] == 0).all()


# Which implementation is picked


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "width", "pairs", "kernels", "wins"),
    [
        (True, True, 128, 64, "auto", True),
        (False, True, 128, 64, "auto", True),
        (False, False, 256, 64, "auto", False),
        (True, True, 64, 64, "auto", False),
        (True, True, 256, 4, "auto", False),
        (True, True, 256, 64, "plain", False),
    ],
)
def test_auto_picks_bf16_where_the_processor_has_units_and_the_model_is_wide(
    monkeypatch: pytest.MonkeyPatch,
    amx: bool,
    avx512_bf16: bool,
    width: int,
    pairs: int,
    kernels: Literal["auto", "plain"],
    wins: bool,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert ops.bf16_wins(torch.device("cpu"), width, pairs, kernels) == wins


def test_the_encoder_and_the_head_need_autocast() -> None:
    x_ND, weight_VD = torch.zeros(3, NARROWEST), torch.zeros(500, NARROWEST)
    assert ops.pick(ops.encoder_candidates(x_ND)) == "torch"
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.pick(ops.encoder_candidates(x_ND)) == "cpu_bf16_encoder"
        assert ops.pick(ops.mlm_head_candidates(x_ND, weight_VD)) == "cpu_bf16_head"
        assert ops.pick(ops.encoder_candidates(x_ND[:, :64])) == "torch"
        assert ops.pick(ops.encoder_candidates(x_ND, "plain")) == "torch"
        assert ops.pick(ops.encoder_candidates(x_ND[:0])) == "torch"


def test_a_pair_without_tokens_changes_nothing() -> None:
    packed = PackedBatch.from_mask(torch.tensor([[True, True, False], [False, False, False]]))
    buckets = Buckets.of(packed.cu_seqlens)
    assert buckets.sizes == [(1, 16)]
    qkv_N3D, zero_3D = torch.randn(2, 48).bfloat16(), torch.zeros(48)
    out_ND, _ = attend(qkv_N3D, zero_3D, buckets, 1, 0.0, SEED_2)
    alone_ND, _ = attend(qkv_N3D, zero_3D, Buckets.of(torch.tensor([0, 2])), 1, 0.0, SEED_2)
    assert torch.equal(out_ND, alone_ND)
