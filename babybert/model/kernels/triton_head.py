"""The vocabulary head of narrow models on a GPU without its N x V logits: Triton kernels.

At width 10 the head is limited by memory: plain PyTorch writes and reads logits of N x 147,161 for a dot product of ten
numbers each. Here a block of logits lives in registers and is discarded. The forward keeps the maximum as it goes
(online softmax: Milakov and Gimelshein, 2018), so that no exponential overflows. It also sums e^z W, from which the
gradient of the hidden states follows without a second pass over the vocabulary. The backward computes the logits again
for the gradients of the table and the bias.

`triton_common.py` says what holds for all Triton kernels.

Shapes: N positions, D width, V vocabulary, S splits of a sum whose partial sums are added at the end.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from babybert.model.kernels.triton_common import block_sizes, cast_gradients, dot, requirements, split_sum, tile

__all__ = ["TritonHeadLoss", "requirements"]

NOTHING = constexpr(-1e30)  # below every logit, and finite: a difference of two is not NaN


@triton.jit(do_not_specialize=["N", "span"])
def _head_forward(
    hidden_ND,
    weight_VD,
    bias_V,
    target_N,
    target_logit_N,
    max_SN,
    sum_SN,
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
    target_logit = tl.load(target_logit_N + row, mask=row < N, other=0.0)
    hidden = tile(hidden_ND, row, d, D, target >= 0, d < D)
    maximum = tl.full([BLOCK], NOTHING, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mixed = tl.zeros([BLOCK, PADDED], tl.float32)
    above = tl.zeros([BLOCK], tl.int32)
    if tl.max(target, 0) >= 0:
        for start in range(split * span, tl.minimum(split * span + span, V), BLOCK):
            column = start + tl.arange(0, BLOCK)
            weight = tile(weight_VD, column, d, D, column < V, d < D)
            bias = tl.load(bias_V + column, mask=column < V, other=-float("inf")).to(tl.float32)
            z = dot(hidden, tl.trans(weight)) + bias[None, :]
            if rank_SN is not None:  # `target_logit` was summed in another order: the target may be above itself
                above += tl.sum(((z > target_logit[:, None]) & (column[None, :] != target[:, None])).to(tl.int32), 1)
            larger = tl.maximum(maximum, tl.max(z, 1))
            shrink = tl.exp(maximum - larger)
            p = tl.exp(z - larger[:, None])
            total = total * shrink + tl.sum(p, 1)
            if mixed_SND is not None:
                mixed = mixed * shrink[:, None] + dot(p.to(hidden.dtype), weight)
            maximum = larger
    place = split.to(tl.int64) * N + row
    tl.store(max_SN + place, maximum, mask=row < N)
    tl.store(sum_SN + place, total, mask=row < N)
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
    max_N,
    sum_N,
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
    weight = tile(weight_VD, column, d, D, column < V, d < D)
    bias = tl.load(bias_V + column, mask=column < V, other=-float("inf")).to(tl.float32)
    scale = tl.load(d_loss)
    d_weight = tl.zeros([BLOCK, PADDED], tl.float32)
    d_bias = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        row = start + tl.arange(0, BLOCK)
        target = tl.load(target_N + row, mask=row < N, other=-1).to(tl.int32)
        if tl.max(target, 0) >= 0:
            hidden = tile(hidden_ND, row, d, D, target >= 0, d < D)
            maximum = tl.load(max_N + row, mask=target >= 0, other=float("inf"))  # e^(z - inf) = 0: no gradient
            factor = scale / tl.load(sum_N + row, mask=target >= 0, other=1.0)
            z = dot(weight, tl.trans(hidden)) + bias[:, None]
            # Not e^(z - log_sum): that would have the rounding of a large log_sum.
            d_z = tl.exp(z - maximum[None, :]) * factor[None, :]
            d_z = tl.where(column[:, None] == target[None, :], d_z - scale, d_z)
            d_weight += dot(d_z.to(hidden.dtype), hidden)
            d_bias += tl.sum(d_z, 1)
    tl.store(d_weight_VD + column[:, None] * D + d[None, :], d_weight, mask=(column < V)[:, None] & (d < D)[None, :])
    tl.store(d_bias_V + column, d_bias, mask=column < V)


def _target_weights_and_logits(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor
) -> tuple[Tensor, Tensor]:
    """The targets' rows of the table, and their logits (both fp32); a target of -1 gets those of word 0."""
    index_N = targets_N.clamp(min=0)
    target_weight_ND = weight_VD[index_N].float()
    return target_weight_ND, (hidden_ND.float() * target_weight_ND).sum(-1) + bias_V[index_N].float()


def _head_sums(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    targets_N: Tensor,
    target_logit_N: Tensor,
    with_mixed: bool,
    with_rank: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """For each split of the vocabulary: the maximum m, the sum of e^(z - m), the sum of e^(z - m) W, and the rank.

    The last two are None unless `with_mixed` and `with_rank`.
    """
    positions, width = hidden_ND.shape
    vocab, sizes = len(weight_VD), block_sizes(width)
    row_blocks = triton.cdiv(positions, sizes["BLOCK"])
    splits, span = split_sum(vocab, sizes["BLOCK"], row_blocks)
    max_SN, sum_SN = target_logit_N.new_empty(splits, positions), target_logit_N.new_empty(splits, positions)
    mixed_SND = target_logit_N.new_empty(splits, positions, width) if with_mixed else None
    rank_SN = target_logit_N.new_empty(splits, positions, dtype=torch.int32) if with_rank else None
    inputs = hidden_ND, weight_VD, bias_V, targets_N, target_logit_N
    outputs = max_SN, sum_SN, mixed_SND, rank_SN
    _head_forward[row_blocks, splits](*inputs, *outputs, positions, vocab, span, **sizes)
    return outputs


class TritonHeadLoss(torch.autograd.Function):
    """Sum of the cross entropies (0-dim, fp32), and the targets' ranks (or an empty tensor).

    Rows whose target is -1 are skipped: loss 0, rank 0, no gradient.
    """

    @staticmethod
    def forward(
        context: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor, with_rank: bool
    ) -> tuple[Tensor, Tensor]:
        context.dtypes = hidden_ND.dtype, weight_VD.dtype, bias_V.dtype
        hidden_ND, bias_V, targets_N = hidden_ND.contiguous(), bias_V.contiguous(), targets_N.contiguous()
        weight_VD = weight_VD.to(hidden_ND.dtype).contiguous()
        inputs = hidden_ND, weight_VD, bias_V, targets_N
        target_weight_ND, target_logit_N = _target_weights_and_logits(*inputs)
        with_mixed = context.needs_input_grad[0]
        max_SN, sum_SN, mixed_SND, rank_SN = _head_sums(*inputs, target_logit_N, with_mixed, with_rank)
        has_target_N, max_N = targets_N >= 0, max_SN.amax(0)
        rescale_SN = (max_SN - max_N).exp()
        sum_N = torch.where(has_target_N, (sum_SN * rescale_SN).sum(0), 1)
        loss_sum = torch.where(has_target_N, max_N - target_logit_N + sum_N.log(), 0).sum()
        d_hidden_ND = None
        if mixed_SND is not None:  # the mean row of the table, by probability, minus the target's row
            mean_ND = (mixed_SND * (rescale_SN / sum_N)[:, :, None]).sum(0)
            d_hidden_ND = torch.where(has_target_N[:, None], mean_ND - target_weight_ND, 0)
        context.save_for_backward(*inputs, max_N, sum_N, d_hidden_ND)
        rank_N = targets_N.new_empty(0) if rank_SN is None else rank_SN.sum(0)
        context.mark_non_differentiable(rank_N)
        return loss_sum, rank_N

    @staticmethod
    def backward(context: Any, d_loss: Tensor, d_rank: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, targets_N, max_N, sum_N, d_hidden_ND = context.saved_tensors
        vocab, sizes = len(weight_VD), block_sizes(weight_VD.shape[1])
        d_weight_VD = torch.empty_like(weight_VD, dtype=torch.float32)
        d_bias_V = torch.empty_like(bias_V, dtype=torch.float32)
        if context.needs_input_grad[1] or context.needs_input_grad[2]:
            inputs = hidden_ND, weight_VD, bias_V, targets_N, max_N, sum_N, d_loss
            programs = triton.cdiv(vocab, sizes["BLOCK"])
            _head_backward[(programs,)](*inputs, d_weight_VD, d_bias_V, len(targets_N), vocab, **sizes)
        if d_hidden_ND is not None:
            d_hidden_ND = d_loss * d_hidden_ND
        return *cast_gradients((d_hidden_ND, d_weight_VD, d_bias_V), context.dtypes), None, None
