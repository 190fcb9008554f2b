"""Self-attention on a CPU for packed pairs: numba kernels without padding and without a T x T matrix in memory.

PyTorch's attention with dropout on a CPU writes B x H x T x T scores several times and draws as many random numbers
from a serial generator. Here the scores of one query live in the cache, and each pair attends to its own tokens only,
so there is no mask. The forward stores the logarithm of each softmax's denominator; the backward computes the scores
again from it (FlashAttention: Dao et al., 2022). Tiles are not needed: the keys and values of a head fit the cache at a
few hundred positions. Dropout is a hash of (query, head, key, seed), computed again in the backward.

Keys and values are copied to (C, T), so that the innermost loops run over neighbouring keys and vectorise.

Shapes: B pairs, N tokens of all pairs, D width of all heads, C width of one head, H heads, T tokens of a pair.

In the loops, `root` is the scale of the scores, 1 / sqrt(C). `threshold` and `scale`, 1 / (1 - p), belong to dropout.
`key` is a row's part of the dropout hash (`cpu_math.row_key`).
"""

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from babybert.jit import compile_kernels
from babybert.model.kernels import Requirements
from babybert.model.kernels.cpu_math import bits_of, dropout_constants, exp, row_key, threads_for

WIDEST, WIDEST_WITH_DROPOUT = 16, 32  # of a head; above them PyTorch's attention is faster (benchmarks/kernels.py)


@njit(inline="always", fastmath=True)
def _load_keys_and_values(C, root, qkv_N3D, first, tokens, width, head, keys_CT, values_CT):
    """Copy one head's keys, scaled by 1 / sqrt(C), and its values, as columns."""
    for j in range(tokens):
        for c in range(C):
            keys_CT[c, j] = qkv_N3D[first + j, width + head * C + c] * root
            values_CT[c, j] = qkv_N3D[first + j, 2 * width + head * C + c]


@njit(inline="always", fastmath=True)
def _attend(C, q, keys_CT, values_CT, tokens, key, threshold, scale, p_T, out, log_sum):
    """One query's output, and the logarithm of its softmax's denominator; `p_T` is scratch space for its scores."""
    top, total = np.float32(-1e30), np.float32(0)
    for j in range(tokens):
        z = np.float32(0)
        for c in range(C):
            z += q[c] * keys_CT[c, j]
        p_T[j] = z
    for j in range(tokens):
        top = max(top, p_T[j])
    for j in range(tokens):
        e = exp(p_T[j] - top)
        total += e  # the softmax's denominator includes the keys that are dropped out below
        p_T[j] = e if bits_of(key, j) >= threshold else np.float32(0)
    log_sum[0] = top + np.log(total)
    for c in range(C):
        mean = np.float32(0)
        for j in range(tokens):
            mean += p_T[j] * values_CT[c, j]
        out[c] = mean * scale / total


@njit(inline="always", fastmath=True)
def _probabilities(C, q, d_out, log_sum, mean, keys_CT, values_CT, tokens, key, threshold, scale, p_T, g_T):
    """One query's dropped-out probabilities `p_T`, computed again, and the gradients `g_T` of its scores.

    With e = softmax(z), dropout factor f and r = d_out . value, the gradient of z is e (f r - mean): `mean` is
    d_out . out, the sum of e f r over the keys.
    """
    for j in range(tokens):
        z, r = np.float32(0), np.float32(0)
        for c in range(C):
            z += q[c] * keys_CT[c, j]
        for c in range(C):
            r += d_out[c] * values_CT[c, j]
        e = exp(min(z - log_sum, np.float32(0)))
        factor = scale if bits_of(key, j) >= threshold else np.float32(0)
        p_T[j] = e * factor
        g_T[j] = e * (factor * r - mean)


@njit(inline="always", fastmath=True)
def _add_gradients(C, root, q, d_out, p_T, g_T, keys_CT, tokens, d_q, d_keys_CT, d_values_CT):
    """Set one query's gradient, and add its share of the keys' and values' gradients."""
    for c in range(C):
        scaled_q, d_out_c, total = q[c] * root, d_out[c], np.float32(0)
        for j in range(tokens):
            total += g_T[j] * keys_CT[c, j]
            d_keys_CT[c, j] += g_T[j] * scaled_q
            d_values_CT[c, j] += p_T[j] * d_out_c
        d_q[c] = total


@njit(inline="always", fastmath=True)
def _store_gradients(C, d_keys_CT, d_values_CT, first, tokens, width, head, d_qkv_N3D):
    """Copy one head's gradients of keys and values back to rows."""
    for j in range(tokens):
        for c in range(C):
            d_qkv_N3D[first + j, width + head * C + c] = d_keys_CT[c, j]
            d_qkv_N3D[first + j, 2 * width + head * C + c] = d_values_CT[c, j]


def _make(head_width: int, cache: bool) -> tuple[Any, Any]:
    C = head_width
    root = np.float32(C**-0.5)

    @njit(parallel=True, fastmath=True, cache=cache)
    def forward(qkv_N3D, cu_seqlens, longest, out_ND, log_sum_NH, seed0, seed1, threshold, scale, threads):
        pairs, heads = len(cu_seqlens) - 1, log_sum_NH.shape[1]
        for thread in prange(threads):
            keys, values = np.empty((C, longest), np.float32), np.empty((C, longest), np.float32)
            p = np.empty(longest, np.float32)
            for b in range(pairs * thread // threads, pairs * (thread + 1) // threads):
                first, tokens = cu_seqlens[b], cu_seqlens[b + 1] - cu_seqlens[b]
                for head in range(heads):
                    _load_keys_and_values(C, root, qkv_N3D, first, tokens, heads * C, head, keys, values)
                    for n in range(first, first + tokens):
                        q, out = qkv_N3D[n, head * C : head * C + C], out_ND[n, head * C : head * C + C]
                        log_sum, key = log_sum_NH[n, head : head + 1], row_key(n * heads + head, seed0, seed1)
                        _attend(C, q, keys, values, tokens, key, threshold, scale, p, out, log_sum)

    @njit(parallel=True, fastmath=True, cache=cache)
    def backward(
        qkv_N3D, cu_seqlens, longest, out_ND, log_sum_NH, d_out_ND, d_qkv_N3D, seed0, seed1, threshold, scale, threads
    ):
        pairs, heads = len(cu_seqlens) - 1, log_sum_NH.shape[1]
        width = heads * C
        for thread in prange(threads):
            keys, values = np.empty((C, longest), np.float32), np.empty((C, longest), np.float32)
            d_keys, d_values = np.empty((C, longest), np.float32), np.empty((C, longest), np.float32)
            p, g = np.empty(longest, np.float32), np.empty(longest, np.float32)
            for b in range(pairs * thread // threads, pairs * (thread + 1) // threads):
                first, tokens = cu_seqlens[b], cu_seqlens[b + 1] - cu_seqlens[b]
                for head in range(heads):
                    _load_keys_and_values(C, root, qkv_N3D, first, tokens, width, head, keys, values)
                    d_keys[:], d_values[:] = 0, 0
                    for n in range(first, first + tokens):
                        q, d_out = qkv_N3D[n, head * C : head * C + C], d_out_ND[n, head * C : head * C + C]
                        key, log_sum, mean = row_key(n * heads + head, seed0, seed1), log_sum_NH[n, head], np.float32(0)
                        for c in range(C):
                            mean += d_out[c] * out_ND[n, head * C + c]
                        _probabilities(C, q, d_out, log_sum, mean, keys, values, tokens, key, threshold, scale, p, g)
                        d_q = d_qkv_N3D[n, head * C : head * C + C]
                        _add_gradients(C, root, q, d_out, p, g, keys, tokens, d_q, d_keys, d_values)
                    _store_gradients(C, d_keys, d_values, first, tokens, width, head, d_qkv_N3D)

    return forward, backward


kernels_for = compile_kernels(_make)  # by width of a head


def requirements(qkv_N3D: Tensor, heads: int, dropout_p: float) -> Requirements:
    """What must hold for these kernels to be correct and faster than PyTorch's attention."""
    widest = WIDEST_WITH_DROPOUT if dropout_p else WIDEST
    return {
        "on a CPU": qkv_N3D.device.type == "cpu",
        "fp32": qkv_N3D.dtype == torch.float32,
        f"head width <= {WIDEST} ({WIDEST_WITH_DROPOUT} with dropout)": qkv_N3D.shape[1] // (3 * heads) <= widest,
        "at least one token": len(qkv_N3D) > 0,
    }


class CpuAttention(torch.autograd.Function):
    """Scaled dot-product attention of queries, keys and values side by side (N, 3D), pair by pair, to (N, D).

    Pair b is rows `cu_seqlens[b]` to `cu_seqlens[b + 1]`. Dropout applies to the weights, after the softmax.
    """

    @staticmethod
    def forward(
        context: Any, qkv_N3D: Tensor, cu_seqlens: Tensor, heads: int, dropout_p: float, seed_2: Tensor
    ) -> Tensor:
        qkv_N3D = qkv_N3D.contiguous()
        rows, width = len(qkv_N3D), qkv_N3D.shape[1] // 3
        out_ND, log_sum_NH = torch.empty(rows, width), np.empty((rows, heads), np.float32)
        longest = int(cu_seqlens.diff().max())
        arrays = qkv_N3D.numpy(), cu_seqlens.numpy(), longest, out_ND.numpy(), log_sum_NH
        forward, _ = kernels_for(width // heads)
        forward(*arrays, *dropout_constants(dropout_p, seed_2), threads_for(len(cu_seqlens) - 1, 1))
        context.save_for_backward(qkv_N3D, cu_seqlens, out_ND, seed_2)
        context.log_sum_NH, context.dropout_p, context.longest = log_sum_NH, dropout_p, longest
        return out_ND

    @staticmethod
    def backward(context: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        qkv_N3D, cu_seqlens, out_ND, seed_2 = context.saved_tensors
        log_sum_NH, longest = context.log_sum_NH, context.longest
        d_out_ND, d_qkv_N3D = d_outputs[0].contiguous(), torch.empty_like(qkv_N3D)
        inputs = qkv_N3D.numpy(), cu_seqlens.numpy(), longest, out_ND.numpy(), log_sum_NH
        constants = dropout_constants(context.dropout_p, seed_2)
        _, backward = kernels_for(qkv_N3D.shape[1] // (3 * log_sum_NH.shape[1]))
        backward(*inputs, d_out_ND.numpy(), d_qkv_N3D.numpy(), *constants, threads_for(len(cu_seqlens) - 1, 1))
        return d_qkv_N3D, None, None, None, None
