"""The vocabulary head in bf16 on a CPU: products by oneDNN, and one pass over their logits by numba.

It is `cpu_wide_head` with logits in bf16. A row of logits is widened into the core's cache, where its loss and its
gradient are computed in fp32 with the bias, and the gradient replaces the logits. Sums are fp32 and fp64. As in
`ChunkedHeadLoss`, gradients are computed in the forward, chunk by chunk, for an output gradient of 1.

Shapes: N masked positions, D width, V vocabulary, C rows of a chunk, T threads.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit, prange
from torch import Tensor

from babybert.jit import compile_kernels
from babybert.model.bf16_weights import Bf16Weights
from babybert.model.kernels import Requirements
from babybert.model.kernels.cpu_bf16_math import bits_array, narrow, widen
from babybert.model.kernels.cpu_math import LANES, aligned, exp, largest_of_row, threads_for

CHUNK = 2**24  # logits at a time: 32 MB
BLOCK = 4096  # logits of a row whose exponentials are added up in fp32
SMALLEST_VOCABULARY = LANES
NARROWEST = 128  # below, `cpu_narrow_head` or PyTorch's operations are as fast


@njit(inline="always", fastmath=True)
def _logits(z_bits, bias_V, z, lanes):
    """A row of logits with the bias, in `z`; returns the largest."""
    for v in range(len(z_bits)):
        z[v] = widen(z_bits[v]) + bias_V[v]
    return largest_of_row(z, lanes)


@njit(inline="always", fastmath=True)
def _exponentials(z, vocab, top):
    """Replace the logits of a row by e^(logit - top); returns their sum (fp64)."""
    total = 0.0
    for first in range(0, vocab, BLOCK):
        block_total = np.float32(0)
        for v in range(first, min(first + BLOCK, vocab)):
            z[v] = exp(z[v] - top)
            block_total += z[v]
        total += block_total
    return total


def _make(width: int, cache: bool) -> tuple[Any]:
    @njit(parallel=True, fastmath=True, cache=cache)
    def losses(z_CV, bias_V, target_C, loss_C, rank_C, d_bias_TV, with_rank, with_gradients):
        (threads, vocab), rows = d_bias_TV.shape, z_CV.shape[0]
        for thread in prange(threads):
            lanes, z, d_bias = aligned(LANES), aligned(vocab), d_bias_TV[thread]
            for c in range(rows * thread // threads, rows * (thread + 1) // threads):
                target = target_C[c]
                if target < 0:
                    loss_C[c], rank_C[c] = 0.0, 0
                    z_CV[c] = 0
                    continue
                top = _logits(z_CV[c], bias_V, z, lanes)
                target_logit, above = z[target], np.int32(0)
                if with_rank:
                    for v in range(vocab):
                        above += np.int32(z[v] > target_logit)
                total = _exponentials(z, vocab, top)
                loss_C[c], rank_C[c] = np.float64(top) + np.log(total) - np.float64(target_logit), above
                if with_gradients:
                    inverse = np.float32(1 / total)
                    for v in range(vocab):
                        z[v] *= inverse
                    z[target] -= np.float32(1)
                    for v in range(vocab):
                        d_bias[v] += z[v]
                        z_CV[c, v] = narrow(z[v])

    return (losses,)


kernels_for = compile_kernels(_make)  # one kernel for all widths: it is always asked for with 0


def requirements(hidden_ND: Tensor, weight_VD: Tensor) -> Requirements:
    """What must hold for this way to be correct and faster than PyTorch's operations."""
    return {
        "on a CPU": weight_VD.device.type == "cpu",
        "bf16": torch.is_autocast_enabled("cpu"),
        f"width >= {NARROWEST}": weight_VD.shape[1] >= NARROWEST,
        f"vocabulary >= {SMALLEST_VOCABULARY}": len(weight_VD) >= SMALLEST_VOCABULARY,
        "at least one position": len(hidden_ND) > 0,
    }


class CpuBf16HeadLoss(torch.autograd.Function):
    """Sum of the cross entropies (0-dim, fp32), and the targets' ranks (zeros unless asked for).

    Rows whose target is negative have loss 0 and no gradient.
    """

    @staticmethod
    def forward(
        context: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor,
        targets_N: Tensor,
        weights: Bf16Weights,
        with_rank: bool,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        context.dtype = hidden_ND.dtype
        hidden_ND, table_VD = hidden_ND.bfloat16().contiguous(), weights.of(weight_VD)
        vocab = len(bias_V)
        rows = max(1, CHUNK // vocab)
        loss_N, rank_N = np.empty(len(hidden_ND)), np.empty(len(hidden_ND), np.int64)
        d_bias_TV = torch.zeros(threads_for(min(rows, len(hidden_ND)), 1), vocab)
        d_hidden_ND, d_weight_VD = torch.empty_like(hidden_ND), None
        (losses,) = kernels_for(0)
        for first in range(0, len(hidden_ND), rows):
            chunk = slice(first, first + rows)
            z_CV = F.linear(hidden_ND[chunk], table_VD)
            outputs = loss_N[chunk], rank_N[chunk], d_bias_TV.numpy()
            losses(
                bits_array(z_CV), bias_V.detach().numpy(), targets_N[chunk].numpy(), *outputs, with_rank, with_gradients
            )
            if with_gradients:
                d_hidden_ND[chunk] = z_CV @ table_VD
                d_chunk_VD = z_CV.t() @ hidden_ND[chunk]
                d_weight_VD = d_chunk_VD.float() if d_weight_VD is None else d_weight_VD.add_(d_chunk_VD)
        context.gradients = (d_hidden_ND, d_weight_VD, d_bias_TV.sum(0)) if with_gradients else ()
        ranks_N = torch.from_numpy(rank_N)
        context.mark_non_differentiable(ranks_N)
        return torch.tensor(loss_N.sum(), dtype=torch.float32), ranks_N

    @staticmethod
    def backward(context: Any, d_loss: Tensor, d_rank: Tensor) -> tuple[Tensor | None, ...]:
        assert context.gradients, "the gradients are scaled in place, so there can be only one backward"
        d_hidden_ND, d_weight_VD, d_bias_V = context.gradients
        context.gradients = ()
        d_hidden_ND = (d_hidden_ND * d_loss).to(context.dtype)
        return d_hidden_ND, d_weight_VD.mul_(d_loss), d_bias_V.mul_(d_loss), None, None, None, None
