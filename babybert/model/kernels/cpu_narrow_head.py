"""A narrow model's vocabulary head on a CPU without its N x V logits: numba kernels.

At width 10 the head is 97 % of the parameters and, in plain PyTorch, most of the time, which is memory traffic: logits
of N x 147,161 are written and read half a dozen times. Here the vocabulary is read block by block. A block is copied to
(D, BLOCK) and stays in the cache while all positions use it; the innermost loops run over neighbouring words and
vectorise. Logits and exponentials are never written to memory. The backward computes them again, two positions at a
time: each gradient of the table is loaded and stored once for both. The width D is a constant of the compiled code: its
loops are unrolled.

The forward needs no maximum: it takes exponentials of a logit minus the target's own. If a position's sum comes near
the largest fp32 number, the position goes through a second kernel, which keeps the maximum as it goes (online softmax:
Milakov and Gimelshein, 2018). Sums over the vocabulary are fp32 within a block and fp64 beyond.

Shapes: N masked positions, D width, V vocabulary, T threads.
"""

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from babybert.jit import compile_kernels
from babybert.model.kernels import Requirements
from babybert.model.kernels.cpu_math import LANES, aligned, exp, largest, threads_for

BLOCK = 256  # words at a time: D x 256 floats and their gradients fit a core's first-level cache
WORDS_PER_THREAD = 16 * BLOCK  # fewer are not worth a thread's start
WIDEST = 32  # above it PyTorch's matrix products are faster
TOO_LARGE = 1e30  # a sum of exponentials, e^69, above which the quick forward may have overflowed
NOTHING = np.float32(-1e30)  # the bias of the words that only fill the last block


@njit(inline="always", fastmath=True)
def _load_block(weight_VD, bias_V, first, size, table, bias):
    """Words `first` to `first + size`, as columns. The rest of the block has probability 0."""
    for v in range(size):
        bias[v] = bias_V[first + v]
        for d in range(table.shape[0]):
            table[d, v] = weight_VD[first + v, d]
    for v in range(size, BLOCK):
        bias[v] = NOTHING
        for d in range(table.shape[0]):
            table[d, v] = 0


@njit(inline="always", fastmath=True)
def _sum_of_exponentials(D, hidden, shift, table, bias, z):
    """The sum over a block of e^(logit - shift); `z` is scratch space for the logits."""
    total = np.float32(0)
    for v in range(BLOCK):
        logit = bias[v] - shift
        for d in range(D):
            logit += hidden[d] * table[d, v]
        z[v] = logit
    for v in range(BLOCK):  # a loop for itself: together with the first it needs more registers than AVX2 has
        total += exp(z[v])
    return total


@njit(inline="always", fastmath=True)
def _update_online_softmax(D, hidden, target_logit, target, table, bias, z, lanes, maximum, total, rank):
    """Add a block to one position's maximum, sum of e^(logit - maximum), and rank: arrays of one number each.

    `target` is the target's index in the block, if it lies in it.
    """
    for v in range(BLOCK):
        logit = bias[v]
        for d in range(D):
            logit += hidden[d] * table[d, v]
        z[v] = logit
    top = largest(z, lanes)
    if top > maximum[0]:
        total[0] *= np.exp(np.float64(maximum[0]) - np.float64(top))
        maximum[0] = top
    shift, block_total, above = maximum[0], np.float32(0), 0
    for v in range(BLOCK):
        block_total += exp(z[v] - shift)
        above += z[v] > target_logit
    total[0] += block_total
    # The target's logit was summed in another order, so that it may lie above itself.
    if 0 <= target < BLOCK and z[target] > target_logit:
        above -= 1
    rank[0] += above


@njit(inline="always", fastmath=True)
def _probabilities(D, hidden, log_sum, scale, table, bias, p):
    """One position's probabilities of a block's words, times the gradient of the loss, in `p`."""
    for v in range(BLOCK):
        logit = bias[v]
        for d in range(D):
            logit += hidden[d] * table[d, v]
        p[v] = exp(min(logit - log_sum, np.float32(0))) * scale


@njit(inline="always", fastmath=True)
def _add_gradients(D, hidden1, hidden2, p1, p2, table, d_table, d_bias, d_hidden1, d_hidden2):
    """Add two positions' share to a block's gradients, and the block's share to the positions' gradients."""
    for v in range(BLOCK):
        d_bias[v] += p1[v] + p2[v]
    for d in range(D):
        weight1, weight2, total1, total2 = hidden1[d], hidden2[d], np.float32(0), np.float32(0)
        for v in range(BLOCK):
            d_table[d, v] += p1[v] * weight1 + p2[v] * weight2
            total1 += p1[v] * table[d, v]
            total2 += p2[v] * table[d, v]
        d_hidden1[d] += total1
        d_hidden2[d] += total2


@njit(inline="always", fastmath=True)
def _store_block(D, d_table, d_bias, first, size, d_weight_VD, d_bias_V):
    """Copy a block's gradients back to rows."""
    for v in range(size):
        d_bias_V[first + v] = d_bias[v]
        for d in range(D):
            d_weight_VD[first + v, d] = d_table[d, v]


def _make(width: int, cache: bool) -> tuple[Any, Any, Any]:
    return _make_quick_sums(width, cache), _make_online_sums(width, cache), _make_backward(width, cache)


def _make_quick_sums(width: int, cache: bool) -> Any:
    D = width

    @njit(parallel=True, fastmath=True, cache=cache)
    def quick_sums(hidden_ND, weight_VD, bias_V, shift_N, sum_TN):
        threads, positions, vocab = sum_TN.shape[0], hidden_ND.shape[0], bias_V.shape[0]
        blocks = (vocab + BLOCK - 1) // BLOCK
        for thread in prange(threads):
            table, bias, z = aligned(D * BLOCK).reshape((D, BLOCK)), aligned(BLOCK), aligned(BLOCK)
            for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
                _load_block(weight_VD, bias_V, block * BLOCK, min(BLOCK, vocab - block * BLOCK), table, bias)
                for n in range(positions):
                    sum_TN[thread, n] += _sum_of_exponentials(D, hidden_ND[n], shift_N[n], table, bias, z)

    return quick_sums


def _make_online_sums(width: int, cache: bool) -> Any:
    D = width

    @njit(parallel=True, fastmath=True, cache=cache)
    def online_sums(hidden_ND, weight_VD, bias_V, target_N, target_logit_N, max_TN, sum_TN, rank_TN):
        threads, positions, vocab = sum_TN.shape[0], hidden_ND.shape[0], bias_V.shape[0]
        blocks = (vocab + BLOCK - 1) // BLOCK
        for thread in prange(threads):
            table, bias = aligned(D * BLOCK).reshape((D, BLOCK)), aligned(BLOCK)
            z, lanes = aligned(BLOCK), aligned(LANES)
            for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
                _load_block(weight_VD, bias_V, block * BLOCK, min(BLOCK, vocab - block * BLOCK), table, bias)
                for n in range(positions):
                    target = target_N[n] - block * BLOCK
                    maximum, total, rank = max_TN[thread, n:], sum_TN[thread, n:], rank_TN[thread, n:]
                    _update_online_softmax(
                        D, hidden_ND[n], target_logit_N[n], target, table, bias, z, lanes, maximum, total, rank
                    )

    return online_sums


def _make_backward(width: int, cache: bool) -> Any:
    D = width

    @njit(parallel=True, fastmath=True, cache=cache)
    def backward(hidden_ND, weight_VD, bias_V, log_sum_N, scale, d_weight_VD, d_bias_V, d_hidden_TND):
        threads, positions, vocab = d_hidden_TND.shape[0], hidden_ND.shape[0], bias_V.shape[0]
        blocks = (vocab + BLOCK - 1) // BLOCK
        for thread in prange(threads):
            table, bias = aligned(D * BLOCK).reshape((D, BLOCK)), aligned(BLOCK)
            d_table, d_bias = aligned(D * BLOCK).reshape((D, BLOCK)), aligned(BLOCK)
            p1, p2 = aligned(BLOCK), aligned(BLOCK)
            for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
                first, size = block * BLOCK, min(BLOCK, vocab - block * BLOCK)
                _load_block(weight_VD, bias_V, first, size, table, bias)
                d_table[:], d_bias[:] = 0, 0
                for n1 in range(0, positions, 2):
                    # The last of an odd number of positions is paired with itself, at a scale of 0.
                    n2 = min(n1 + 1, positions - 1)
                    scale2 = scale if n2 > n1 else np.float32(0)
                    hidden1, hidden2 = hidden_ND[n1], hidden_ND[n2]
                    _probabilities(D, hidden1, log_sum_N[n1], scale, table, bias, p1)
                    _probabilities(D, hidden2, log_sum_N[n2], scale2, table, bias, p2)
                    d_hidden1, d_hidden2 = d_hidden_TND[thread, n1], d_hidden_TND[thread, n2]
                    _add_gradients(D, hidden1, hidden2, p1, p2, table, d_table, d_bias, d_hidden1, d_hidden2)
                _store_block(D, d_table, d_bias, first, size, d_weight_VD, d_bias_V)

    return backward


kernels_for = compile_kernels(_make)  # by width


def requirements(hidden_ND: Tensor, weight_VD: Tensor) -> Requirements:
    """What must hold for these kernels to be correct, and faster than PyTorch's operations."""
    vocab, width = weight_VD.shape
    return {
        "on a CPU": weight_VD.device.type == "cpu",
        "fp32 weights": weight_VD.dtype == torch.float32,
        f"width <= {WIDEST}": width <= WIDEST,
        f"vocabulary >= {WORDS_PER_THREAD:,}": vocab >= WORDS_PER_THREAD,
        "at least one position": len(hidden_ND) > 0,
    }


def _online_log_sums(
    hidden_ND: np.ndarray, weight_VD: np.ndarray, bias_V: np.ndarray, target_N: np.ndarray, target_logit_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The logarithm of the sum of all e^logit (fp64), and the targets' ranks, for logits of any size."""
    _, online_sums, _ = kernels_for(weight_VD.shape[1])
    threads, positions = threads_for(len(bias_V), WORDS_PER_THREAD), len(target_N)
    max_TN, sum_TN = np.full((threads, positions), -np.inf, np.float32), np.zeros((threads, positions))
    rank_TN = np.zeros((threads, positions), np.int64)
    online_sums(hidden_ND, weight_VD, bias_V, target_N, target_logit_N, max_TN, sum_TN, rank_TN)
    max_N = max_TN.max(0).astype(np.float64)
    with np.errstate(invalid="ignore"):  # NaN in, NaN out: it shows in the loss
        return max_N + np.log((sum_TN * np.exp(max_TN - max_N)).sum(0)), rank_TN.sum(0)


def _quick_log_sums(
    hidden_ND: np.ndarray, weight_VD: np.ndarray, bias_V: np.ndarray, target_N: np.ndarray, target_logit_N: np.ndarray
) -> np.ndarray:
    """The same logarithms. Positions with a logit more than 69 above the target's go through `_online_log_sums`."""
    quick_sums, _, _ = kernels_for(weight_VD.shape[1])
    sum_TN = np.zeros((threads_for(len(bias_V), WORDS_PER_THREAD), len(target_N)))
    quick_sums(hidden_ND, weight_VD, bias_V, target_logit_N, sum_TN)
    sum_N = sum_TN.sum(0)
    log_sum_N = target_logit_N + np.log(sum_N)
    overflowed = np.flatnonzero(~(sum_N < TOO_LARGE))  # not `sum_N >= TOO_LARGE`, which is false for NaN
    if len(overflowed):
        log_sum_N[overflowed], _ = _online_log_sums(
            hidden_ND[overflowed], weight_VD, bias_V, target_N[overflowed], target_logit_N[overflowed]
        )
    return log_sum_N


def token_losses(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """The cross entropy (fp32) and the target's rank (int64) of each position."""
    hidden_ND = hidden_ND.float().contiguous()
    target_logit_N = ((hidden_ND * weight_VD[targets_N]).sum(-1) + bias_V[targets_N]).numpy()
    log_sum_N, rank_N = _online_log_sums(
        hidden_ND.numpy(), weight_VD.numpy(), bias_V.numpy(), targets_N.numpy(), target_logit_N
    )
    return torch.from_numpy(log_sum_N - target_logit_N).float(), torch.from_numpy(rank_N)


class CpuNarrowHeadLoss(torch.autograd.Function):
    """Sum of the cross entropies (0-dim, fp32), and the targets' ranks (or an empty tensor)."""

    @staticmethod
    def forward(
        context: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor, with_rank: bool
    ) -> tuple[Tensor, Tensor]:
        context.dtype = hidden_ND.dtype
        hidden_ND = hidden_ND.float().contiguous()
        target_logit_N = ((hidden_ND * weight_VD[targets_N]).sum(-1) + bias_V[targets_N]).numpy()
        inputs = hidden_ND.numpy(), weight_VD.numpy(), bias_V.numpy(), targets_N.numpy(), target_logit_N
        if with_rank:
            log_sum_N, rank_N = _online_log_sums(*inputs)
        else:
            log_sum_N, rank_N = _quick_log_sums(*inputs), np.empty(0, np.int64)
        context.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N)
        context.log_sum_N = log_sum_N.astype(np.float32)
        ranks_N = torch.from_numpy(rank_N)
        context.mark_non_differentiable(ranks_N)
        return torch.tensor((log_sum_N - target_logit_N).sum(), dtype=torch.float32), ranks_N

    @staticmethod
    def backward(context: Any, d_loss: Tensor, d_rank: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, targets_N = context.saved_tensors
        scale = d_loss.item()
        width = weight_VD.shape[1]
        d_weight_VD, d_bias_V = torch.empty_like(weight_VD), torch.empty_like(bias_V)
        d_hidden_TND = np.zeros((threads_for(len(bias_V), WORDS_PER_THREAD), len(hidden_ND), width))
        inputs = hidden_ND.numpy(), weight_VD.numpy(), bias_V.numpy(), context.log_sum_N, np.float32(scale)
        _, _, backward = kernels_for(width)
        backward(*inputs, d_weight_VD.numpy(), d_bias_V.numpy(), d_hidden_TND)
        # The kernel adds the probabilities. What is left of the gradient is -1 at each target.
        d_weight_VD.index_add_(0, targets_N, hidden_ND, alpha=-scale)
        d_bias_V.index_add_(0, targets_N, torch.full((len(targets_N),), -scale))
        d_hidden_ND = torch.from_numpy(d_hidden_TND.sum(0).astype(np.float32)) - scale * weight_VD[targets_N]
        return d_hidden_ND.to(context.dtype), d_weight_VD, d_bias_V, None, None
