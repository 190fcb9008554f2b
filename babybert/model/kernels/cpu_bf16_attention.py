"""Self-attention on a CPU in bf16 for packed pairs: batched products by oneDNN, and numba kernels between them.

Pairs of about the same length form a bucket, and are padded to its longest. So a batch has few products, with little
padding. The kernels copy tokens into buckets and back, take the softmax of the scores, and turn the gradient of the
weights into that of the scores, each in one pass. PyTorch's own attention is several times slower in bf16: its backward
does not use the matrix units.

Shapes: N tokens of all pairs, D width of all heads, G pairs of a bucket, H heads, L positions of a bucket, C width of a
head, T threads.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from babybert.jit import compile_kernels
from babybert.model.kernels.cpu_bf16_math import bits_array, narrow, widen
from babybert.model.kernels.cpu_math import aligned, bits_of, dropout_constants, exp, row_key, threads_for

STEP = 16  # lengths of buckets are its multiples: the numbers of a 512-bit vector


class Bucket(NamedTuple):
    """Pairs of about the same length."""

    first_G: np.ndarray  # each pair's first token among the packed ones
    length_G: np.ndarray  # its tokens
    positions: int  # a multiple of STEP


class Attended(NamedTuple):
    """What the backward needs of one bucket. `dropped` are the weights after dropout: the same tensor without it."""

    q_GHLC: Tensor
    k_GHLC: Tensor
    v_GHLC: Tensor
    weights_GHLL: Tensor
    dropped_GHLL: Tensor


def make_buckets(cu_seqlens: Tensor) -> list[Bucket]:
    """Group the pairs by their length, rounded up to a multiple of STEP."""
    first_B = cu_seqlens[:-1].numpy()
    length_B = cu_seqlens.diff().numpy()
    positions_B = -(-length_B // STEP) * STEP
    return [
        Bucket(first_B[positions_B == positions], length_B[positions_B == positions], int(positions))
        for positions in np.unique(positions_B)
        if positions
    ]


@njit(inline="always", fastmath=True)
def _softmax(z, length, lanes):
    """Replace the first `length` numbers of a row by their softmax, and the others by 0."""
    for j in range(length, len(z)):
        z[j] = np.float32(-1e30)
    for v in range(STEP):
        lanes[v] = z[v]
    for first in range(STEP, len(z), STEP):
        for v in range(STEP):
            lanes[v] = max(lanes[v], z[first + v])
    top, total = lanes[0], np.float32(0)
    for v in range(1, STEP):
        top = max(top, lanes[v])
    for j in range(len(z)):
        z[j] = exp(z[j] - top)
        total += z[j]
    inverse = np.float32(1 / total)
    for j in range(len(z)):
        z[j] *= inverse
    for j in range(length, len(z)):
        z[j] = np.float32(0)


@njit(inline="always", fastmath=True)
def _copy_in(C, x_D, bias_D, y_C):
    """One token's numbers of a head, with the bias."""
    for c in range(C):
        y_C[c] = narrow(widen(x_D[c]) + bias_D[c])


@njit(inline="always", fastmath=True)
def _copy_out(C, x_C, y_D, sum_C):
    """One token's numbers of a head, which are also added to a sum."""
    for c in range(C):
        y_D[c] = x_C[c]
    for c in range(C):
        sum_C[c] += widen(x_C[c])


def _make(head_width: int, cache: bool) -> tuple[Any, ...]:
    return *_make_copies(head_width, cache), *_make_softmax(cache)


def _make_copies(head_width: int, cache: bool) -> tuple[Any, Any]:
    C = head_width

    @njit(parallel=True, fastmath=True, cache=cache)
    def gather(x_ND, bias_D, first_G, length_G, x_SGHLC, threads):
        """Copy tokens, with the bias, into a bucket. S parts of the width (queries, keys, values) lie side by side."""
        parts, pairs, heads, positions, _ = x_SGHLC.shape
        for thread in prange(threads):
            for g in range(pairs * thread // threads, pairs * (thread + 1) // threads):
                for s in range(parts):
                    for h in range(heads):
                        column, head = (s * heads + h) * C, x_SGHLC[s, g, h]
                        for j in range(length_G[g]):
                            _copy_in(C, x_ND[first_G[g] + j, column:], bias_D[column:], head[j])
                        for j in range(length_G[g], positions):
                            head[j] = 0

    @njit(parallel=True, fastmath=True, cache=cache)
    def scatter(x_GHLC, part, first_G, length_G, x_ND, sum_TD, threads):
        """Copy a bucket back to tokens, as a part of their width, and add the rows up."""
        pairs, heads, _, _ = x_GHLC.shape
        for thread in prange(threads):
            total = np.empty(C, np.float32)
            for g in range(pairs * thread // threads, pairs * (thread + 1) // threads):
                for h in range(heads):
                    column, head = (part * heads + h) * C, x_GHLC[g, h]
                    total[:] = 0
                    for j in range(length_G[g]):
                        _copy_out(C, head[j], x_ND[first_G[g] + j, column:], total)
                    for c in range(C):
                        sum_TD[thread, column + c] += total[c]

    return gather, scatter


def _make_softmax(cache: bool) -> tuple[Any, Any]:
    @njit(parallel=True, fastmath=True, cache=cache)
    def softmax(scores_GHLL, dropped_GHLL, first_G, length_G, root, seed0, seed1, threshold, scale, threads):
        """Turn scores into weights in place, and write them after dropout, if there is any."""
        pairs, heads, positions, _ = scores_GHLL.shape
        for thread in prange(threads):
            z, lanes = aligned(positions), aligned(STEP)
            for g in range(pairs * thread // threads, pairs * (thread + 1) // threads):
                for h in range(heads):
                    for i in range(positions):
                        scores = scores_GHLL[g, h, i]
                        if i >= length_G[g]:
                            scores[:] = 0
                        else:
                            for j in range(positions):
                                z[j] = widen(scores[j]) * root
                            _softmax(z, length_G[g], lanes)
                            for j in range(positions):
                                scores[j] = narrow(z[j])
                        if threshold > 0:
                            key, dropped = row_key((first_G[g] + i) * heads + h, seed0, seed1), dropped_GHLL[g, h, i]
                            for j in range(positions):
                                factor = scale if bits_of(key, j) >= threshold else np.float32(0)
                                dropped[j] = narrow(widen(scores[j]) * factor)

    @njit(parallel=True, fastmath=True, cache=cache)
    def softmax_backward(d_GHLL, weights_GHLL, first_G, length_G, root, seed0, seed1, threshold, scale, threads):
        """Turn the gradient of the weights after dropout into that of the scores, in place."""
        pairs, heads, positions, _ = d_GHLL.shape
        for thread in prange(threads):
            r = aligned(positions)
            for g in range(pairs * thread // threads, pairs * (thread + 1) // threads):
                for h in range(heads):
                    for i in range(length_G[g]):
                        d, weights, mean = d_GHLL[g, h, i], weights_GHLL[g, h, i], np.float32(0)
                        for j in range(positions):
                            r[j] = widen(d[j])
                        if threshold > 0:
                            key = row_key((first_G[g] + i) * heads + h, seed0, seed1)
                            for j in range(positions):
                                r[j] *= scale if bits_of(key, j) >= threshold else np.float32(0)
                        for j in range(positions):
                            mean += r[j] * widen(weights[j])
                        for j in range(positions):
                            d[j] = narrow(widen(weights[j]) * (r[j] - mean) * root)
                    for i in range(length_G[g], positions):
                        d_GHLL[g, h, i, :] = 0

    return softmax, softmax_backward


kernels_for = compile_kernels(_make)  # by width of a head


def _gather(x_ND: Tensor, bias_D: Tensor, bucket: Bucket, parts: int, heads: int) -> Tensor:
    """Tokens of a bucket (S, G, H, L, C), of S parts of the width."""
    pairs, head_width = len(bucket.first_G), x_ND.shape[1] // (parts * heads)
    x_SGHLC = torch.empty(parts, pairs, heads, bucket.positions, head_width, dtype=torch.bfloat16)
    gather, *_ = kernels_for(head_width)
    arrays = bits_array(x_ND), bias_D.detach().numpy(), bucket.first_G, bucket.length_G, bits_array(x_SGHLC)
    gather(*arrays, threads_for(pairs, 1))
    return x_SGHLC


def _scatter(x_GHLC: Tensor, part: int, bucket: Bucket, x_ND: Tensor, sum_TD: Tensor) -> None:
    """Copy a bucket's result to the rows of its tokens, and add them to the sum of all rows."""
    _, scatter, *_ = kernels_for(x_GHLC.shape[-1])
    arrays = bucket.first_G, bucket.length_G, bits_array(x_ND), sum_TD.numpy()
    scatter(bits_array(x_GHLC), part, *arrays, threads_for(len(bucket.first_G), 1))


def _product(a_GHIJ: Tensor, b_GHJK: Tensor) -> Tensor:
    """Batched matrix products of the last two dimensions."""
    return torch.bmm(a_GHIJ.flatten(0, 1), b_GHJK.flatten(0, 1)).unflatten(0, a_GHIJ.shape[:2])


def attend(
    qkv_N3D: Tensor, bias_3D: Tensor, buckets: list[Bucket], heads: int, dropout_p: float, seed_2: Tensor
) -> tuple[Tensor, list[Attended]]:
    """Scaled dot-product attention of `qkv + bias` within each pair, to (N, D), and what the backward needs."""
    rows, width = len(qkv_N3D), qkv_N3D.shape[1] // 3
    out_ND, sum_TD = torch.empty(rows, width, dtype=torch.bfloat16), torch.empty(threads_for(rows, 1), width)
    dropout, root = dropout_constants(dropout_p, seed_2), np.float32((width // heads) ** -0.5)
    _, _, softmax, _ = kernels_for(width // heads)
    saved = []
    for bucket in buckets:
        q_GHLC, k_GHLC, v_GHLC = _gather(qkv_N3D, bias_3D, bucket, 3, heads)
        weights_GHLL = _product(q_GHLC, k_GHLC.mT)
        dropped_GHLL = torch.empty_like(weights_GHLL) if dropout_p else weights_GHLL
        arrays = bits_array(weights_GHLL), bits_array(dropped_GHLL), bucket.first_G, bucket.length_G
        softmax(*arrays, root, *dropout, threads_for(len(bucket.first_G), 1))
        _scatter(_product(dropped_GHLL, v_GHLC), 0, bucket, out_ND, sum_TD)
        saved.append(Attended(q_GHLC, k_GHLC, v_GHLC, weights_GHLL, dropped_GHLL))
    return out_ND, saved


def attend_backward(
    d_out_ND: Tensor, saved: list[Attended], buckets: list[Bucket], dropout_p: float, seed_2: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients by `qkv` (N, 3D, bf16) and by its bias (3D, fp32)."""
    rows, width = d_out_ND.shape
    heads, no_bias_D = saved[0].q_GHLC.shape[1], torch.zeros(width)
    d_qkv_N3D = torch.empty(rows, 3 * width, dtype=torch.bfloat16)
    d_bias_T3D = torch.zeros(threads_for(rows, 1), 3 * width)
    dropout, root = dropout_constants(dropout_p, seed_2), np.float32((width // heads) ** -0.5)
    *_, softmax_backward = kernels_for(width // heads)
    for bucket, of_bucket in zip(buckets, saved, strict=True):
        q_GHLC, k_GHLC, v_GHLC, weights_GHLL, dropped_GHLL = of_bucket
        (d_out_GHLC,) = _gather(d_out_ND, no_bias_D, bucket, 1, heads)
        d_GHLL = _product(d_out_GHLC, v_GHLC.mT)
        arrays = bits_array(d_GHLL), bits_array(weights_GHLL), bucket.first_G, bucket.length_G
        softmax_backward(*arrays, root, *dropout, threads_for(len(bucket.first_G), 1))
        d_v_GHLC = _product(dropped_GHLL.mT, d_out_GHLC)
        d_q_GHLC, d_k_GHLC = _product(d_GHLL, k_GHLC), _product(d_GHLL.mT, q_GHLC)
        for part, d_GHLC in enumerate((d_q_GHLC, d_k_GHLC, d_v_GHLC)):
            _scatter(d_GHLC, part, bucket, d_qkv_N3D, d_bias_T3D)
    return d_qkv_N3D, d_bias_T3D.sum(0)
