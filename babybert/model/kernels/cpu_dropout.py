"""Dropout on a CPU by a hash of (row, column, seed). PyTorch draws each number from a serial generator instead.

Only the seed is kept for the backward, which computes the hash again.

Shapes: N rows, D columns.
"""

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from babybert.jit import compile_kernels
from babybert.model.kernels import Requirements
from babybert.model.kernels.cpu_math import bits_of, dropout_constants, row_key, threads_for

NUMBERS_PER_THREAD = 2**14  # fewer are not worth a thread's start


def _make(width: int, cache: bool) -> tuple[Any]:
    @njit(parallel=True, fastmath=True, cache=cache)
    def drop_out(x_ND, y_ND, seed0, seed1, threshold, scale, threads):
        rows, columns = x_ND.shape
        for thread in prange(threads):
            for n in range(rows * thread // threads, rows * (thread + 1) // threads):
                key = row_key(n, seed0, seed1)
                for d in range(columns):
                    kept = bits_of(key, d) >= threshold
                    y_ND[n, d] = x_ND[n, d] * scale if kept else np.float32(0)

    return (drop_out,)


kernels_for = compile_kernels(_make)  # one kernel for all widths: it is always asked for with 0


def requirements(x: Tensor) -> Requirements:
    """What must hold for this kernel to be correct and faster than PyTorch's dropout."""
    return {
        "on a CPU": x.device.type == "cpu",
        "fp32": x.dtype == torch.float32,
        "at least one number": x.numel() > 0,
    }


def _drop_out(x: Tensor, dropout_p: float, seed_2: Tensor) -> Tensor:
    x_ND, y = x.contiguous().view(-1, x.shape[-1]), torch.empty(x.shape)
    (drop_out,) = kernels_for(0)
    threads = threads_for(x.numel(), NUMBERS_PER_THREAD)
    drop_out(x_ND.numpy(), y.view(x_ND.shape).numpy(), *dropout_constants(dropout_p, seed_2), threads)
    return y


class CpuDropout(torch.autograd.Function):
    """Dropout of `x`, of any shape, in fp32: each number 0 with probability `dropout_p`, else divided by 1 - p."""

    @staticmethod
    def forward(context: Any, x: Tensor, dropout_p: float, seed_2: Tensor) -> Tensor:
        context.dropout_p, context.seed_2 = dropout_p, seed_2
        return _drop_out(x.detach(), dropout_p, seed_2)

    @staticmethod
    def backward(context: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return _drop_out(d_outputs[0], context.dropout_p, context.seed_2), None, None
