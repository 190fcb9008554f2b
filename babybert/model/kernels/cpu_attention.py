"""Self-attention on a CPU for pairs laid end to end: numba kernels that know no padding and drop out by a hash.

PyTorch's attention with dropout on a CPU writes B x heads x T x T scores several times and draws as many random numbers
serially. Here one query's scores live in the cache and are computed again in the backward (Dao et al., 2022, of which
no tiling is needed at a few hundred positions); a pair attends to its own tokens only, so there is no mask.

Shapes: B pairs, N tokens of all of them, D width of all heads, C width of one head, H heads, T threads.
"""

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from babybert.model.kernels.cpu_math import bits_of, compiled, dropout_numbers, exp, row_key, threads_for

WIDEST, WIDEST_WITH_DROPOUT = 16, 32  # of a head; beyond them PyTorch's own attention wins (benchmarks/kernels.py)


@njit(inline="always", fastmath=True)
def _load(qkv_N3D, first, tokens, width, head, keys, values, C, root):
    """One head's keys, scaled, and values, as columns."""
    for j in range(tokens):
        for c in range(C):
            keys[c, j] = qkv_N3D[first + j, width + head * C + c] * root
            values[c, j] = qkv_N3D[first + j, 2 * width + head * C + c]


def _make(head_width: int, cache: bool) -> tuple[Any, Any]:
    C = head_width
    root = np.float32(C**-0.5)

    @njit(parallel=True, fastmath=True, cache=cache)
    def forward(qkv_N3D, offsets, longest, out_ND, log_sum_NH, seed0, seed1, threshold, scale, threads):
        pairs, heads = len(offsets) - 1, log_sum_NH.shape[1]
        for thread in prange(threads):
            keys, values, p = (
                np.empty((C, longest), np.float32),
                np.empty((C, longest), np.float32),
                np.empty(longest, np.float32),
            )
            for b in range(pairs * thread // threads, pairs * (thread + 1) // threads):
                first, tokens = offsets[b], offsets[b + 1] - offsets[b]
                for head in range(heads):
                    _load(qkv_N3D, first, tokens, heads * C, head, keys, values, C, root)
                    for n in range(first, first + tokens):
                        q, key = qkv_N3D[n, head * C : head * C + C], row_key(n * heads + head, seed0, seed1)
                        top, total = np.float32(-1e30), np.float32(0)
                        for j in range(tokens):
                            z = np.float32(0)
                            for c in range(C):
                                z += q[c] * keys[c, j]
                            p[j] = z
                        for j in range(tokens):
                            top = max(top, p[j])
                        for j in range(tokens):
                            e = exp(p[j] - top)
                            total += e
                            p[j] = e if bits_of(key, j) >= threshold else np.float32(0)
                        log_sum_NH[n, head] = top + np.log(total)
                        for c in range(C):
                            mean = np.float32(0)
                            for j in range(tokens):
                                mean += p[j] * values[c, j]
                            out_ND[n, head * C + c] = mean * scale / total

    @njit(parallel=True, fastmath=True, cache=cache)
    def backward(
        qkv_N3D, offsets, longest, out_ND, log_sum_NH, d_out_ND, d_qkv_N3D, seed0, seed1, threshold, scale, threads
    ):
        pairs, heads = len(offsets) - 1, log_sum_NH.shape[1]
        width = heads * C
        for thread in prange(threads):
            keys, values, p = (
                np.empty((C, longest), np.float32),
                np.empty((C, longest), np.float32),
                np.empty(longest, np.float32),
            )
            d_keys, d_values, g = (
                np.empty((C, longest), np.float32),
                np.empty((C, longest), np.float32),
                np.empty(longest, np.float32),
            )
            for b in range(pairs * thread // threads, pairs * (thread + 1) // threads):
                first, tokens = offsets[b], offsets[b + 1] - offsets[b]
                for head in range(heads):
                    _load(qkv_N3D, first, tokens, width, head, keys, values, C, root)
                    d_keys[:], d_values[:] = 0, 0
                    for n in range(first, first + tokens):
                        q, d_out = qkv_N3D[n, head * C : head * C + C], d_out_ND[n, head * C : head * C + C]
                        key, log_sum, mean = row_key(n * heads + head, seed0, seed1), log_sum_NH[n, head], np.float32(0)
                        for c in range(C):
                            mean += d_out[c] * out_ND[n, head * C + c]
                        for j in range(tokens):
                            z, r = np.float32(0), np.float32(0)
                            for c in range(C):
                                z += q[c] * keys[c, j]
                            for c in range(C):
                                r += d_out[c] * values[c, j]
                            e = exp(min(z - log_sum, np.float32(0)))
                            factor = scale if bits_of(key, j) >= threshold else np.float32(0)
                            p[j], g[j] = e * factor, e * (factor * r - mean)
                        for c in range(C):
                            own, other, total = q[c] * root, d_out[c], np.float32(0)
                            for j in range(tokens):
                                total += g[j] * keys[c, j]
                                d_keys[c, j] += g[j] * own
                                d_values[c, j] += p[j] * other
                            d_qkv_N3D[n, head * C + c] = total
                    for j in range(tokens):
                        for c in range(C):
                            d_qkv_N3D[first + j, width + head * C + c] = d_keys[c, j]
                            d_qkv_N3D[first + j, 2 * width + head * C + c] = d_values[c, j]

    return forward, backward


kernels = compiled(_make)


def supports(qkv_N3D: Tensor, heads: int, drop: float) -> bool:
    """Whether these kernels are made for such tensors, and faster than PyTorch's attention."""
    head_width, widest = qkv_N3D.shape[1] // (3 * heads), WIDEST_WITH_DROPOUT if drop else WIDEST
    return qkv_N3D.device.type == "cpu" and qkv_N3D.dtype == torch.float32 and head_width <= widest and len(qkv_N3D) > 0


class CpuAttention(torch.autograd.Function):
    """Scaled dot-product attention of queries, keys and values side by side (N, 3D), pair by pair, to (N, D).

    Pair b is rows `offsets[b]` to `offsets[b + 1]`. The weights are dropped out after the softmax.
    """

    @staticmethod
    def forward(context: Any, qkv_N3D: Tensor, offsets: Tensor, heads: int, drop: float, seed_2: Tensor) -> Tensor:
        qkv_N3D = qkv_N3D.contiguous()
        rows, width = len(qkv_N3D), qkv_N3D.shape[1] // 3
        out_ND, log_sum_NH = torch.empty(rows, width), np.empty((rows, heads), np.float32)
        longest = int(offsets.diff().max())
        forward, _ = kernels(width // heads)
        forward(
            qkv_N3D.numpy(),
            offsets.numpy(),
            longest,
            out_ND.numpy(),
            log_sum_NH,
            *dropout_numbers(drop, seed_2),
            threads_for(len(offsets) - 1, 1),
        )
        context.save_for_backward(qkv_N3D, offsets, out_ND, seed_2)
        context.log_sum_NH, context.drop, context.longest = log_sum_NH, drop, longest
        return out_ND

    @staticmethod
    def backward(context: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        qkv_N3D, offsets, out_ND, seed_2 = context.saved_tensors
        d_out_ND, d_qkv_N3D, log_sum_NH = d_outputs[0].contiguous(), torch.empty_like(qkv_N3D), context.log_sum_NH
        _, backward = kernels(qkv_N3D.shape[1] // (3 * log_sum_NH.shape[1]))
        tensors = (
            qkv_N3D.numpy(),
            offsets.numpy(),
            context.longest,
            out_ND.numpy(),
            log_sum_NH,
            d_out_ND.numpy(),
            d_qkv_N3D.numpy(),
        )
        backward(*tensors, *dropout_numbers(context.drop, seed_2), threads_for(len(offsets) - 1, 1))
        return d_qkv_N3D, None, None, None, None
