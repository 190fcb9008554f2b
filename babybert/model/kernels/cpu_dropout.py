"""Dropout on a CPU by a hash of (row, column, seed): torch's own draws from a generator, one number after the other.

Nothing is kept for the backward but the seed: it hashes again.

Shapes: N rows, D columns.
"""

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from babybert.model.kernels.cpu_math import bits_of, compiled, dropout_numbers, row_key, threads_for


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


kernels = compiled(_make)


def supports(x: Tensor) -> bool:
    """Whether this kernel is made for such a tensor."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0


def _drop_out(x: Tensor, drop: float, seed_2: Tensor) -> Tensor:
    x_ND, y = x.contiguous().view(-1, x.shape[-1]), torch.empty(x.shape)
    (drop_out,) = kernels(0)  # of any width
    drop_out(x_ND.numpy(), y.view(x_ND.shape).numpy(), *dropout_numbers(drop, seed_2), threads_for(x.numel(), 2**14))
    return y


class CpuDropout(torch.autograd.Function):
    """`x`, each number of it 0 with probability `drop` and else divided by 1 - drop; of any shape, in fp32."""

    @staticmethod
    def forward(context: Any, x: Tensor, drop: float, seed_2: Tensor) -> Tensor:
        context.drop, context.seed_2 = drop, seed_2
        return _drop_out(x.detach(), drop, seed_2)

    @staticmethod
    def backward(context: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return _drop_out(d_outputs[0], context.drop, context.seed_2), None, None
