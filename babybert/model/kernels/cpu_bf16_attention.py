"""Self-attention on a CPU in bf16 for packed pairs: batched products by oneDNN, and numba kernels between them.

Pairs of about the same length form a bucket, and are padded to its longest. So a batch has few products, with little
padding. All buckets lie end to end in one buffer, so that one pass serves all of them. The kernels copy tokens into
buckets and back, take the softmax of the scores, and turn the gradient of the weights into that of the scores.
PyTorch's own attention is several times slower in bf16: its backward does not use the matrix units.

Shapes: B pairs, sorted by length, N tokens of all pairs, D width of all heads, G pairs of a bucket, H heads, L
positions of a bucket, C width of a head, X numbers of all buckets, S parts of the width, T threads.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from babybert.jit import compile_kernels
from babybert.model.kernels.cpu_bf16_math import bits_array, narrow, round_up, widen
from babybert.model.kernels.cpu_math import aligned, bits_of, dropout_constants, exp, row_key, threads_for

STEP = 16  # lengths of buckets are its multiples: the numbers of a 512-bit vector


@dataclass(frozen=True)
class Buckets:
    """Pairs in the order of their buckets."""

    first_B: np.ndarray  # each pair's first token among the packed ones
    length_B: np.ndarray  # its tokens
    positions_B: np.ndarray  # of its bucket, a multiple of STEP
    sizes: list[tuple[int, int]]  # pairs and positions of each bucket

    @classmethod
    def of(cls, cu_seqlens: Tensor) -> "Buckets":
        """Sort the pairs by their length, rounded up to a multiple of STEP. Empty pairs round their numbers up."""
        first_B, length_B = cu_seqlens[:-1].numpy(), cu_seqlens.diff().numpy()
        positions_B = -(-length_B // STEP) * STEP
        lengths, pairs = np.unique(positions_B[positions_B > 0], return_counts=True)
        sizes = [
            (round_up(count, 3), positions) for count, positions in zip(pairs.tolist(), lengths.tolist(), strict=True)
        ]
        empty = [size - count for (size, _), count in zip(sizes, pairs.tolist(), strict=True)]
        order = [np.flatnonzero(positions_B == positions) for positions in lengths]
        fill = [np.zeros(count, np.int64) for count in empty]

        def in_buckets(x_B: np.ndarray) -> np.ndarray:
            return np.concatenate(
                [part for rows, zeros in zip(order, fill, strict=True) for part in (x_B[rows], zeros)]
            )

        return cls(in_buckets(first_B), in_buckets(length_B), np.repeat(lengths, [size for size, _ in sizes]), sizes)

    def starts(self, columns: int | np.ndarray, heads: int) -> np.ndarray:
        """Where each pair begins in a buffer of its heads' (L, columns), and where the last one ends (B + 1)."""
        return np.concatenate([[0], np.cumsum(heads * self.positions_B * columns)])

    def views(self, x_X: Tensor, columns: int | None, heads: int) -> Iterator[Tensor]:
        """Each bucket (G x H, L, columns) of a buffer; None stands for L columns."""
        begin = 0
        for pairs, positions in self.sizes:
            shape = pairs * heads, positions, columns or positions
            end = begin + math.prod(shape)
            yield x_X[begin:end].view(shape)
            begin = end


class Attended(NamedTuple):
    """What the backward needs. `dropped` are the weights after dropout: the same tensor without it."""

    q_X: Tensor
    k_X: Tensor
    v_X: Tensor
    weights_X: Tensor
    dropped_X: Tensor


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
    def gather(x_ND, bias_D, first_B, length_B, positions_B, start_B, x_SX, threads):
        """Copy tokens, with the bias, into buckets. S parts of the width (queries, keys, values) lie side by side."""
        (parts, _), pairs = x_SX.shape, len(first_B)
        heads = x_ND.shape[1] // (parts * C)
        for thread in prange(threads):
            for b in range(thread, pairs, threads):
                for s in range(parts):
                    for h in range(heads):
                        column, start = (s * heads + h) * C, start_B[b] + h * positions_B[b] * C
                        for j in range(length_B[b]):
                            _copy_in(C, x_ND[first_B[b] + j, column:], bias_D[column:], x_SX[s, start + j * C :])
                        x_SX[s, start + length_B[b] * C : start + positions_B[b] * C] = 0

    @njit(parallel=True, fastmath=True, cache=cache)
    def scatter(x_SX, first_B, length_B, positions_B, start_B, x_ND, sum_TD, threads):
        """Copy buckets back to tokens, part beside part, and add the rows up. Rows of no token are left as they are."""
        (parts, _), pairs = x_SX.shape, len(first_B)
        heads = x_ND.shape[1] // (parts * C)
        for thread in prange(threads):
            total = np.empty(C, np.float32)
            for b in range(thread, pairs, threads):
                for s in range(parts):
                    for h in range(heads):
                        column, start = (s * heads + h) * C, start_B[b] + h * positions_B[b] * C
                        total[:] = 0
                        for j in range(length_B[b]):
                            _copy_out(C, x_SX[s, start + j * C :], x_ND[first_B[b] + j, column:], total)
                        for c in range(C):
                            sum_TD[thread, column + c] += total[c]

    return gather, scatter


def _make_softmax(cache: bool) -> tuple[Any, Any]:
    @njit(parallel=True, fastmath=True, cache=cache)
    def softmax(scores_X, dropped_X, heads, first_B, length_B, positions_B, start_B,
                root, seed0, seed1, threshold, scale, threads):  # fmt: skip
        """Turn scores into weights in place, and write them after dropout, if there is any."""
        for thread in prange(threads):
            buffer, lanes = aligned(positions_B[-1]), aligned(STEP)
            for b in range(thread, len(first_B), threads):
                L, length = positions_B[b], length_B[b]
                z = buffer[:L]
                for h in range(heads):
                    for i in range(L):
                        start = start_B[b] + (h * L + i) * L
                        scores = scores_X[start : start + L]
                        if i >= length:
                            scores[:] = 0
                        else:
                            for j in range(L):
                                z[j] = widen(scores[j]) * root
                            _softmax(z, length, lanes)
                            for j in range(L):
                                scores[j] = narrow(z[j])
                        if threshold > 0:
                            key, dropped = row_key((first_B[b] + i) * heads + h, seed0, seed1), dropped_X[start:]
                            for j in range(L):
                                factor = scale if bits_of(key, j) >= threshold else np.float32(0)
                                dropped[j] = narrow(widen(scores[j]) * factor)

    @njit(parallel=True, fastmath=True, cache=cache)
    def softmax_backward(d_X, weights_X, heads, first_B, length_B, positions_B, start_B,
                         root, seed0, seed1, threshold, scale, threads):  # fmt: skip
        """Turn the gradient of the weights after dropout into that of the scores, in place."""
        for thread in prange(threads):
            buffer = aligned(positions_B[-1])
            for b in range(thread, len(first_B), threads):
                L, length = positions_B[b], length_B[b]
                r = buffer[:L]
                for h in range(heads):
                    for i in range(length):
                        start, mean = start_B[b] + (h * L + i) * L, np.float32(0)
                        d, weights = d_X[start : start + L], weights_X[start : start + L]
                        for j in range(L):
                            r[j] = widen(d[j])
                        if threshold > 0:
                            key = row_key((first_B[b] + i) * heads + h, seed0, seed1)
                            for j in range(L):
                                r[j] *= scale if bits_of(key, j) >= threshold else np.float32(0)
                        for j in range(L):
                            mean += r[j] * widen(weights[j])
                        for j in range(L):
                            d[j] = narrow(widen(weights[j]) * (r[j] - mean) * root)
                    d_X[start_B[b] + (h * L + length) * L : start_B[b] + (h + 1) * L * L] = 0

    return softmax, softmax_backward


kernels_for = compile_kernels(_make)  # by width of a head


class _Batch:
    """The kernels and products of one call, for its buckets and sizes."""

    def __init__(self, buckets: Buckets, heads: int, head_width: int, dropout_p: float, seed_2: Tensor) -> None:
        self.buckets, self.heads, self.head_width = buckets, heads, head_width
        self._gather, self._scatter, self._softmax, self._softmax_backward = kernels_for(head_width)
        self._pairs = buckets.first_B, buckets.length_B, buckets.positions_B
        self._start_B, self._score_start_B = (buckets.starts(n, heads) for n in (head_width, buckets.positions_B))
        self._root = np.float32(head_width**-0.5)
        self._dropout = dropout_constants(dropout_p, seed_2)
        self._threads = threads_for(len(buckets.first_B), 1)

    def gather(self, x_ND: Tensor, bias_D: Tensor, parts: int) -> Tensor:
        """Tokens in buckets (S, X)."""
        x_SX = torch.empty(parts, int(self._start_B[-1]), dtype=torch.bfloat16)
        arrays = *self._pairs, self._start_B, bits_array(x_SX)
        self._gather(bits_array(x_ND), bias_D.detach().numpy(), *arrays, self._threads)
        return x_SX

    def scatter(self, x_SX: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Buckets as rows of tokens (N, S x D, bf16), and the sum of these rows (fp32)."""
        width = len(x_SX) * self.heads * self.head_width
        x_ND, sum_TD = torch.empty(rows, width, dtype=torch.bfloat16), torch.zeros(self._threads, width)
        x_ND[int(self.buckets.length_B.sum()) :] = 0
        arrays = *self._pairs, self._start_B, bits_array(x_ND), sum_TD.numpy()
        self._scatter(bits_array(x_SX), *arrays, self._threads)
        return x_ND, sum_TD.sum(0)

    def scores(self, a_X: Tensor, b_X: Tensor) -> Tensor:
        """`a @ b.T` of each head (X)."""
        scores_X = torch.empty(int(self._score_start_B[-1]), dtype=torch.bfloat16)
        tokens = [self.buckets.views(x_X, self.head_width, self.heads) for x_X in (a_X, b_X)]
        for out, a, b in zip(self.buckets.views(scores_X, None, self.heads), *tokens, strict=True):
            torch.bmm(a, b.mT, out=out)
        return scores_X

    def weighted(self, weights_X: Tensor, x_X: Tensor, out_X: Tensor, transposed: bool = False) -> None:
        """`weights @ x` of each head, or `weights.T @ x`, in `out_X`."""
        tokens = [self.buckets.views(y_X, self.head_width, self.heads) for y_X in (x_X, out_X)]
        for weights, x, out in zip(self.buckets.views(weights_X, None, self.heads), *tokens, strict=True):
            torch.bmm(weights.mT if transposed else weights, x, out=out)

    def softmax(self, scores_X: Tensor, dropped_X: Tensor) -> None:
        """Turn scores into weights, in place, and write those after dropout."""
        arrays = self.heads, *self._pairs, self._score_start_B
        self._softmax(bits_array(scores_X), bits_array(dropped_X), *arrays, self._root, *self._dropout, self._threads)

    def softmax_backward(self, d_X: Tensor, weights_X: Tensor) -> None:
        """Turn the gradient of weights into that of scores, in place."""
        arrays = self.heads, *self._pairs, self._score_start_B
        self._softmax_backward(
            bits_array(d_X), bits_array(weights_X), *arrays, self._root, *self._dropout, self._threads
        )


def attend(
    qkv_N3D: Tensor, bias_3D: Tensor, buckets: Buckets, heads: int, dropout_p: float, seed_2: Tensor
) -> tuple[Tensor, Attended]:
    """Scaled dot-product attention of `qkv + bias` within each pair, to (N, D), and what the backward needs."""
    batch = _Batch(buckets, heads, qkv_N3D.shape[1] // (3 * heads), dropout_p, seed_2)
    q_X, k_X, v_X = batch.gather(qkv_N3D, bias_3D, 3)
    weights_X = batch.scores(q_X, k_X)
    dropped_X = torch.empty_like(weights_X) if dropout_p else weights_X
    batch.softmax(weights_X, dropped_X)
    out_1X = torch.empty(1, len(q_X), dtype=torch.bfloat16)
    batch.weighted(dropped_X, v_X, out_1X[0])
    out_ND, _ = batch.scatter(out_1X, len(qkv_N3D))
    return out_ND, Attended(q_X, k_X, v_X, weights_X, dropped_X)


def attend_backward(
    d_out_ND: Tensor, saved: Attended, buckets: Buckets, heads: int, dropout_p: float, seed_2: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients by `qkv` (N, 3D, bf16) and by its bias (3D, fp32)."""
    width = d_out_ND.shape[1]
    batch = _Batch(buckets, heads, width // heads, dropout_p, seed_2)
    (d_out_X,) = batch.gather(d_out_ND, torch.zeros(width), 1)
    d_scores_X = batch.scores(d_out_X, saved.v_X)
    batch.softmax_backward(d_scores_X, saved.weights_X)
    d_qkv_3X = torch.empty(3, len(d_out_X), dtype=torch.bfloat16)
    batch.weighted(d_scores_X, saved.k_X, d_qkv_3X[0])
    batch.weighted(d_scores_X, saved.q_X, d_qkv_3X[1], transposed=True)
    batch.weighted(saved.dropped_X, d_out_X, d_qkv_3X[2], transposed=True)
    return batch.scatter(d_qkv_3X, len(d_out_ND))
