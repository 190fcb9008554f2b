"""The vocabulary head of a wide model on a CPU: matrix products by PyTorch, and one pass of ours over their logits.

From width 33 on a matrix product is faster than loops of our own, but what comes after it is memory traffic: PyTorch adds the
bias, seeks the maximum, takes exponentials, compares and sums in nine passes, most of which also write a table of C x V
that the system must first clear. Here a row of logits (0.6 MB at V = 147,161) is turned into its loss, its rank and
its gradient while it lies in the core's second cache, in the place where it stands.

As in `ChunkedHeadLoss`, a few rows at a time have their gradients at once, for a loss that counts once.

Shapes: N masked positions, D width, V vocabulary, C rows of a chunk, T threads.
"""

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from babybert.model.kernels.cpu_math import LANES, aligned, compiled, exp, largest, threads_for

CHUNK = 2**24  # logits at a time: 64 MB; with fewer, the weight's gradient is gone through too often
BLOCK = 4096  # logits of a row whose exponentials are added up in fp32
SMALLEST_VOCABULARY = 4096  # with fewer words PyTorch's passes take no time either


def _make(width: int, cache: bool) -> tuple[Any]:
    @njit(parallel=True, fastmath=True, cache=cache)
    def to_gradients(z_CV, bias_V, target_C, log_sum_C, own_C, rank_C, d_bias_TV, with_gradients):
        threads, rows, vocab = d_bias_TV.shape[0], z_CV.shape[0], z_CV.shape[1]
        for thread in prange(threads):
            lanes = aligned(LANES)
            d_bias = d_bias_TV[thread]
            for c in range(rows * thread // threads, rows * (thread + 1) // threads):
                z, target, top, total, above = z_CV[c], target_C[c], np.float32(-np.inf), 0.0, 0
                for v in range(vocab):
                    z[v] += bias_V[v]
                whole = vocab // LANES * LANES
                if whole:
                    top = largest(z[:whole], lanes)
                for v in range(whole, vocab):
                    top = max(top, z[v])
                own = z[target]
                for first in range(0, vocab, BLOCK):
                    part, part_above = np.float32(0), np.int32(0)
                    for v in range(first, min(first + BLOCK, vocab)):
                        part += exp(z[v] - top)
                        part_above += np.int32(z[v] > own)
                    total += part
                    above += part_above
                log_sum = np.float64(top) + np.log(total)
                log_sum_C[c], own_C[c], rank_C[c] = log_sum, own, above
                if with_gradients:
                    shift = np.float32(log_sum)
                    for v in range(vocab):
                        z[v] = exp(min(z[v] - shift, np.float32(0)))
                    z[target] -= np.float32(1)
                    for v in range(vocab):
                        d_bias[v] += z[v]

    return (to_gradients,)


kernels = compiled(_make)


def supports(hidden_ND: Tensor, weight_VD: Tensor) -> bool:
    """Whether this way is made for such tensors: fp32 on a CPU, and no autocast that would have the products in bf16."""
    fp32 = {hidden_ND.dtype, weight_VD.dtype} == {torch.float32} and not torch.is_autocast_enabled("cpu")
    return weight_VD.device.type == "cpu" and fp32 and len(weight_VD) >= SMALLEST_VOCABULARY and len(hidden_ND) > 0


def _pass(
    z_CV: Tensor, bias_V: Tensor, targets_C: Tensor, d_bias_TV: Tensor, with_gradients: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Loss (fp64) and rank of each row of products; they become the loss's gradients by the logits if these are asked for."""
    rows = len(z_CV)
    log_sum_C, own_C, rank_C = np.empty(rows), np.empty(rows, np.float32), np.empty(rows, np.int64)
    arrays = z_CV.numpy(), bias_V.numpy(), targets_C.numpy(), log_sum_C, own_C, rank_C, d_bias_TV.numpy()
    (to_gradients,) = kernels(0)  # of any width
    to_gradients(*arrays, with_gradients)
    return log_sum_C - own_C, rank_C


def _chunks(hidden_ND: Tensor, weight_VD: Tensor) -> tuple[int, Tensor, Tensor]:
    """Rows of a chunk, the place for its logits, and one for the bias's gradient."""
    vocab = len(weight_VD)
    rows = min(len(hidden_ND), max(1, CHUNK // vocab))
    return rows, hidden_ND.new_empty(rows, vocab), hidden_ND.new_zeros(threads_for(rows, 1), vocab)


def mlm_head_token_losses(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Each position's own cross entropy (fp32) and its target's rank."""
    rows, z_CV, d_bias_TV = _chunks(hidden_ND, weight_VD)
    losses, ranks = [], []
    for hidden_CD, targets_C in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True):
        own_CV = torch.mm(hidden_CD, weight_VD.T, out=z_CV[: len(hidden_CD)])
        loss_C, rank_C = _pass(own_CV, bias_V, targets_C, d_bias_TV, False)
        losses.append(loss_C)
        ranks.append(rank_C)
    return torch.from_numpy(np.concatenate(losses)).float(), torch.from_numpy(np.concatenate(ranks))


class CpuWideHeadLoss(torch.autograd.Function):
    """Sum of the cross entropies (0-dim, fp32), and the targets' ranks."""

    @staticmethod
    def forward(
        context: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor, with_gradients: bool
    ) -> tuple[Tensor, Tensor]:
        rows, z_CV, d_bias_TV = _chunks(hidden_ND, weight_VD)
        loss_sum, ranks = 0.0, []
        d_hidden_ND, d_weight_VD = (torch.empty_like(x) if with_gradients else x for x in (hidden_ND, weight_VD))
        for first in range(0, len(targets_N), rows):
            hidden_CD = hidden_ND[first : first + rows]
            d_logits_CV = torch.mm(hidden_CD, weight_VD.T, out=z_CV[: len(hidden_CD)])
            loss_C, rank_C = _pass(d_logits_CV, bias_V, targets_N[first : first + rows], d_bias_TV, with_gradients)
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
        assert context.gradients, "scaled in place: only one backward can be had"
        d_hidden_ND, d_weight_VD, d_bias_V = (gradient.mul_(d_loss) for gradient in context.gradients)
        context.gradients = ()
        return d_hidden_ND, d_weight_VD, d_bias_V, None, None
