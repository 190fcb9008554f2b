"""The vocabulary head and the feed-forward layer on a GPU without their wide tensors: Triton kernels for narrow models.

At width 10 both are limited by memory: plain torch writes and reads logits of N x 147,161, or N x 2048 hidden units,
for a dot product of ten numbers each. Here a block of them lives in registers and is gone, and the backward computes it
again, which costs one more narrow product. The head's maximum is kept as it goes (Milakov and Gimelshein, 2018), so
that no logit is too large; its forward also sums e^z W, from which the gradient of the hidden states follows without a
second pass over the vocabulary. Dropout is a hash of row, unit and seed: the backward has the same mask without storing
it.

Blocks are split and their partial sums added in a fixed order, without atomics, so the same input has the same bits.
Nothing here waits for the GPU. Sums are fp32. Products are bf16 where the layer's input is (as autocast would have it),
else exact fp32 (not TF32). A width is padded to a power of two of at least 16, which tl.dot needs: 10 costs as much as
16.

Not yet measured on a GPU; checked in Triton's interpreter (TRITON_INTERPRET=1), and compiled for an H100 without
running.

Shapes: N positions (rows), D width, V vocabulary, F hidden units, S splits of a sum whose parts are added at the end.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

BLOCK = 64  # rows, and words or hidden units, of a block: twice as many do not fit the registers of WARPS x 32 threads in fp32
WARPS = 8
TILE = (
    2048  # numbers of a block of a table at most: wider models get fewer rows, so that all fits an H100's shared memory
)
PROGRAMS = 512  # a sum is split until there are as many: four for each of an H100's 132 processors, whatever the GPU, for the bits' sake
WIDEST = 64  # a guess, not yet measured on a GPU: there fp32 products cost about the time in which plain torch moves its logits
INTERPRETED = constexpr(triton.knobs.runtime.interpret)
NOTHING = constexpr(-1e30)  # below every logit, and finite: a difference of two is not NaN
GOLDEN = constexpr(0x9E3779B9)  # 2^32 / golden ratio: units next to each other get bits far from each other


@triton.jit
def _dot(a, b):
    if INTERPRETED:  # the interpreter would multiply the bits of bf16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _tile(table, row, column, width, rows, columns):
    """table[row, column], 0 where `rows` or `columns` is false."""
    return tl.load(table + row[:, None] * width + column[None, :], mask=rows[:, None] & columns[None, :], other=0.0)


@triton.jit(do_not_specialize=["N", "span"])
def _head_forward(
    hidden_ND,
    weight_VD,
    bias_V,
    target_N,
    own_N,
    most_SN,
    total_SN,
    mixed_SND,
    rank_SN,
    N,
    V,
    span,
    D: constexpr,
    PADDED: constexpr,
    BLOCK: constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.program_id(1)
    d = tl.arange(0, PADDED)
    target = tl.load(target_N + row, mask=row < N, other=-1).to(tl.int32)
    own = tl.load(own_N + row, mask=row < N, other=0.0)
    hidden = _tile(hidden_ND, row, d, D, target >= 0, d < D)
    most = tl.full([BLOCK], NOTHING, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mixed = tl.zeros([BLOCK, PADDED], tl.float32)
    above = tl.zeros([BLOCK], tl.int32)
    if tl.max(target, 0) >= 0:
        for start in range(split * span, tl.minimum(split * span + span, V), BLOCK):
            column = start + tl.arange(0, BLOCK)
            weight = _tile(weight_VD, column, d, D, column < V, d < D)
            bias = tl.load(bias_V + column, mask=column < V, other=-float("inf")).to(tl.float32)
            z = _dot(hidden, tl.trans(weight)) + bias[None, :]
            if rank_SN is not None:  # `own` was summed in another order: the target may be above itself
                above += tl.sum(((z > own[:, None]) & (column[None, :] != target[:, None])).to(tl.int32), 1)
            larger = tl.maximum(most, tl.max(z, 1))
            shrink = tl.exp(most - larger)
            p = tl.exp(z - larger[:, None])
            total = total * shrink + tl.sum(p, 1)
            if mixed_SND is not None:
                mixed = mixed * shrink[:, None] + _dot(p.to(hidden.dtype), weight)
            most = larger
    place = split.to(tl.int64) * N + row
    tl.store(most_SN + place, most, mask=row < N)
    tl.store(total_SN + place, total, mask=row < N)
    if rank_SN is not None:
        tl.store(rank_SN + place, tl.where(target >= 0, above, 0), mask=row < N)
    if mixed_SND is not None:
        tl.store(mixed_SND + place[:, None] * D + d[None, :], mixed, mask=(row < N)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["N"])
def _head_backward(
    hidden_ND,
    weight_VD,
    bias_V,
    target_N,
    most_N,
    total_N,
    d_loss,
    d_weight_VD,
    d_bias_V,
    N,
    V,
    D: constexpr,
    PADDED: constexpr,
    BLOCK: constexpr,
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, PADDED)
    weight = _tile(weight_VD, column, d, D, column < V, d < D)
    bias = tl.load(bias_V + column, mask=column < V, other=-float("inf")).to(tl.float32)
    scale = tl.load(d_loss)
    d_weight = tl.zeros([BLOCK, PADDED], tl.float32)
    d_bias = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        row = start + tl.arange(0, BLOCK)
        target = tl.load(target_N + row, mask=row < N, other=-1).to(tl.int32)
        if tl.max(target, 0) >= 0:
            hidden = _tile(hidden_ND, row, d, D, target >= 0, d < D)
            most = tl.load(most_N + row, mask=target >= 0, other=float("inf"))  # e^(z - inf) = 0: no gradient
            factor = scale / tl.load(total_N + row, mask=target >= 0, other=1.0)
            z = _dot(weight, tl.trans(hidden)) + bias[:, None]
            d_z = (
                tl.exp(z - most[None, :]) * factor[None, :]
            )  # not e^(z - log_sum): that has the rounding of a large log_sum
            d_z = tl.where(column[:, None] == target[None, :], d_z - scale, d_z)
            d_weight += _dot(d_z.to(hidden.dtype), hidden)
            d_bias += tl.sum(d_z, 1)
    tl.store(d_weight_VD + column[:, None] * D + d[None, :], d_weight, mask=(column < V)[:, None] & (d < D)[None, :])
    tl.store(d_bias_V + column, d_bias, mask=column < V)


@triton.jit
def _mix(x):
    """lowbias32, a bijection of 32 bits, found by Chris Wellons' hash prospector."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def _key(row, seed_2):
    """A row's part of the hash, computed once for all units."""
    return _mix(row.to(tl.uint32) + tl.load(seed_2).to(tl.uint32)) ^ tl.load(seed_2 + 1).to(tl.uint32)


@triton.jit
def _relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)  # without it, NaN becomes 0 and goes unseen


@triton.jit
def _drop(x, key, unit, DROP: constexpr):
    """x where the hash says it is kept, enlarged, and 0 elsewhere; x itself where nothing is dropped."""
    if DROP > 0:
        x = tl.where(_mix(key + unit.to(tl.uint32) * GOLDEN) >= DROP, x * (2**32 / (2**32 - DROP)), 0.0)
    return x


@triton.jit(do_not_specialize=["N"])
def _feed_forward(
    x_ND,
    weight1_FD,
    bias1_F,
    weight2_DF,
    seed_2,
    bias2_D,
    y_ND,
    N,
    F: constexpr,
    D: constexpr,
    PADDED: constexpr,
    BLOCK: constexpr,
    DROP: constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, PADDED)
    x = _tile(x_ND, row, d, D, row < N, d < D)
    key = _key(row, seed_2)
    y = tl.zeros([BLOCK, PADDED], tl.float32) + tl.load(bias2_D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    for start in range(0, F, BLOCK):
        unit = start + tl.arange(0, BLOCK)
        weight1 = _tile(weight1_FD, unit, d, D, unit < F, d < D)
        weight2 = _tile(weight2_DF, d, unit, F, d < D, unit < F)
        bias1 = tl.load(bias1_F + unit, mask=unit < F, other=0.0).to(tl.float32)
        hidden = _dot(x, tl.trans(weight1)) + bias1[None, :]
        hidden = _drop(_relu(hidden), key[:, None], unit[None, :], DROP)
        y += _dot(hidden.to(x.dtype), tl.trans(weight2))
    tl.store(y_ND + row[:, None] * D + d[None, :], y, mask=(row < N)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["N"])
def _feed_forward_d_x(
    x_ND,
    weight1_FD,
    bias1_F,
    weight2_DF,
    seed_2,
    d_y_ND,
    d_x_ND,
    N,
    F: constexpr,
    D: constexpr,
    PADDED: constexpr,
    BLOCK: constexpr,
    DROP: constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, PADDED)
    x = _tile(x_ND, row, d, D, row < N, d < D)
    d_y = _tile(d_y_ND, row, d, D, row < N, d < D)
    key = _key(row, seed_2)
    d_x = tl.zeros([BLOCK, PADDED], tl.float32)
    for start in range(0, F, BLOCK):
        unit = start + tl.arange(0, BLOCK)
        weight1 = _tile(weight1_FD, unit, d, D, unit < F, d < D)
        weight2 = _tile(weight2_DF, d, unit, F, d < D, unit < F)
        bias1 = tl.load(bias1_F + unit, mask=unit < F, other=0.0).to(tl.float32)
        hidden = _dot(x, tl.trans(weight1)) + bias1[None, :]
        d_hidden = _drop(_dot(d_y, weight2), key[:, None], unit[None, :], DROP)
        d_x += _dot(tl.where(hidden <= 0, 0.0, d_hidden).to(x.dtype), weight1)
    tl.store(d_x_ND + row[:, None] * D + d[None, :], d_x, mask=(row < N)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["N", "span"])
def _feed_forward_d_weights(
    x_ND,
    weight1_FD,
    bias1_F,
    weight2_DF,
    seed_2,
    d_y_ND,
    sums_S,
    N,
    span,
    F: constexpr,
    D: constexpr,
    PADDED: constexpr,
    BLOCK: constexpr,
    DROP: constexpr,
):
    """`sums_S` holds of each split the gradients of weight1 (F, D), weight2 (D, F) and bias1, one after the other."""
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.program_id(1)
    d = tl.arange(0, PADDED)
    weight1 = _tile(weight1_FD, unit, d, D, unit < F, d < D)
    weight2 = _tile(weight2_DF, d, unit, F, d < D, unit < F)
    bias1 = tl.load(bias1_F + unit, mask=unit < F, other=0.0).to(tl.float32)
    d_weight1 = tl.zeros([BLOCK, PADDED], tl.float32)
    d_weight2 = tl.zeros([BLOCK, PADDED], tl.float32)
    d_bias1 = tl.zeros([BLOCK], tl.float32)
    for start in range(split * span, tl.minimum(split * span + span, N), BLOCK):
        row = start + tl.arange(0, BLOCK)
        x = _tile(x_ND, row, d, D, row < N, d < D)
        d_y = _tile(d_y_ND, row, d, D, row < N, d < D)
        key = _key(row, seed_2)
        hidden = _dot(weight1, tl.trans(x)) + bias1[:, None]
        d_hidden = _drop(_dot(tl.trans(weight2), tl.trans(d_y)), key[None, :], unit[:, None], DROP)
        d_hidden = tl.where(hidden <= 0, 0.0, d_hidden)
        hidden = _drop(_relu(hidden), key[None, :], unit[:, None], DROP)
        d_weight2 += _dot(hidden.to(x.dtype), d_y)
        d_weight1 += _dot(d_hidden.to(x.dtype), x)
        d_bias1 += tl.sum(d_hidden, 1)
    inside = (unit < F)[:, None] & (d < D)[None, :]
    sums = sums_S + split * (2 * F * D + F)
    tl.store(sums + unit[:, None] * D + d[None, :], d_weight1, mask=inside)
    tl.store(sums + F * D + d[None, :] * F + unit[:, None], d_weight2, mask=inside)
    tl.store(sums + 2 * F * D + unit, d_bias1, mask=unit < F)


def supports_head(hidden_ND: Tensor, weight_VD: Tensor) -> bool:
    """Whether the kernels are made for such tensors, and thought to be worth it. Their offsets are 32-bit."""
    on_device = hidden_ND.device.type == "cuda" or INTERPRETED.value
    dtypes = {hidden_ND.dtype, weight_VD.dtype} <= {torch.float32, torch.bfloat16}
    return on_device and dtypes and weight_VD.shape[1] <= WIDEST and max(hidden_ND.numel(), weight_VD.numel()) < 2**31


def supports_feed_forward(x_ND: Tensor, weight1_FD: Tensor) -> bool:
    """The same question about the feed-forward layer, with the same answer: the width is what counts."""
    return supports_head(x_ND, weight1_FD)


def _sizes(width: int) -> dict[str, int]:
    """The constants that all kernels of a width have in common."""
    padded = max(16, triton.next_power_of_2(width))
    return {"D": width, "PADDED": padded, "BLOCK": max(16, min(BLOCK, TILE // padded)), "num_warps": WARPS}


def _split(length: int, block: int, programs: int) -> tuple[int, int]:
    """Into how many parts to split a sum, and the length of each (whole blocks), where there are so many programs already."""
    blocks = max(1, triton.cdiv(length, block))
    parts = min(blocks, max(1, PROGRAMS // max(1, programs)))
    span = triton.cdiv(blocks, parts) * block
    return max(1, triton.cdiv(length, span)), span


def _own(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """The targets' rows of the table, and their logits; a target of -1 gets any."""
    index_N = targets_N.clamp(min=0)
    own_weight_ND = weight_VD[index_N].float()
    return own_weight_ND, (hidden_ND.float() * own_weight_ND).sum(-1) + bias_V[index_N].float()


def _head_sums(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    targets_N: Tensor,
    own_N: Tensor,
    with_mixed: bool,
    with_rank: bool,
) -> list[Any]:
    """Of each split of the vocabulary: the maximum, the sum of e^(z - maximum), and on demand that of e^(z - maximum) W, and the rank."""
    (positions, width), vocab, sizes = hidden_ND.shape, len(weight_VD), _sizes(weight_VD.shape[1])
    row_blocks = triton.cdiv(positions, sizes["BLOCK"])
    splits, span = _split(vocab, sizes["BLOCK"], row_blocks)
    most_SN, total_SN = own_N.new_empty(splits, positions), own_N.new_empty(splits, positions)
    mixed_SND = own_N.new_empty(splits, positions, width) if with_mixed else None
    rank_SN = own_N.new_empty(splits, positions, dtype=torch.int32) if with_rank else None
    sums = [most_SN, total_SN, mixed_SND, rank_SN]
    _head_forward[row_blocks, splits](
        hidden_ND, weight_VD, bias_V, targets_N, own_N, *sums, positions, vocab, span, **sizes
    )
    return sums


def _as(context: Any, gradients: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Each gradient in its input's type."""
    return [
        None if gradient is None else gradient.to(dtype)
        for gradient, dtype in zip(gradients, context.dtypes, strict=True)
    ]


class GpuHeadLoss(torch.autograd.Function):
    """Sum of the cross entropies (0-dim, fp32), and the targets' ranks (or an empty tensor). A target of -1 takes no part."""

    @staticmethod
    def forward(
        context: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor, with_rank: bool
    ) -> tuple[Tensor, Tensor]:
        context.dtypes = hidden_ND.dtype, weight_VD.dtype, bias_V.dtype
        weight_VD = weight_VD.to(hidden_ND.dtype)
        hidden_ND, weight_VD, bias_V, targets_N = (
            tensor.contiguous() for tensor in (hidden_ND, weight_VD, bias_V, targets_N)
        )
        own_weight_ND, own_N = _own(hidden_ND, weight_VD, bias_V, targets_N)
        tensors = (hidden_ND, weight_VD, bias_V, targets_N, own_N)
        most_SN, total_SN, mixed_SND, rank_SN = _head_sums(*tensors, context.needs_input_grad[0], with_rank)
        takes_part_N, most_N = targets_N >= 0, most_SN.amax(0)
        share_SN = (most_SN - most_N).exp()
        total_N = torch.where(takes_part_N, (total_SN * share_SN).sum(0), 1)
        loss_sum = torch.where(takes_part_N, most_N - own_N + total_N.log(), 0).sum()
        d_hidden_ND = None
        if mixed_SND is not None:  # the mean row of the table, by probability, less the target's
            mean_ND = (mixed_SND * (share_SN / total_N)[:, :, None]).sum(0)
            d_hidden_ND = torch.where(takes_part_N[:, None], mean_ND - own_weight_ND, 0)
        context.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N, most_N, total_N, d_hidden_ND)
        rank_N = targets_N.new_empty(0) if rank_SN is None else rank_SN.sum(0)
        context.mark_non_differentiable(rank_N)
        return loss_sum, rank_N

    @staticmethod
    def backward(context: Any, d_loss: Tensor, d_rank: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, targets_N, most_N, total_N, d_hidden_ND = context.saved_tensors
        vocab, sizes = len(weight_VD), _sizes(weight_VD.shape[1])
        d_weight_VD, d_bias_V = (torch.empty_like(tensor, dtype=torch.float32) for tensor in (weight_VD, bias_V))
        tensors = (hidden_ND, weight_VD, bias_V, targets_N, most_N, total_N, d_loss, d_weight_VD, d_bias_V)
        if context.needs_input_grad[1] or context.needs_input_grad[2]:
            _head_backward[(triton.cdiv(vocab, sizes["BLOCK"]),)](*tensors, len(targets_N), vocab, **sizes)
        gradients = (None if d_hidden_ND is None else d_loss * d_hidden_ND), d_weight_VD, d_bias_V
        return *_as(context, gradients), None, None


class GpuFeedForward(torch.autograd.Function):
    """dropout(relu(x @ weight1.T + bias1)) @ weight2.T + bias2; `seed_2` holds two numbers in [0, 2^32), on x's device."""

    @staticmethod
    def forward(
        context: Any,
        x_ND: Tensor,
        weight1_FD: Tensor,
        bias1_F: Tensor,
        weight2_DF: Tensor,
        bias2_D: Tensor,
        drop: float,
        seed_2: Tensor,
    ) -> Tensor:
        context.dtypes = [tensor.dtype for tensor in (x_ND, weight1_FD, bias1_F, weight2_DF, bias2_D)]
        weight1_FD, weight2_DF = weight1_FD.to(x_ND.dtype), weight2_DF.to(x_ND.dtype)
        tensors = [tensor.contiguous() for tensor in (x_ND, weight1_FD, bias1_F, weight2_DF, seed_2)]
        units, width = weight1_FD.shape
        context.constants = constants = {"F": units, **_sizes(width), "DROP": min(round(drop * 2**32), 2**32 - 1)}
        y_ND = torch.empty_like(tensors[0], dtype=torch.float32)
        _feed_forward[(triton.cdiv(len(x_ND), constants["BLOCK"]),)](
            *tensors, bias2_D.contiguous(), y_ND, len(x_ND), **constants
        )
        context.save_for_backward(*tensors)
        return y_ND.to(x_ND.dtype)

    @staticmethod
    def backward(context: Any, d_y_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight1_FD = context.saved_tensors[:2]
        constants, block, positions, (units, width) = (
            context.constants,
            context.constants["BLOCK"],
            len(x_ND),
            weight1_FD.shape,
        )
        tensors = (*context.saved_tensors, d_y_ND.contiguous())
        d_x_ND = torch.empty_like(x_ND, dtype=torch.float32)
        if context.needs_input_grad[0]:
            _feed_forward_d_x[(triton.cdiv(positions, block),)](*tensors, d_x_ND, positions, **constants)
        unit_blocks = triton.cdiv(units, block)
        splits, span = _split(positions, block, unit_blocks)
        sums_S = torch.empty(splits, units * (2 * width + 1), device=x_ND.device)
        _feed_forward_d_weights[unit_blocks, splits](*tensors, sums_S, positions, span, **constants)
        d_weight1, d_weight2, d_bias1_F = sums_S.sum(0).split([units * width, units * width, units])
        gradients = d_x_ND, d_weight1.view(units, width), d_bias1_F, d_weight2.view(width, units), d_y_ND.float().sum(0)
        return *_as(context, gradients), None, None
