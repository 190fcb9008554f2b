"""A narrow model's feed-forward on a CPU without its N x F hidden units: numba kernels with their own dropout.

In plain torch, 10 -> 2048 -> 10 writes and reads 2048 numbers a position half a dozen times and draws as many random
numbers from a serial generator. Here a block of hidden units is computed, dropped out, used and forgotten; the backward
computes it again, two positions at a time. Which units are dropped is a hash of (row, unit, seed), the same in both.

Shapes: N positions, D width, F hidden units, T threads.
"""

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from babybert.model.kernels.cpu_math import aligned, bits_of, compiled, dropout_numbers, row_key, threads_for

BLOCK = 128  # hidden units at a time: both tables of them, and their gradients, fit a core's first cache
WIDEST, WIDEST_WITH_DROPOUT = 16, 32  # beyond them the matrix products of the plain form win (benchmarks/kernels.py)


@njit(inline="always", fastmath=True)
def _load_block(weight1_FD, bias1_F, weight2_DF, first, own, table1, bias1, table2):
    """Units `first` to `first + own`, as columns; what fills the block gives 0 and has no gradient."""
    for v in range(own):
        bias1[v] = bias1_F[first + v]
        for d in range(table1.shape[0]):
            table1[d, v], table2[d, v] = weight1_FD[first + v, d], weight2_DF[d, first + v]
    for v in range(own, BLOCK):
        bias1[v] = 0
        for d in range(table1.shape[0]):
            table1[d, v], table2[d, v] = 0, 0


@njit(inline="always", fastmath=True)
def _units_of(width, x, d_y, table1, bias1, table2, key, first, threshold, scale, a, g):
    """The block's hidden units in `a`, and the gradients of what went into them in `g`."""
    for v in range(BLOCK):
        z, r = bias1[v], np.float32(0)
        for d in range(width):
            z += x[d] * table1[d, v]
        for d in range(width):
            r += d_y[d] * table2[d, v]
        factor = scale if (bits_of(key, first + v) >= threshold) & (z > 0) else np.float32(0)
        a[v], g[v] = z * factor, r * factor


def _make(width: int, cache: bool) -> tuple[Any, Any]:
    D = width

    @njit(parallel=True, fastmath=True, cache=cache)
    def forward(x_ND, weight1_FD, bias1_F, weight2_DF, y_ND, seed0, seed1, threshold, scale, threads):
        rows, units = x_ND.shape[0], bias1_F.shape[0]
        for thread in prange(threads):
            table1, table2 = aligned(D * BLOCK).reshape((D, BLOCK)), aligned(D * BLOCK).reshape((D, BLOCK))
            bias1, a = aligned(BLOCK), aligned(BLOCK)
            for first in range(0, units, BLOCK):
                _load_block(weight1_FD, bias1_F, weight2_DF, first, min(BLOCK, units - first), table1, bias1, table2)
                for n in range(rows * thread // threads, rows * (thread + 1) // threads):
                    x, key = x_ND[n], row_key(n, seed0, seed1)
                    for v in range(BLOCK):
                        z = bias1[v]
                        for d in range(D):
                            z += x[d] * table1[d, v]
                        factor = scale if (bits_of(key, first + v) >= threshold) & (z > 0) else np.float32(0)
                        a[v] = z * factor
                    for d in range(D):
                        total = np.float32(0)
                        for v in range(BLOCK):
                            total += a[v] * table2[d, v]
                        y_ND[n, d] += total

    @njit(parallel=True, fastmath=True, cache=cache)
    def backward(
        x_ND,
        weight1_FD,
        bias1_F,
        weight2_DF,
        d_y_ND,
        d_x_ND,
        d_weight1_TFD,
        d_bias1_TF,
        d_weight2_TDF,
        seed0,
        seed1,
        threshold,
        scale,
    ):
        threads, rows, units = d_bias1_TF.shape[0], x_ND.shape[0], bias1_F.shape[0]
        for thread in prange(threads):
            table1, table2, bias1 = (
                aligned(D * BLOCK).reshape((D, BLOCK)),
                aligned(D * BLOCK).reshape((D, BLOCK)),
                aligned(BLOCK),
            )
            d_table1, d_table2, d_bias1 = (
                aligned(D * BLOCK).reshape((D, BLOCK)),
                aligned(D * BLOCK).reshape((D, BLOCK)),
                aligned(BLOCK),
            )
            a1, a2, g1, g2 = aligned(BLOCK), aligned(BLOCK), aligned(BLOCK), aligned(BLOCK)
            begin, end = rows * thread // threads, rows * (thread + 1) // threads
            for first in range(0, units, BLOCK):
                own = min(BLOCK, units - first)
                _load_block(weight1_FD, bias1_F, weight2_DF, first, own, table1, bias1, table2)
                d_table1[:], d_table2[:], d_bias1[:] = 0, 0, 0
                for n1 in range(begin, end, 2):
                    n2 = min(n1 + 1, end - 1)
                    scale2 = scale if n2 > n1 else np.float32(0)  # of an odd number, the last is its own partner
                    x1, x2, d_y1, d_y2 = x_ND[n1], x_ND[n2], d_y_ND[n1], d_y_ND[n2]
                    _units_of(
                        D, x1, d_y1, table1, bias1, table2, row_key(n1, seed0, seed1), first, threshold, scale, a1, g1
                    )
                    _units_of(
                        D, x2, d_y2, table1, bias1, table2, row_key(n2, seed0, seed1), first, threshold, scale2, a2, g2
                    )
                    for v in range(BLOCK):
                        d_bias1[v] += g1[v] + g2[v]
                    for d in range(D):
                        in1, in2, out1, out2, total1, total2 = (
                            x1[d],
                            x2[d],
                            d_y1[d],
                            d_y2[d],
                            np.float32(0),
                            np.float32(0),
                        )
                        for v in range(BLOCK):
                            d_table1[d, v] += g1[v] * in1 + g2[v] * in2
                            d_table2[d, v] += a1[v] * out1 + a2[v] * out2
                            total1 += g1[v] * table1[d, v]
                            total2 += g2[v] * table1[d, v]
                        d_x_ND[n1, d] += total1
                        d_x_ND[n2, d] += total2
                for v in range(own):
                    d_bias1_TF[thread, first + v] = d_bias1[v]
                    for d in range(D):
                        d_weight1_TFD[thread, first + v, d], d_weight2_TDF[thread, d, first + v] = (
                            d_table1[d, v],
                            d_table2[d, v],
                        )

    return forward, backward


kernels = compiled(_make)


def supports(x_ND: Tensor, weight1_FD: Tensor, drop: float) -> bool:
    """Whether these kernels are made for such tensors, and faster than PyTorch's operations."""
    widest = WIDEST_WITH_DROPOUT if drop else WIDEST
    return (
        weight1_FD.device.type == "cpu"
        and weight1_FD.dtype == torch.float32
        and weight1_FD.shape[1] <= widest
        and len(x_ND) > 0
    )


class CpuFeedForward(torch.autograd.Function):
    """`dropout(relu(x @ weight1.T + bias1)) @ weight2.T + bias2` of N rows (N, D)."""

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
        context.dtype, x_ND = x_ND.dtype, x_ND.float().contiguous()
        y_ND = bias2_D.expand_as(x_ND).contiguous()
        forward, _ = kernels(x_ND.shape[1])
        weights = weight1_FD.numpy(), bias1_F.numpy(), weight2_DF.numpy()
        forward(x_ND.numpy(), *weights, y_ND.numpy(), *dropout_numbers(drop, seed_2), threads_for(len(x_ND), 16))
        context.save_for_backward(x_ND, weight1_FD, bias1_F, weight2_DF, seed_2)
        context.drop = drop
        return y_ND.to(context.dtype)

    @staticmethod
    def backward(context: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight1_FD, bias1_F, weight2_DF, seed_2 = context.saved_tensors
        d_y_ND = d_outputs[0].float().contiguous()
        threads = threads_for(len(x_ND), 16)
        d_x_ND = torch.zeros_like(x_ND)
        d_weight1_TFD, d_bias1_TF, d_weight2_TDF = (
            torch.empty(threads, *weight.shape) for weight in (weight1_FD, bias1_F, weight2_DF)
        )
        outputs = d_x_ND, d_weight1_TFD, d_bias1_TF, d_weight2_TDF
        _, backward = kernels(x_ND.shape[1])
        arrays = [tensor.numpy() for tensor in (x_ND, weight1_FD, bias1_F, weight2_DF, d_y_ND, *outputs)]
        backward(*arrays, *dropout_numbers(context.drop, seed_2))
        return (
            d_x_ND.to(context.dtype),
            d_weight1_TFD.sum(0),
            d_bias1_TF.sum(0),
            d_weight2_TDF.sum(0),
            d_y_ND.sum(0),
            None,
            None,
        )
