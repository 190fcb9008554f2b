"""The vocabulary head on a CPU without its N x V logits: numba kernels for narrow models.

At width 10 the head is 97 % of the parameters and, in plain torch, most of the time, which is memory: logits of
N x 147,161 are written and read half a dozen times. Here a block of the vocabulary is turned into columns that stay in
the cache, logits and exponentials live in registers, and the backward computes them again, two positions at a time so
that a gradient is loaded and stored for both at once. The width is a constant of the compiled code: its loop is unrolled.

The forward needs no maximum: exponentials are of what a logit is above the target's own. Only where one is so far above
it that the sum nears the largest number does a position go through a second kernel that keeps the maximum as it goes
(Milakov and Gimelshein, 2018). Sums over the vocabulary are fp32 within a block and fp64 beyond.

Shapes: N masked positions, D width, V vocabulary, T threads.
"""

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from babybert.model.kernels.cpu_math import LANES, aligned, compiled, exp, largest, threads_for

BLOCK = 256  # columns of the vocabulary at a time: D x 256 floats and their gradients fit a core's first cache
WIDEST = 32  # beyond it the matrix products of the plain form win
TOO_LARGE = 1e30  # a sum of exponentials, e^69, that is not to be trusted
NOTHING = np.float32(-1e30)  # the bias of a word that is not there


@njit(inline="always", fastmath=True)
def _load_block(weight_VD, bias_V, first, own, table, bias):
    """Columns `first` to `first + own` of the table; what fills the block has no probability."""
    for v in range(own):
        bias[v] = bias_V[first + v]
        for d in range(table.shape[0]):
            table[d, v] = weight_VD[first + v, d]
    for v in range(own, BLOCK):
        bias[v] = NOTHING
        for d in range(table.shape[0]):
            table[d, v] = 0


def _make(width: int, cache: bool) -> tuple[Any, Any, Any]:
    D = width

    @njit(parallel=True, fastmath=True, cache=cache)
    def sums(hidden_ND, weight_VD, bias_V, shift_N, sum_TN):
        threads, positions, vocab = sum_TN.shape[0], hidden_ND.shape[0], bias_V.shape[0]
        blocks = (vocab + BLOCK - 1) // BLOCK
        for thread in prange(threads):
            table, bias, z = aligned(D * BLOCK).reshape((D, BLOCK)), aligned(BLOCK), aligned(BLOCK)
            for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
                _load_block(weight_VD, bias_V, block * BLOCK, min(BLOCK, vocab - block * BLOCK), table, bias)
                for n in range(positions):
                    h, shift, total = hidden_ND[n], shift_N[n], np.float32(0)
                    for v in range(BLOCK):
                        logit = bias[v] - shift
                        for d in range(D):
                            logit += h[d] * table[d, v]
                        z[v] = logit
                    for v in range(BLOCK):  # apart: together they want more registers than AVX2 has
                        total += exp(z[v])
                    sum_TN[thread, n] += total

    @njit(parallel=True, fastmath=True, cache=cache)
    def safe_sums(hidden_ND, weight_VD, bias_V, target_N, own_N, max_TN, sum_TN, rank_TN):
        threads, positions, vocab = sum_TN.shape[0], hidden_ND.shape[0], bias_V.shape[0]
        blocks = (vocab + BLOCK - 1) // BLOCK
        for thread in prange(threads):
            table, bias = aligned(D * BLOCK).reshape((D, BLOCK)), aligned(BLOCK)
            z, lanes = aligned(BLOCK), aligned(LANES)
            for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
                _load_block(weight_VD, bias_V, block * BLOCK, min(BLOCK, vocab - block * BLOCK), table, bias)
                for n in range(positions):
                    h = hidden_ND[n]
                    for v in range(BLOCK):
                        logit = bias[v]
                        for d in range(D):
                            logit += h[d] * table[d, v]
                        z[v] = logit
                    top = largest(z, lanes)
                    if top > max_TN[thread, n]:
                        sum_TN[thread, n] *= np.exp(np.float64(max_TN[thread, n]) - np.float64(top))
                        max_TN[thread, n] = top
                    shift, total, own, above = max_TN[thread, n], np.float32(0), own_N[n], 0
                    for v in range(BLOCK):
                        total += exp(z[v] - shift)
                        above += z[v] > own
                    sum_TN[thread, n] += total
                    target = target_N[n] - block * BLOCK
                    if 0 <= target < BLOCK and z[target] > own:  # the same sum in another order
                        above -= 1
                    rank_TN[thread, n] += above

    @njit(parallel=True, fastmath=True, cache=cache)
    def backward(hidden_ND, weight_VD, bias_V, log_sum_N, scale, d_weight_VD, d_bias_V, d_hidden_TND):
        threads, positions, vocab = d_hidden_TND.shape[0], hidden_ND.shape[0], bias_V.shape[0]
        blocks = (vocab + BLOCK - 1) // BLOCK
        for thread in prange(threads):
            table, bias = aligned(D * BLOCK).reshape((D, BLOCK)), aligned(BLOCK)
            d_table, d_bias = aligned(D * BLOCK).reshape((D, BLOCK)), aligned(BLOCK)
            p1, p2 = aligned(BLOCK), aligned(BLOCK)
            for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
                first, own = block * BLOCK, min(BLOCK, vocab - block * BLOCK)
                _load_block(weight_VD, bias_V, first, own, table, bias)
                d_table[:], d_bias[:] = 0, 0
                for n1 in range(0, positions, 2):
                    n2 = min(n1 + 1, positions - 1)
                    scale2 = scale if n2 > n1 else np.float32(0)  # of an odd number, the last is its own partner
                    h1, h2, log_sum1, log_sum2 = hidden_ND[n1], hidden_ND[n2], log_sum_N[n1], log_sum_N[n2]
                    for v in range(BLOCK):
                        logit = bias[v]
                        for d in range(D):
                            logit += h1[d] * table[d, v]
                        p1[v] = exp(min(logit - log_sum1, np.float32(0))) * scale
                    for v in range(BLOCK):
                        logit = bias[v]
                        for d in range(D):
                            logit += h2[d] * table[d, v]
                        p2[v] = exp(min(logit - log_sum2, np.float32(0))) * scale2
                    for v in range(BLOCK):
                        d_bias[v] += p1[v] + p2[v]
                    for d in range(D):
                        weight1, weight2, total1, total2 = h1[d], h2[d], np.float32(0), np.float32(0)
                        for v in range(BLOCK):
                            d_table[d, v] += p1[v] * weight1 + p2[v] * weight2
                            total1 += p1[v] * table[d, v]
                            total2 += p2[v] * table[d, v]
                        d_hidden_TND[thread, n1, d] += total1
                        d_hidden_TND[thread, n2, d] += total2
                for v in range(own):
                    d_bias_V[first + v] = d_bias[v]
                    for d in range(D):
                        d_weight_VD[first + v, d] = d_table[d, v]

    return sums, safe_sums, backward


kernels = compiled(_make)


def supports(hidden_ND: Tensor, weight_VD: Tensor) -> bool:
    """Whether these kernels are made for such tensors, and worth their start."""
    vocab, width = weight_VD.shape
    return (
        weight_VD.device.type == "cpu"
        and weight_VD.dtype == torch.float32
        and width <= WIDEST
        and vocab >= 16 * BLOCK
        and len(hidden_ND) > 0
    )


def _log_sums(
    hidden_ND: np.ndarray, weight_VD: np.ndarray, bias_V: np.ndarray, target_N: np.ndarray, own_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The logarithm of the sum of all e^logit (fp64), and how many logits are above the target's, with any logits."""
    _, safe_sums, _ = kernels(weight_VD.shape[1])
    threads, positions = threads_for(len(bias_V), 16 * BLOCK), len(target_N)
    max_TN, sum_TN = np.full((threads, positions), -np.inf, np.float32), np.zeros((threads, positions))
    rank_TN = np.zeros((threads, positions), np.int64)
    safe_sums(hidden_ND, weight_VD, bias_V, target_N, own_N, max_TN, sum_TN, rank_TN)
    most_N = max_TN.max(0).astype(np.float64)
    with np.errstate(invalid="ignore"):  # of NaN; it shows in the loss
        return most_N + np.log((sum_TN * np.exp(max_TN - most_N)).sum(0)), rank_TN.sum(0)


def _quick_log_sums(
    hidden_ND: np.ndarray, weight_VD: np.ndarray, bias_V: np.ndarray, target_N: np.ndarray, own_N: np.ndarray
) -> np.ndarray:
    """The same logarithms, for logits at most 69 above the target's; those of other positions by `_log_sums`."""
    sums, _, _ = kernels(weight_VD.shape[1])
    sum_TN = np.zeros((threads_for(len(bias_V), 16 * BLOCK), len(target_N)))
    sums(hidden_ND, weight_VD, bias_V, own_N, sum_TN)
    sum_N = sum_TN.sum(0)
    log_sum_N = own_N + np.log(sum_N)
    rest = np.flatnonzero(~(sum_N < TOO_LARGE))
    if len(rest):
        log_sum_N[rest], _ = _log_sums(hidden_ND[rest], weight_VD, bias_V, target_N[rest], own_N[rest])
    return log_sum_N


def mlm_head_token_losses(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Each position's own cross entropy (fp32) and its target's rank."""
    hidden_ND = hidden_ND.float().contiguous()
    own_N = ((hidden_ND * weight_VD[targets_N]).sum(-1) + bias_V[targets_N]).numpy()
    log_sum_N, rank_N = _log_sums(hidden_ND.numpy(), weight_VD.numpy(), bias_V.numpy(), targets_N.numpy(), own_N)
    return torch.from_numpy(log_sum_N - own_N).float(), torch.from_numpy(rank_N)


class CpuHeadLoss(torch.autograd.Function):
    """Sum of the cross entropies (0-dim, fp32), and the targets' ranks (or an empty tensor)."""

    @staticmethod
    def forward(
        context: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor, with_rank: bool
    ) -> tuple[Tensor, Tensor]:
        context.dtype, hidden_ND = hidden_ND.dtype, hidden_ND.float().contiguous()
        own_N = ((hidden_ND * weight_VD[targets_N]).sum(-1) + bias_V[targets_N]).numpy()
        arguments = hidden_ND.numpy(), weight_VD.numpy(), bias_V.numpy(), targets_N.numpy(), own_N
        log_sum_N, rank_N = _log_sums(*arguments) if with_rank else (_quick_log_sums(*arguments), np.empty(0, np.int64))
        context.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N)
        context.log_sum_N = log_sum_N.astype(np.float32)
        ranks_N = torch.from_numpy(rank_N)
        context.mark_non_differentiable(ranks_N)
        return torch.tensor((log_sum_N - own_N).sum(), dtype=torch.float32), ranks_N

    @staticmethod
    def backward(context: Any, d_loss: Tensor, d_rank: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, targets_N = context.saved_tensors
        scale, width = d_loss.item(), weight_VD.shape[1]
        d_weight_VD, d_bias_V = torch.empty_like(weight_VD), torch.empty_like(bias_V)
        d_hidden_TND = np.zeros((threads_for(len(bias_V), 16 * BLOCK), len(hidden_ND), width))
        inputs = hidden_ND.numpy(), weight_VD.numpy(), bias_V.numpy(), context.log_sum_N, np.float32(scale)
        kernels(width)[2](*inputs, d_weight_VD.numpy(), d_bias_V.numpy(), d_hidden_TND)
        d_weight_VD.index_add_(0, targets_N, hidden_ND, alpha=-scale)
        d_bias_V.index_add_(0, targets_N, torch.full((len(targets_N),), -scale))
        d_hidden_ND = torch.from_numpy(d_hidden_TND.sum(0).astype(np.float32)) - scale * weight_VD[targets_N]
        return d_hidden_ND.to(context.dtype), d_weight_VD, d_bias_V, None, None
