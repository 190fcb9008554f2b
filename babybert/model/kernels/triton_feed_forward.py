"""The feed-forward of narrow models on a GPU without its N x F hidden units: Triton kernels.

At width 10 plain PyTorch writes and reads 2048 hidden units for two dot products of ten numbers each. Here a block of
hidden units lives in registers and is discarded; the backward computes it again, which costs one more narrow product.
Dropout is a hash of (row, unit, seed): the backward computes the same mask without storing it.

`triton_common.py` says what holds for all Triton kernels.

Shapes: N positions, D width, F hidden units, S splits of a sum whose partial sums are added at the end.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from babybert.model.kernels.triton_common import block_sizes, cast_gradients, dot, requirements, split_sum, tile

__all__ = ["TritonFeedForward", "requirements"]

GOLDEN = constexpr(0x9E3779B9)  # 2^32 / golden ratio: neighbouring units get hashes that lie far apart


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
    x = tile(x_ND, row, d, D, row < N, d < D)
    key = _key(row, seed_2)
    y = tl.zeros([BLOCK, PADDED], tl.float32) + tl.load(bias2_D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    for start in range(0, F, BLOCK):
        unit = start + tl.arange(0, BLOCK)
        weight1 = tile(weight1_FD, unit, d, D, unit < F, d < D)
        weight2 = tile(weight2_DF, d, unit, F, d < D, unit < F)
        bias1 = tl.load(bias1_F + unit, mask=unit < F, other=0.0).to(tl.float32)
        hidden = dot(x, tl.trans(weight1)) + bias1[None, :]
        hidden = _drop(_relu(hidden), key[:, None], unit[None, :], DROP)
        y += dot(hidden.to(x.dtype), tl.trans(weight2))
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
    x = tile(x_ND, row, d, D, row < N, d < D)
    d_y = tile(d_y_ND, row, d, D, row < N, d < D)
    key = _key(row, seed_2)
    d_x = tl.zeros([BLOCK, PADDED], tl.float32)
    for start in range(0, F, BLOCK):
        unit = start + tl.arange(0, BLOCK)
        weight1 = tile(weight1_FD, unit, d, D, unit < F, d < D)
        weight2 = tile(weight2_DF, d, unit, F, d < D, unit < F)
        bias1 = tl.load(bias1_F + unit, mask=unit < F, other=0.0).to(tl.float32)
        hidden = dot(x, tl.trans(weight1)) + bias1[None, :]
        d_hidden = _drop(dot(d_y, weight2), key[:, None], unit[None, :], DROP)
        d_x += dot(tl.where(hidden <= 0, 0.0, d_hidden).to(x.dtype), weight1)
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
    weight1 = tile(weight1_FD, unit, d, D, unit < F, d < D)
    weight2 = tile(weight2_DF, d, unit, F, d < D, unit < F)
    bias1 = tl.load(bias1_F + unit, mask=unit < F, other=0.0).to(tl.float32)
    d_weight1 = tl.zeros([BLOCK, PADDED], tl.float32)
    d_weight2 = tl.zeros([BLOCK, PADDED], tl.float32)
    d_bias1 = tl.zeros([BLOCK], tl.float32)
    for start in range(split * span, tl.minimum(split * span + span, N), BLOCK):
        row = start + tl.arange(0, BLOCK)
        x = tile(x_ND, row, d, D, row < N, d < D)
        d_y = tile(d_y_ND, row, d, D, row < N, d < D)
        key = _key(row, seed_2)
        hidden = dot(weight1, tl.trans(x)) + bias1[:, None]
        d_hidden = _drop(dot(tl.trans(weight2), tl.trans(d_y)), key[None, :], unit[:, None], DROP)
        d_hidden = tl.where(hidden <= 0, 0.0, d_hidden)
        hidden = _drop(_relu(hidden), key[None, :], unit[:, None], DROP)
        d_weight2 += dot(hidden.to(x.dtype), d_y)
        d_weight1 += dot(d_hidden.to(x.dtype), x)
        d_bias1 += tl.sum(d_hidden, 1)
    inside = (unit < F)[:, None] & (d < D)[None, :]
    sums = sums_S + split * (2 * F * D + F)
    tl.store(sums + unit[:, None] * D + d[None, :], d_weight1, mask=inside)
    tl.store(sums + F * D + d[None, :] * F + unit[:, None], d_weight2, mask=inside)
    tl.store(sums + 2 * F * D + unit, d_bias1, mask=unit < F)


class TritonFeedForward(torch.autograd.Function):
    """`dropout(relu(x @ weight1.T + bias1)) @ weight2.T + bias2`.

    `seed_2` holds two numbers below 2^32, on x's device.
    Dropout keeps a unit where its hash is at least `DROP`, the probability as a share of 2^32.
    """

    @staticmethod
    def forward(
        context: Any,
        x_ND: Tensor,
        weight1_FD: Tensor,
        bias1_F: Tensor,
        weight2_DF: Tensor,
        bias2_D: Tensor,
        dropout_p: float,
        seed_2: Tensor,
    ) -> Tensor:
        context.dtypes = [tensor.dtype for tensor in (x_ND, weight1_FD, bias1_F, weight2_DF, bias2_D)]
        weight1_FD, weight2_DF = weight1_FD.to(x_ND.dtype), weight2_DF.to(x_ND.dtype)
        inputs = [tensor.contiguous() for tensor in (x_ND, weight1_FD, bias1_F, weight2_DF, seed_2)]
        units, width = weight1_FD.shape
        threshold = min(round(dropout_p * 2**32), 2**32 - 1)
        context.constants = constants = {"F": units, **block_sizes(width), "DROP": threshold}
        y_ND = torch.empty_like(inputs[0], dtype=torch.float32)
        programs = triton.cdiv(len(x_ND), constants["BLOCK"])
        _feed_forward[(programs,)](*inputs, bias2_D.contiguous(), y_ND, len(x_ND), **constants)
        context.save_for_backward(*inputs)
        return y_ND.to(x_ND.dtype)

    @staticmethod
    def backward(context: Any, d_y_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight1_FD = context.saved_tensors[:2]
        positions, (units, width) = len(x_ND), weight1_FD.shape
        constants, block = context.constants, context.constants["BLOCK"]
        inputs = (*context.saved_tensors, d_y_ND.contiguous())
        d_x_ND = torch.empty_like(x_ND, dtype=torch.float32)
        if context.needs_input_grad[0]:
            programs = triton.cdiv(positions, block)
            _feed_forward_d_x[(programs,)](*inputs, d_x_ND, positions, **constants)
        unit_blocks = triton.cdiv(units, block)
        splits, span = split_sum(positions, block, unit_blocks)
        sums_S = torch.empty(splits, units * (2 * width + 1), device=x_ND.device)
        _feed_forward_d_weights[unit_blocks, splits](*inputs, sums_S, positions, span, **constants)
        d_weight1, d_weight2, d_bias1_F = sums_S.sum(0).split([units * width, units * width, units])
        d_bias2_D = d_y_ND.float().sum(0)
        gradients = d_x_ND, d_weight1.view(units, width), d_bias1_F, d_weight2.view(width, units), d_bias2_D
        return *cast_gradients(gradients, context.dtypes), None, None
