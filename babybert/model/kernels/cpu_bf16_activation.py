"""The bias and the activation of a feed-forward's hidden units in bf16, with the activation's derivative.

A bf16 number has 65,536 values, so an activation and its derivative are a table: 256 KB, of which usual numbers use a
few. The forward stores the derivative, and the backward is a product. The gradient of the bias is added up on the way.

Shapes: N rows, F hidden units, T threads.
"""

import functools
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from babybert.jit import compile_kernels
from babybert.model.kernels.cpu_bf16_math import ROWS_PER_THREAD, bits_array, narrow, widen
from babybert.model.kernels.cpu_math import bits_of, dropout_constants, row_key, threads_for


@functools.cache
def _table(activation: str) -> np.ndarray:
    """For each bf16 number, by its bits: the activation in the upper 16 bits and its derivative in the lower ones."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    x = bits.view(torch.bfloat16).double()
    if activation == "gelu":
        below = torch.special.ndtr(x)  # the share of a normal distribution below x
        density = torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5
        y, derivative = x * below, below + x * density
        y[x == -torch.inf], derivative[x.isinf()] = 0, (x[x.isinf()] > 0).double()
    else:
        y, derivative = x.relu(), (x > 0).double()
    upper, lower = (bits_array(values.bfloat16()).astype(np.uint32) for values in (y, derivative))
    return np.asarray(upper << 16 | lower)


def _make(width: int, cache: bool) -> tuple[Any, Any]:
    @njit(parallel=True, fastmath=True, cache=cache)
    def forward(h_NF, bias_F, table, a_NF, slope_NF, seed0, seed1, threshold, scale, threads):
        rows, units = h_NF.shape
        for thread in prange(threads):
            for n in range(rows * thread // threads, rows * (thread + 1) // threads):
                for f in range(units):
                    both = table[narrow(widen(h_NF[n, f]) + bias_F[f])]
                    a_NF[n, f] = np.uint16(both >> np.uint32(16))
                    slope_NF[n, f] = np.uint16(both)
                if threshold > 0:
                    key = row_key(n, seed0, seed1)
                    for f in range(units):
                        factor = scale if bits_of(key, f) >= threshold else np.float32(0)
                        a_NF[n, f] = narrow(widen(a_NF[n, f]) * factor)
                        slope_NF[n, f] = narrow(widen(slope_NF[n, f]) * factor)

    @njit(parallel=True, fastmath=True, cache=cache)
    def backward(d_NF, slope_NF, d_bias_TF):
        threads, (rows, units) = len(d_bias_TF), d_NF.shape
        for thread in prange(threads):
            d_bias = d_bias_TF[thread]
            for n in range(rows * thread // threads, rows * (thread + 1) // threads):
                for f in range(units):
                    g = widen(d_NF[n, f]) * widen(slope_NF[n, f])
                    d_bias[f] += g
                    d_NF[n, f] = narrow(g)

    return forward, backward


kernels_for = compile_kernels(_make)  # one pair of kernels for all widths: it is always asked for with 0


def activate(
    h_NF: Tensor, bias_F: Tensor, activation: str, dropout_p: float = 0.0, seed_2: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`dropout(activation(h + bias))` in bf16, and its derivative by h. It overwrites `h_NF` with the derivative."""
    a_NF, slope_NF = torch.empty_like(h_NF), h_NF
    dropout = dropout_constants(dropout_p, torch.zeros(2) if seed_2 is None else seed_2)
    forward, _ = kernels_for(0)
    forward(bits_array(h_NF), bias_F.detach().numpy(), _table(activation), bits_array(a_NF), bits_array(slope_NF),
            *dropout, threads_for(len(h_NF), ROWS_PER_THREAD))  # fmt: skip
    return a_NF, slope_NF


def activate_backward(d_a_NF: Tensor, slope_NF: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients by `h` (bf16, in place of `d_a_NF`) and by the bias (fp32)."""
    d_bias_TF = torch.zeros(threads_for(len(d_a_NF), ROWS_PER_THREAD), d_a_NF.shape[1])
    _, backward = kernels_for(0)
    backward(bits_array(d_a_NF), bits_array(slope_NF), d_bias_TF.numpy())
    return d_a_NF, d_bias_TF.sum(0)
