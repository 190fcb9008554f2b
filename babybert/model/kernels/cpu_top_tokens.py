"""A narrow model's inference on a CPU: numba kernels for one thread, which read each table once and write no logits.

A server needs the likeliest tokens at some positions and their probabilities, not a loss. `TopTokensKernel` reads the
vocabulary block by block. The logits of a block and a position stay in the first-level cache, where their exponentials
are added up and the best tokens so far are kept: nothing of N x V is written. A block is searched for better tokens
only if the sum of its exponentials is as large as that of the worst token kept, since no token can be better otherwise.
`FeedForwardKernel` is the feed-forward of training without dropout and threads.

Compiling for one thread takes a second or two, which a server spends before it reports that it is ready. Nothing is
cached on disk: numba's cache is keyed by the path of the source, and TorchServe unpacks an archive to a new one each
time.

The loops are compiled under the assumption that nothing overflows and nothing is NaN: `requirements` checks the
weights.

Shapes: N masks or tokens, D width, V vocabulary, K candidates, B blocks, C columns of a block.
"""

import functools
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor, nn

from babybert.model.kernels import Requirements
from babybert.model.kernels.cpu_math import LANES, exp, largest

BLOCK = 512  # tokens at a time: 20 KB of a table of width 10, which fit a core's first-level cache
UNITS = 256  # hidden units at a time, with two tables of weights
TOO_LARGE = np.float32(1e30)  # a sum of exponentials above which an fp32 sum may overflow
HIGHEST_EXPONENT = np.float32(80)  # e^80 x BLOCK is still finite, and above TOO_LARGE
ROUNDING_MARGIN = np.float32(0.99)  # of the sum that a block must reach: sums are rounded
ROWS_PER_THREAD = 8  # fewer positions are not worth a thread's start
WIDEST, WIDEST_FEED_FORWARD = 32, 16  # above them PyTorch's matrix products are faster
SMALLEST_VOCABULARY = 4096  # with fewer tokens the plain form costs next to nothing
LARGEST_WEIGHT = 1e4  # products of such numbers stay far below the largest of fp32, at any width up to WIDEST
NOTHING = np.float32(-1e30)  # the bias of the tokens that only fill the last block


@functools.cache
def _feed_forward_kernel(width: int) -> Any:
    D = width

    @njit(fastmath=True)
    def feed_forward(x_ND, table1_BDC, bias1_BC, table2_BDC, a_C, y_ND):
        for b in range(bias1_BC.shape[0]):
            table1, bias1, table2 = table1_BDC[b], bias1_BC[b], table2_BDC[b]
            for n in range(x_ND.shape[0]):
                x = x_ND[n]
                for v in range(UNITS):
                    z = bias1[v]
                    for d in range(D):
                        z += x[d] * table1[d, v]
                    a_C[v] = max(z, np.float32(0))
                for d in range(D):
                    total = np.float32(0)
                    for v in range(UNITS):
                        total += a_C[v] * table2[d, v]
                    y_ND[n, d] += total

    return feed_forward


@njit(inline="always")
def _insert_better(z_C, first, logits_K, ids_K):
    """Insert the logits above the worst one kept, in descending order; of equal ones the first token comes first."""
    last = len(logits_K) - 1
    for v in range(len(z_C)):
        if z_C[v] > logits_K[last]:
            k = last
            while k > 0 and logits_K[k - 1] < z_C[v]:
                logits_K[k], ids_K[k] = logits_K[k - 1], ids_K[k - 1]
                k -= 1
            logits_K[k], ids_K[k] = z_C[v], first + v


@functools.cache
def _top_tokens_kernel(width: int) -> Any:
    D = width

    # `shift_N` is what is subtracted from a position's logits, `sum_N` the sum of their exponentials (online softmax),
    # and `enough_N` the sum that a block must reach to be searched.
    @njit(fastmath=True, nogil=True)
    def top_tokens(hidden_ND, table_BDC, bias_BC, z_C, lanes, shift_N, enough_N, sum_N, logits_NK, ids_NK):
        last = logits_NK.shape[1] - 1
        for b in range(bias_BC.shape[0]):
            table, bias = table_BDC[b], bias_BC[b]
            for n in range(hidden_ND.shape[0]):
                h, shift, total = hidden_ND[n], shift_N[n], np.float32(0)
                for v in range(BLOCK):
                    logit = bias[v]
                    for d in range(D):
                        logit += h[d] * table[d, v]
                    z_C[v] = logit
                for v in range(BLOCK):
                    total += exp(min(z_C[v] - shift, HIGHEST_EXPONENT))
                if total > TOO_LARGE:  # always so in the first block, where the shift is NOTHING
                    top = largest(z_C, lanes)
                    sum_N[n] *= np.exp(np.float64(shift) - np.float64(top))
                    shift_N[n], shift, total = top, top, np.float32(0)
                    enough_N[n] = 0  # it was relative to the old shift
                    for v in range(BLOCK):
                        total += exp(z_C[v] - shift)
                sum_N[n] += total
                if total > enough_N[n] and largest(z_C, lanes) > logits_NK[n, last]:
                    _insert_better(z_C, b * BLOCK, logits_NK[n], ids_NK[n])
                    enough_N[n] = exp(logits_NK[n, last] - shift) * ROUNDING_MARGIN

    return top_tokens


def requirements(width: int, vocab_size: int, weights: Iterable[Tensor]) -> Requirements:
    """What must hold of a model for these kernels to be correct, and faster than PyTorch's operations."""
    weights = list(weights)
    return {
        "on a CPU": all(weight.device.type == "cpu" for weight in weights),
        "fp32 weights": all(weight.dtype == torch.float32 for weight in weights),
        f"weights finite, at most {LARGEST_WEIGHT:,.0f}": all(
            bool((weight.abs() <= LARGEST_WEIGHT).all()) for weight in weights
        ),
        f"width <= {WIDEST}": width <= WIDEST,
        f"vocabulary >= {SMALLEST_VOCABULARY:,}": vocab_size >= SMALLEST_VOCABULARY,
    }


def _in_blocks(x_VD: Tensor, block: int, filling: float = 0.0) -> np.ndarray:
    """Rows as columns, `block` of them at a time: (B, D, C)."""
    blocks = -(-len(x_VD) // block)
    filled = torch.full((blocks * block, x_VD.shape[1]), filling)
    filled[: len(x_VD)] = x_VD.detach()
    # PyTorch's memory begins at a cache line, numpy's does not.
    columns: np.ndarray = filled.view(blocks, block, -1).transpose(1, 2).contiguous().numpy()
    return columns


class FeedForwardKernel:
    """`relu(x @ W1.T + b1) @ W2.T + b2` of rows (..., D)."""

    def __init__(self, linear1: nn.Linear, linear2: nn.Linear) -> None:
        self._kernel = _feed_forward_kernel(linear1.in_features)
        self._tables = (
            _in_blocks(linear1.weight, UNITS),
            _in_blocks(linear1.bias[:, None], UNITS)[:, 0],
            _in_blocks(linear2.weight.T, UNITS),
        )
        self._bias2_D = linear2.bias.detach()
        self._a_C = torch.empty(UNITS).numpy()

    def __call__(self, x: Tensor) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1]).contiguous()
        y_ND = self._bias2_D.repeat(len(x_ND), 1)
        self._kernel(x_ND.numpy(), *self._tables, self._a_C, y_ND.numpy())
        return y_ND.view(x.shape)


class TopTokensKernel:
    """The likeliest tokens at some positions, which are shared out to `threads` threads where there are enough."""

    def __init__(self, weight_VD: Tensor, bias_V: Tensor, threads: int = 1) -> None:
        self._kernel = _top_tokens_kernel(weight_VD.shape[1])
        self._table_BDC = _in_blocks(weight_VD, BLOCK)
        self._bias_BC = _in_blocks(bias_V[:, None], BLOCK, float(NOTHING))[:, 0]
        self._vocab_size, self._threads = len(bias_V), threads
        # Not OpenMP's threads, which go on spinning for a while: the server needs the cores, too.
        self._pool = ThreadPoolExecutor(max(1, threads - 1))

    def __call__(self, hidden_ND: Tensor, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The logarithm of the sum of all e^logit (N, fp64), and logits and ids (N, K) of the k largest, best first.

        K is k, or V where that is smaller.
        """
        positions, candidates = len(hidden_ND), min(k, self._vocab_size)
        hidden = hidden_ND.contiguous().numpy()
        shift_N, enough_N, sum_N = np.full(positions, NOTHING), np.zeros(positions, np.float32), np.zeros(positions)
        logits_NK, ids_NK = np.full((positions, candidates), NOTHING), np.zeros((positions, candidates), np.int64)

        def run(first: int, end: int) -> None:
            scratch = torch.empty(BLOCK).numpy(), torch.empty(LANES).numpy()
            outputs = [array[first:end] for array in (shift_N, enough_N, sum_N, logits_NK, ids_NK)]
            self._kernel(hidden[first:end], self._table_BDC, self._bias_BC, *scratch, *outputs)

        shares = max(1, min(self._threads, positions // ROWS_PER_THREAD))
        bounds = [positions * share // shares for share in range(shares + 1)]
        others = [self._pool.submit(run, *bounds[share : share + 2]) for share in range(1, shares)]
        run(*bounds[:2])
        for other in others:
            other.result()
        return shift_N + np.log(sum_N), logits_NK, ids_NK
