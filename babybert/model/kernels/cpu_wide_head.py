"""A wide model's vocabulary head on a CPU: matrix products by PyTorch, and one pass over their logits by numba.

From width 33 on a matrix product is faster than hand-written loops, but what comes after it is memory traffic: PyTorch
adds the bias, seeks the maximum, takes exponentials, compares and sums in nine passes, most of which also write a table
of C x V that the system must first clear. Here a row of logits (0.6 MB at V = 147,161) is turned into its loss, its
rank and its gradient in place, while it lies in the core's second-level cache.

As in `ChunkedHeadLoss`, gradients are computed in the forward, chunk by chunk, for an output gradient of 1.

Shapes: N masked positions, D width, V vocabulary, C rows of a chunk, T threads.
"""

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from babybert.jit import compile_kernels
from babybert.model.kernels import Requirements
from babybert.model.kernels.cpu_math import LANES, aligned, exp, largest_of_row, threads_for

CHUNK = 2**24  # logits at a time: 64 MB; with fewer, the weight's gradient is read and written too often
BLOCK = 4096  # logits of a row whose exponentials are added up in fp32
SMALLEST_VOCABULARY = 4096  # with fewer words PyTorch's passes cost next to nothing


@njit(inline="always", fastmath=True)
def _add_bias(z, bias_V, lanes):
    """Add the bias to a row of products in place; return the largest logit."""
    for v in range(len(z)):
        z[v] += bias_V[v]
    return largest_of_row(z, lanes)


@njit(inline="always", fastmath=True)
def _log_sum_and_rank(z, top, target_logit):
    """The logarithm of the sum of a row's e^logit (fp64), and how many logits are above the target's."""
    vocab, total, above = len(z), 0.0, 0
    for first in range(0, vocab, BLOCK):
        block_total, block_above = np.float32(0), np.int32(0)
        for v in range(first, min(first + BLOCK, vocab)):
            block_total += exp(z[v] - top)
            block_above += np.int32(z[v] > target_logit)
        total += block_total
        above += block_above
    return np.float64(top) + np.log(total), above


@njit(inline="always", fastmath=True)
def _replace_by_gradients(z, target, log_sum, d_bias):
    """Turn a row of logits into their gradients, softmax - one_hot(target), and add them to the bias's."""
    shift = np.float32(log_sum)
    for v in range(len(z)):
        z[v] = exp(min(z[v] - shift, np.float32(0)))
    z[target] -= np.float32(1)
    for v in range(len(z)):
        d_bias[v] += z[v]


def _make(width: int, cache: bool) -> tuple[Any]:
    @njit(parallel=True, fastmath=True, cache=cache)
    def losses(z_CV, bias_V, target_C, log_sum_C, target_logit_C, rank_C, d_bias_TV, with_gradients):
        threads, rows = d_bias_TV.shape[0], z_CV.shape[0]
        for thread in prange(threads):
            lanes = aligned(LANES)
            d_bias = d_bias_TV[thread]
            for c in range(rows * thread // threads, rows * (thread + 1) // threads):
                z, target = z_CV[c], target_C[c]
                top = _add_bias(z, bias_V, lanes)
                target_logit = z[target]
                log_sum, rank = _log_sum_and_rank(z, top, target_logit)
                log_sum_C[c], target_logit_C[c], rank_C[c] = log_sum, target_logit, rank
                if with_gradients:
                    _replace_by_gradients(z, target, log_sum, d_bias)

    return (losses,)


kernels_for = compile_kernels(_make)  # one kernel for all widths: it is always asked for with 0


def requirements(hidden_ND: Tensor, weight_VD: Tensor) -> Requirements:
    """What must hold for this way to be correct and faster than PyTorch's operations."""
    return {
        "on a CPU": weight_VD.device.type == "cpu",
        # Under autocast the matrix products would be in bf16.
        "fp32": hidden_ND.dtype == weight_VD.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"),
        f"vocabulary >= {SMALLEST_VOCABULARY:,}": len(weight_VD) >= SMALLEST_VOCABULARY,
        "at least one position": len(hidden_ND) > 0,
    }


def _losses(
    z_CV: Tensor, bias_V: Tensor, targets_C: Tensor, d_bias_TV: Tensor, with_gradients: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Loss (fp64) and rank of each row of products `z_CV`.

    With gradients, `z_CV` is replaced by the gradients of the losses by the logits, which are also added to
    `d_bias_TV`.
    """
    rows = len(z_CV)
    log_sum_C, target_logit_C, rank_C = np.empty(rows), np.empty(rows, np.float32), np.empty(rows, np.int64)
    inputs = z_CV.numpy(), bias_V.numpy(), targets_C.numpy()
    (losses,) = kernels_for(0)
    losses(*inputs, log_sum_C, target_logit_C, rank_C, d_bias_TV.numpy(), with_gradients)
    return log_sum_C - target_logit_C, rank_C


def _buffers(hidden_ND: Tensor, weight_VD: Tensor) -> tuple[int, Tensor, Tensor]:
    """Rows of a chunk, a buffer for its logits (C, V), and a zeroed one for the bias's gradient (T, V)."""
    vocab = len(weight_VD)
    rows = min(len(hidden_ND), max(1, CHUNK // vocab))
    return rows, hidden_ND.new_empty(rows, vocab), hidden_ND.new_zeros(threads_for(rows, 1), vocab)


def token_losses(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """The cross entropy (fp32) and the target's rank (int64) of each position."""
    rows, z_CV, d_bias_TV = _buffers(hidden_ND, weight_VD)
    losses, ranks = [], []
    for hidden_CD, targets_C in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True):
        products_CV = torch.mm(hidden_CD, weight_VD.T, out=z_CV[: len(hidden_CD)])
        loss_C, rank_C = _losses(products_CV, bias_V, targets_C, d_bias_TV, False)
        losses.append(loss_C)
        ranks.append(rank_C)
    return torch.from_numpy(np.concatenate(losses)).float(), torch.from_numpy(np.concatenate(ranks))


class CpuWideHeadLoss(torch.autograd.Function):
    """Sum of the cross entropies (0-dim, fp32), and the targets' ranks."""

    @staticmethod
    def forward(
        context: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor, with_gradients: bool
    ) -> tuple[Tensor, Tensor]:
        rows, z_CV, d_bias_TV = _buffers(hidden_ND, weight_VD)
        loss_sum, ranks = 0.0, []
        d_hidden_ND, d_weight_VD = (torch.empty_like(x) if with_gradients else x for x in (hidden_ND, weight_VD))
        for first in range(0, len(targets_N), rows):
            hidden_CD = hidden_ND[first : first + rows]
            d_logits_CV = torch.mm(hidden_CD, weight_VD.T, out=z_CV[: len(hidden_CD)])
            loss_C, rank_C = _losses(d_logits_CV, bias_V, targets_N[first : first + rows], d_bias_TV, with_gradients)
            loss_sum += loss_C.sum()
            ranks.append(rank_C)
            if with_gradients:
                torch.mm(d_logits_CV, weight_VD, out=d_hidden_ND[first : first + rows])
                torch.addmm(d_weight_VD, d_logits_CV.T, hidden_CD, beta=float(first > 0), out=d_weight_VD)
        context.gradients = (d_hidden_ND, d_weight_VD, d_bias_TV.sum(0)) if with_gradients else ()
        rank_N = torch.from_numpy(np.concatenate(ranks))
        context.mark_non_differentiable(rank_N)
        return torch.tensor(loss_sum, dtype=torch.float32), rank_N

    @staticmethod
    def backward(context: Any, d_loss: Tensor, d_rank: Tensor) -> tuple[Tensor | None, ...]:
        assert context.gradients, "the gradients are scaled in place, so there can be only one backward"
        d_hidden_ND, d_weight_VD, d_bias_V = (gradient.mul_(d_loss) for gradient in context.gradients)
        context.gradients = ()
        return d_hidden_ND, d_weight_VD, d_bias_V, None, None
