"""A residual sum and its layer norm in one pass, forward and backward: fp32 residual stream, bf16 sublayers.

    sum = x + dropout(y + bias)        normed = layer_norm(sum)

`y` is a sublayer's product, without its bias. In a pre-norm network the stream goes on with `sum`, in a post-norm one
with `normed`. The next sublayer reads `normed` in bf16. PyTorch needs five passes forward and seven backward.

Shapes: N rows, D width, T threads.

In the kernels, `key` is a row's part of the dropout hash; a `threshold` of 0 means no dropout.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from babybert.jit import compile_kernels
from babybert.model.kernels.cpu_bf16_math import ROWS_PER_THREAD, bits_array, narrow, widen
from babybert.model.kernels.cpu_math import aligned, bits_of, dropout_constants, row_key, threads_for

EPSILON = 1e-5  # of `nn.LayerNorm`


@njit(inline="always", fastmath=True)
def _add(x, y, bias_D, key, threshold, scale, row):
    """One row of `x + dropout(y + bias)`."""
    if threshold > 0:
        for d in range(len(row)):
            kept = bits_of(key, d) >= threshold
            row[d] = x[d] + (widen(y[d]) + bias_D[d]) * (scale if kept else np.float32(0))
    else:
        for d in range(len(row)):
            row[d] = x[d] + (widen(y[d]) + bias_D[d])


@njit(inline="always", fastmath=True)
def _mean_and_rstd(row):
    total, squares = np.float32(0), np.float32(0)
    for d in range(len(row)):
        total += row[d]
    mean = np.float32(total / np.float32(len(row)))
    for d in range(len(row)):
        squares += (row[d] - mean) * (row[d] - mean)
    return mean, np.float32(1 / np.sqrt(squares / np.float32(len(row)) + np.float32(EPSILON)))


@njit(inline="always", fastmath=True)
def _norm_gradient(g, row, mean, rstd, weight_D, d_weight, d_shift):
    """Turn the gradient `g` of a normed row into that of the row; add to the gradients of weight and shift."""
    D = len(g)
    total, product = np.float32(0), np.float32(0)
    for d in range(D):
        unit = (row[d] - mean) * rstd
        d_weight[d] += g[d] * unit
        d_shift[d] += g[d]
        a = g[d] * weight_D[d]
        total += a
        product += a * unit
    total, product = np.float32(total / np.float32(D)), np.float32(product / np.float32(D))
    for d in range(D):
        g[d] = rstd * (g[d] * weight_D[d] - total - (row[d] - mean) * rstd * product)


@njit(inline="always", fastmath=True)
def _store_gradients(d_sum, key, threshold, scale, d_y, d_bias):
    """A row of the gradient by `y`, in bf16, and its share of the bias's."""
    for d in range(len(d_sum)):
        g = d_sum[d]
        if threshold > 0:
            g *= scale if bits_of(key, d) >= threshold else np.float32(0)
        d_bias[d] += g
        d_y[d] = narrow(g)


def _make(width: int, cache: bool) -> tuple[Any, Any]:
    @njit(parallel=True, fastmath=True, cache=cache)
    def forward(x_ND, y_ND, bias_D, weight_D, shift_D, sum_ND, out_ND, normed_ND, mean_N, rstd_N,
                has_y, has_out, seed0, seed1, threshold, scale, threads):  # fmt: skip
        rows, columns = x_ND.shape
        for thread in prange(threads):
            row = aligned(columns)
            for n in range(rows * thread // threads, rows * (thread + 1) // threads):
                if has_y:
                    _add(x_ND[n], y_ND[n], bias_D, row_key(n, seed0, seed1), threshold, scale, row)
                    for d in range(columns):
                        sum_ND[n, d] = row[d]
                else:
                    for d in range(columns):
                        row[d] = x_ND[n, d]
                mean, rstd = _mean_and_rstd(row)
                mean_N[n], rstd_N[n] = mean, rstd
                for d in range(columns):
                    row[d] = (row[d] - mean) * rstd * weight_D[d] + shift_D[d]
                for d in range(columns):
                    normed_ND[n, d] = narrow(row[d])
                if has_out:
                    for d in range(columns):
                        out_ND[n, d] = row[d]

    @njit(parallel=True, fastmath=True, cache=cache)
    def backward(d_normed_ND, d_stream_ND, sum_ND, mean_N, rstd_N, weight_D, d_y_ND, d_weight_TD, d_shift_TD, d_bias_TD,
                 has_stream, is_pre, has_y, seed0, seed1, threshold, scale):  # fmt: skip
        threads, (rows, columns) = len(d_weight_TD), sum_ND.shape
        for thread in prange(threads):
            g = aligned(columns)
            d_weight, d_shift, d_bias = d_weight_TD[thread], d_shift_TD[thread], d_bias_TD[thread]
            for n in range(rows * thread // threads, rows * (thread + 1) // threads):
                d_stream = d_stream_ND[n]
                for d in range(columns):
                    g[d] = widen(d_normed_ND[n, d])
                if has_stream and not is_pre:
                    for d in range(columns):
                        g[d] += d_stream[d]
                _norm_gradient(g, sum_ND[n], mean_N[n], rstd_N[n], weight_D, d_weight, d_shift)
                if has_stream and is_pre:
                    for d in range(columns):
                        g[d] += d_stream[d]
                for d in range(columns):
                    d_stream[d] = g[d]
                if has_y:
                    _store_gradients(g, row_key(n, seed0, seed1), threshold, scale, d_y_ND[n], d_bias)

    return forward, backward


kernels_for = compile_kernels(_make)  # one pair of kernels for all widths: it is always asked for with 0


class AddNorm(NamedTuple):
    """What the backward of one residual sum and its norm needs."""

    sum_ND: Tensor
    mean_N: np.ndarray
    rstd_N: np.ndarray
    weight_D: Tensor
    is_pre: bool
    has_y: bool
    dropout: tuple[np.uint32, np.uint32, np.uint32, np.float32]


class NormGradients(NamedTuple):
    """Gradients of `add_norm`'s inputs. Those of `y` are in bf16, the others in fp32."""

    x_ND: Tensor
    y_ND: Tensor
    bias_D: Tensor
    weight_D: Tensor
    shift_D: Tensor


def add_norm(
    x_ND: Tensor,
    update: tuple[Tensor, Tensor] | None,
    norm: tuple[Tensor, Tensor],
    is_pre: bool,
    dropout_p: float = 0.0,
    seed_2: Tensor | None = None,
) -> tuple[Tensor, Tensor, AddNorm]:
    """The stream (N, D, fp32), the normed sum (N, D, bf16), and what the backward needs.

    `update` is y (bf16) and its bias. Without them, the sum is x.
    """
    weight_D, shift_D = (parameter.detach() for parameter in norm)
    rows, width = x_ND.shape
    has_y, has_out = update is not None, not is_pre
    sum_ND = torch.empty_like(x_ND) if has_y else x_ND
    out_ND = torch.empty_like(x_ND) if has_out else x_ND[:0]
    normed_ND = torch.empty(rows, width, dtype=torch.bfloat16)
    y_ND, bias_D = update if update is not None else (normed_ND, shift_D)
    mean_N, rstd_N = np.empty(rows, np.float32), np.empty(rows, np.float32)
    dropout = dropout_constants(dropout_p, torch.zeros(2) if seed_2 is None else seed_2)
    forward, _ = kernels_for(0)
    forward(x_ND.numpy(), bits_array(y_ND), bias_D.detach().numpy(), weight_D.numpy(), shift_D.numpy(),
            sum_ND.numpy(), out_ND.numpy(), bits_array(normed_ND), mean_N, rstd_N, has_y, has_out, *dropout,
            threads_for(rows, ROWS_PER_THREAD))  # fmt: skip
    saved = AddNorm(sum_ND, mean_N, rstd_N, weight_D, is_pre, has_y, dropout)
    return (out_ND if has_out else sum_ND), normed_ND, saved


def add_norm_backward(saved: AddNorm, d_normed_ND: Tensor, d_stream_ND: Tensor | None) -> NormGradients:
    """The gradients. `d_stream_ND` (fp32) is overwritten; None stands for zeros."""
    rows, width = saved.sum_ND.shape
    has_stream = d_stream_ND is not None
    d_x_ND = d_stream_ND if d_stream_ND is not None else torch.empty(rows, width)
    d_y_ND = torch.empty(rows if saved.has_y else 0, width, dtype=torch.bfloat16)
    sums_3TD = torch.zeros(3, threads_for(rows, ROWS_PER_THREAD), width)
    d_weight_TD, d_shift_TD, d_bias_TD = sums_3TD.numpy()
    _, backward = kernels_for(0)
    backward(bits_array(d_normed_ND), d_x_ND.numpy(), saved.sum_ND.numpy(), saved.mean_N, saved.rstd_N,
             saved.weight_D.numpy(), bits_array(d_y_ND), d_weight_TD, d_shift_TD, d_bias_TD, has_stream, saved.is_pre,
             saved.has_y, *saved.dropout)  # fmt: skip
    d_weight_D, d_shift_D, d_bias_D = sums_3TD.sum(1)
    return NormGradients(d_x_ND, d_y_ND, d_bias_D, d_weight_D, d_shift_D)
