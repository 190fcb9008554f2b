"""A narrow model's feed-forward on a CPU without its N x F hidden units: numba kernels with dropout inside.

In plain PyTorch, 10 -> 2048 -> 10 writes and reads 2048 numbers a position half a dozen times, and draws as many random
numbers from a serial generator. Here a block of hidden units is computed, dropped out, used and discarded. The backward
computes it again, two positions at a time: each gradient of a weight is loaded and stored once for both. Which units
are dropped is a hash of (row, unit, seed), the same in both directions.

A block's weights are copied to (D, BLOCK), so that the innermost loops run over neighbouring units and vectorise. The
width D is a constant of the compiled code: its loops are unrolled.

Shapes: N positions, D width, F hidden units, T threads.
"""

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from babybert.jit import compile_kernels
from babybert.model.kernels import Requirements
from babybert.model.kernels.cpu_math import aligned, bits_of, dropout_constants, row_key, threads_for

BLOCK = 128  # hidden units at a time: two weight tables and their gradients fit a core's first-level cache
WIDEST, WIDEST_WITH_DROPOUT = 16, 32  # above them PyTorch's matrix products are faster (benchmarks/kernels.py)
ROWS_PER_THREAD = 16  # fewer are not worth a thread's start


@njit(inline="always", fastmath=True)
def _load_block(weight1_FD, bias1_F, weight2_DF, first, size, table1, bias1, table2):
    """Units `first` to `first + size`, as columns. The rest of the block is zero: output 0, gradient 0."""
    for v in range(size):
        bias1[v] = bias1_F[first + v]
        for d in range(table1.shape[0]):
            table1[d, v], table2[d, v] = weight1_FD[first + v, d], weight2_DF[d, first + v]
    for v in range(size, BLOCK):
        bias1[v] = 0
        for d in range(table1.shape[0]):
            table1[d, v], table2[d, v] = 0, 0


@njit(inline="always", fastmath=True)
def _add_outputs(D, x, table1, bias1, table2, key, first, threshold, scale, a, y):
    """Compute one position's hidden units of a block into `a`, and add what they give to its output `y`."""
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
        y[d] += total


@njit(inline="always", fastmath=True)
def _hidden_units(D, x, d_y, table1, bias1, table2, key, first, threshold, scale, a, g):
    """One position's hidden units of a block in `a`, and the gradients of their inputs in `g`."""
    for v in range(BLOCK):
        z, r = bias1[v], np.float32(0)
        for d in range(D):
            z += x[d] * table1[d, v]
        for d in range(D):
            r += d_y[d] * table2[d, v]
        factor = scale if (bits_of(key, first + v) >= threshold) & (z > 0) else np.float32(0)
        a[v], g[v] = z * factor, r * factor


@njit(inline="always", fastmath=True)
def _add_gradients(D, x1, x2, d_y1, d_y2, a1, a2, g1, g2, table1, d_table1, d_table2, d_bias1, d_x1, d_x2):
    """Add two positions' share to a block's gradients, and the block's share to the positions' gradients."""
    for v in range(BLOCK):
        d_bias1[v] += g1[v] + g2[v]
    for d in range(D):
        in1, in2, out1, out2 = x1[d], x2[d], d_y1[d], d_y2[d]
        total1, total2 = np.float32(0), np.float32(0)
        for v in range(BLOCK):
            d_table1[d, v] += g1[v] * in1 + g2[v] * in2
            d_table2[d, v] += a1[v] * out1 + a2[v] * out2
            total1 += g1[v] * table1[d, v]
            total2 += g2[v] * table1[d, v]
        d_x1[d] += total1
        d_x2[d] += total2


@njit(inline="always", fastmath=True)
def _store_block(D, d_table1, d_table2, d_bias1, first, size, d_weight1_FD, d_weight2_DF, d_bias1_F):
    """Copy a block's gradients back to the layout of the weights."""
    for v in range(size):
        d_bias1_F[first + v] = d_bias1[v]
        for d in range(D):
            d_weight1_FD[first + v, d], d_weight2_DF[d, first + v] = d_table1[d, v], d_table2[d, v]


def _make(width: int, cache: bool) -> tuple[Any, Any]:
    return _make_forward(width, cache), _make_backward(width, cache)


def _make_forward(width: int, cache: bool) -> Any:
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
                    key = row_key(n, seed0, seed1)
                    _add_outputs(D, x_ND[n], table1, bias1, table2, key, first, threshold, scale, a, y_ND[n])

    return forward


def _make_backward(width: int, cache: bool) -> Any:
    D = width

    @njit(parallel=True, fastmath=True, cache=cache)
    def backward(x_ND, weight1_FD, bias1_F, weight2_DF, d_y_ND, d_x_ND, d_weight1_TFD, d_bias1_TF, d_weight2_TDF,
                 seed0, seed1, threshold, scale):  # fmt: skip
        threads, rows, units = d_bias1_TF.shape[0], x_ND.shape[0], bias1_F.shape[0]
        for thread in prange(threads):
            table1, table2 = aligned(D * BLOCK).reshape((D, BLOCK)), aligned(D * BLOCK).reshape((D, BLOCK))
            d_table1, d_table2 = aligned(D * BLOCK).reshape((D, BLOCK)), aligned(D * BLOCK).reshape((D, BLOCK))
            bias1, d_bias1 = aligned(BLOCK), aligned(BLOCK)
            a1, a2, g1, g2 = aligned(BLOCK), aligned(BLOCK), aligned(BLOCK), aligned(BLOCK)
            begin, end = rows * thread // threads, rows * (thread + 1) // threads
            for first in range(0, units, BLOCK):
                size = min(BLOCK, units - first)
                _load_block(weight1_FD, bias1_F, weight2_DF, first, size, table1, bias1, table2)
                d_table1[:], d_table2[:], d_bias1[:] = 0, 0, 0
                for n1 in range(begin, end, 2):
                    # The last of an odd number of positions is paired with itself, at a scale of 0.
                    n2 = min(n1 + 1, end - 1)
                    scale2 = scale if n2 > n1 else np.float32(0)
                    x1, x2, d_y1, d_y2 = x_ND[n1], x_ND[n2], d_y_ND[n1], d_y_ND[n2]
                    key1, key2 = row_key(n1, seed0, seed1), row_key(n2, seed0, seed1)
                    _hidden_units(D, x1, d_y1, table1, bias1, table2, key1, first, threshold, scale, a1, g1)
                    _hidden_units(D, x2, d_y2, table1, bias1, table2, key2, first, threshold, scale2, a2, g2)
                    d_x1, d_x2 = d_x_ND[n1], d_x_ND[n2]
                    _add_gradients(
                        D, x1, x2, d_y1, d_y2, a1, a2, g1, g2, table1, d_table1, d_table2, d_bias1, d_x1, d_x2
                    )
                d_weight1_FD, d_weight2_DF, d_bias1_F = d_weight1_TFD[thread], d_weight2_TDF[thread], d_bias1_TF[thread]
                _store_block(D, d_table1, d_table2, d_bias1, first, size, d_weight1_FD, d_weight2_DF, d_bias1_F)

    return backward


kernels_for = compile_kernels(_make)  # by width


def requirements(x_ND: Tensor, weight1_FD: Tensor, dropout_p: float) -> Requirements:
    """What must hold for these kernels to be correct and faster than PyTorch's operations."""
    widest = WIDEST_WITH_DROPOUT if dropout_p else WIDEST
    return {
        "on a CPU": weight1_FD.device.type == "cpu",
        "fp32 weights": weight1_FD.dtype == torch.float32,
        f"width <= {WIDEST} ({WIDEST_WITH_DROPOUT} with dropout)": weight1_FD.shape[1] <= widest,
        "at least one position": len(x_ND) > 0,
    }


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
        dropout_p: float,
        seed_2: Tensor,
    ) -> Tensor:
        context.dtype = x_ND.dtype
        x_ND = x_ND.float().contiguous()
        y_ND = bias2_D.repeat(len(x_ND), 1)  # a copy, also of a single row: the kernel adds to it
        weights = weight1_FD.numpy(), bias1_F.numpy(), weight2_DF.numpy()
        constants = dropout_constants(dropout_p, seed_2)
        forward, _ = kernels_for(x_ND.shape[1])
        forward(x_ND.numpy(), *weights, y_ND.numpy(), *constants, threads_for(len(x_ND), ROWS_PER_THREAD))
        context.save_for_backward(x_ND, weight1_FD, bias1_F, weight2_DF, seed_2)
        context.dropout_p = dropout_p
        return y_ND.to(context.dtype)

    @staticmethod
    def backward(context: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight1_FD, bias1_F, weight2_DF, seed_2 = context.saved_tensors
        d_y_ND, d_x_ND = d_outputs[0].float().contiguous(), torch.zeros_like(x_ND)
        # Each thread has gradients of the weights for its positions; they are added up at the end.
        threads = threads_for(len(x_ND), ROWS_PER_THREAD)
        d_weight1_TFD, d_bias1_TF, d_weight2_TDF = (
            torch.empty(threads, *weight.shape) for weight in (weight1_FD, bias1_F, weight2_DF)
        )
        inputs = x_ND, weight1_FD, bias1_F, weight2_DF, d_y_ND
        outputs = d_x_ND, d_weight1_TFD, d_bias1_TF, d_weight2_TDF
        _, backward = kernels_for(x_ND.shape[1])
        arrays = [tensor.numpy() for tensor in (*inputs, *outputs)]
        backward(*arrays, *dropout_constants(context.dropout_p, seed_2))
        d_weights = d_weight1_TFD.sum(0), d_bias1_TF.sum(0), d_weight2_TDF.sum(0), d_y_ND.sum(0)
        return d_x_ND.to(context.dtype), *d_weights, None, None
