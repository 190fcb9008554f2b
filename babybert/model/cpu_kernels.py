"""The vocabulary head on a CPU without its N x V logits: numba kernels for narrow models.

At width 10 the head is 97 % of the parameters and nearly all of the time, and in plain torch most of that time is
memory: logits of N x 147,161 are written and read half a dozen times. Here a block of the vocabulary stays in the
cache; logits and exponentials live in it and are gone, and the backward computes them again. Three things make it fast:
the width is a constant of the compiled code, so its loop is unrolled; tables are transposed, so the inner loop runs over
neighbours in memory and is vectorised; and `exp` is a polynomial with an exponent set by bits, which vectorises too.

Sums over the vocabulary are fp32 within a block of 256 and fp64 beyond. The maximum is kept as it goes (Milakov and
Gimelshein, 2018), so that no logit is too large. Compiled once for each width, and cached on disk by numba.

Shapes: N masked positions, D width, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import get_num_threads, njit, prange, types
from numba.extending import intrinsic
from torch import Tensor

BLOCK = 256  # columns of the vocabulary that a core works on at a time: D x 256 floats and their gradients fit its cache
WIDEST = 32  # beyond it the matrix products of the plain form win
DEGREE = 6
POWERS = tuple(np.polynomial.chebyshev.Chebyshev.interpolate(np.exp2, DEGREE, [-1, 0]).convert(kind=np.polynomial.Polynomial).coef.astype(np.float32))
C0, C1, C2, C3, C4, C5, C6 = POWERS
LOG2_E = np.float32(np.log2(np.e))
NOTHING = -1e30  # the bias of a word that is not there
SMALLEST = np.float32(-126.0)  # below 2^-126 there are only denormal numbers


@intrinsic
def _float_of_bits(typing_context: Any, bits: Any) -> Any:
    """The fp32 number with these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@njit(inline="always", fastmath=True)
def _exp(x):  # type: ignore[no-untyped-def]
    """e^x for x <= 0, relative error below 2e-7; 2^-126 for what is smaller still."""
    y = max(x * LOG2_E, SMALLEST)
    whole = np.int32(y)  # toward zero, so that the rest is in (-1, 0]
    f = y - np.float32(whole)
    power = C0 + f * (C1 + f * (C2 + f * (C3 + f * (C4 + f * (C5 + f * C6)))))
    return power * _float_of_bits((whole + np.int32(127)) << np.int32(23))


@njit(inline="always", fastmath=True)
def _largest(z, larger):  # type: ignore[no-untyped-def]
    """The maximum of BLOCK numbers, by halves: a running maximum would not be vectorised."""
    for v in range(BLOCK // 2):
        larger[v] = z[v] if z[v] > z[v + BLOCK // 2] else z[v + BLOCK // 2]
    for v in range(BLOCK // 4):
        larger[v] = larger[v] if larger[v] > larger[v + BLOCK // 4] else larger[v + BLOCK // 4]
    for v in range(BLOCK // 8):
        larger[v] = larger[v] if larger[v] > larger[v + BLOCK // 8] else larger[v + BLOCK // 8]
    for v in range(BLOCK // 16):
        larger[v] = larger[v] if larger[v] > larger[v + BLOCK // 16] else larger[v + BLOCK // 16]
    top = larger[0]
    for v in range(1, BLOCK // 16):
        top = max(top, larger[v])
    return top


@functools.cache
def _kernels(width: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """Forward and backward for this width."""
    try:
        return _make_kernels(width, cache=True)
    except RuntimeError:  # there is no folder to cache them in: they are compiled by each process
        return _make_kernels(width, cache=False)


def _make_kernels(width: int, cache: bool) -> tuple[Callable[..., None], Callable[..., None]]:
    D = width

    @njit(parallel=True, fastmath=True, cache=cache)
    def forward(hidden_ND, tables, biases, target_N, own_N, max_TN, sum_TN, rank_TN, with_rank):  # type: ignore[no-untyped-def]
        threads, positions, blocks = max_TN.shape[0], hidden_ND.shape[0], tables.shape[0]
        for thread in prange(threads):
            z, larger = np.empty(BLOCK, np.float32), np.empty(BLOCK // 2, np.float32)
            for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
                table, bias = tables[block], biases[block]
                for n in range(positions):
                    h = hidden_ND[n]
                    for v in range(BLOCK):
                        logit = bias[v]
                        for d in range(D):
                            logit += h[d] * table[d, v]
                        z[v] = logit
                    top = _largest(z, larger)
                    if top > max_TN[thread, n]:
                        sum_TN[thread, n] *= np.exp(np.float64(max_TN[thread, n]) - np.float64(top))
                        max_TN[thread, n] = top
                    shift, total = max_TN[thread, n], np.float32(0)
                    for v in range(BLOCK):
                        total += _exp(z[v] - shift)
                    sum_TN[thread, n] += total
                    if with_rank:
                        own, above = own_N[n], 0
                        for v in range(BLOCK):
                            above += z[v] > own
                        target = target_N[n] - block * BLOCK
                        if 0 <= target < BLOCK and z[target] > own:  # the same sum in another order
                            above -= 1
                        rank_TN[thread, n] += above

    @njit(parallel=True, fastmath=True, cache=cache)
    def backward(hidden_ND, tables, biases, log_sum_N, scale, d_tables, d_biases, d_hidden_TND):  # type: ignore[no-untyped-def]
        threads, positions, blocks = d_hidden_TND.shape[0], hidden_ND.shape[0], tables.shape[0]
        for thread in prange(threads):
            p = np.empty(BLOCK, np.float32)
            for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
                table, bias, d_table, d_bias = tables[block], biases[block], d_tables[block], d_biases[block]
                for n in range(positions):
                    h, log_sum = hidden_ND[n], log_sum_N[n]
                    for v in range(BLOCK):
                        logit = bias[v]
                        for d in range(D):
                            logit += h[d] * table[d, v]
                        p[v] = _exp(min(logit - log_sum, np.float32(0))) * scale
                    for v in range(BLOCK):
                        d_bias[v] += p[v]
                    for d in range(D):
                        weight, total = h[d], np.float32(0)
                        for v in range(BLOCK):
                            d_table[d, v] += p[v] * weight
                            total += p[v] * table[d, v]
                        d_hidden_TND[thread, n, d] += total

    return forward, backward


def _threads() -> int:
    """As many as torch uses: one process of several does not take all cores."""
    return min(torch.get_num_threads(), get_num_threads())


def takes(hidden_ND: Tensor, weight_VD: Tensor) -> bool:
    """Whether these kernels are made for such tensors, and worth their start."""
    vocab, width = weight_VD.shape
    return hidden_ND.device.type == "cpu" and weight_VD.dtype == torch.float32 and width <= WIDEST and vocab >= 16 * BLOCK and len(hidden_ND) > 0


def _in_blocks(weight_VD: Tensor, bias_V: Tensor) -> tuple[Tensor, Tensor]:
    """The table as (blocks, D, BLOCK) and the bias as (blocks, BLOCK); what fills the last block has no probability."""
    filling = -len(bias_V) % BLOCK
    biases = torch.nn.functional.pad(bias_V.float(), (0, filling), value=NOTHING).view(-1, BLOCK)
    tables = torch.nn.functional.pad(weight_VD.float(), (0, 0, 0, filling)).view(-1, BLOCK, weight_VD.shape[1])
    return tables.transpose(1, 2).contiguous(), biases


class CpuHeadLoss(torch.autograd.Function):
    """Sum of the cross entropies (0-dim, fp32), and the targets' ranks (or an empty tensor)."""

    @staticmethod
    def forward(context: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor, with_rank: bool) -> tuple[Tensor, Tensor]:
        hidden_ND = hidden_ND.float().contiguous()
        tables, biases = _in_blocks(weight_VD, bias_V)
        own_N = (hidden_ND * weight_VD[targets_N]).sum(-1) + bias_V[targets_N]
        threads, positions = _threads(), len(targets_N)
        max_TN = np.full((threads, positions), -np.inf, np.float32)
        sum_TN, rank_TN = np.zeros((threads, positions)), np.zeros((threads, positions), np.int64)
        forward, _ = _kernels(weight_VD.shape[1])
        forward(hidden_ND.numpy(), tables.numpy(), biases.numpy(), targets_N.numpy(), own_N.numpy(), max_TN, sum_TN, rank_TN, with_rank)
        most_N = max_TN.max(0).astype(np.float64)
        log_sum_N = most_N + np.log((sum_TN * np.exp(max_TN - most_N)).sum(0))
        context.save_for_backward(hidden_ND, tables, biases, targets_N, weight_VD)
        context.log_sum_N = log_sum_N
        loss_sum = torch.tensor((log_sum_N - own_N.double().numpy()).sum(), dtype=torch.float32)
        rank_N = torch.from_numpy(rank_TN.sum(0)) if with_rank else torch.empty(0, dtype=torch.int64)
        context.mark_non_differentiable(rank_N)
        return loss_sum, rank_N

    @staticmethod
    def backward(context: Any, d_loss: Tensor, d_rank: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, tables, biases, targets_N, weight_VD = context.saved_tensors
        scale, (vocab, width) = d_loss.item(), weight_VD.shape
        d_tables, d_biases = torch.zeros_like(tables), torch.zeros_like(biases)
        d_hidden_TND = np.zeros((_threads(), len(hidden_ND), width))
        _, backward = _kernels(width)
        log_sum_N = context.log_sum_N.astype(np.float32)
        backward(hidden_ND.numpy(), tables.numpy(), biases.numpy(), log_sum_N, np.float32(scale), d_tables.numpy(), d_biases.numpy(), d_hidden_TND)
        d_weight_VD = d_tables.transpose(1, 2).reshape(-1, width)[:vocab].contiguous()
        d_weight_VD.index_add_(0, targets_N, hidden_ND, alpha=-scale)
        d_bias = d_biases.view(-1)[:vocab].clone()
        d_bias.index_add_(0, targets_N, torch.full((len(targets_N),), -scale))
        d_hidden_ND = torch.from_numpy(d_hidden_TND.sum(0).astype(np.float32)) - scale * weight_VD[targets_N]
        return d_hidden_ND, d_weight_VD, d_bias, None, None
